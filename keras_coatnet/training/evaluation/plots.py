"""Images of a run and of an evaluation, by matplotlib's objects: no state, no window."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_coatnet.files import whole_file
from keras_coatnet.training.run import log

# Above so many classes the names, and the numbers in the cells, can no longer be read; and a cell
# is hardly more than a pixel, so that what is not empty is drawn as a dot larger than that.
_NAMED_CLASSES, _NUMBERED_CLASSES, _CELL_CLASSES = 40, 12, 200
# From so many rows on a running mean of this share of them stands over the training loss.
_SMOOTHED_ROWS, _SMOOTHING = 200, 0.02

_INK, _QUIET = "#333333", "#b9c6d6"
_COLORS = ("#1f5fa8", "#d1601f", "#3b8a4b", "#8a4b9b")


def learning_curve(folder: str | os.PathLike) -> pathlib.Path:
    """Draws a run's losses, its accuracy in evaluations and its learning rate against the step.

    Args:
        folder: the run's, where `log.RunLog` wrote.

    Returns:
        The path of the image, `curves.png` in that folder.

    Raises:
        ValueError: the run has no rows yet, or a file of it is damaged.
        ImportError: matplotlib is not installed.
    """
    history = log.read_history(folder)
    if not history.training:
        raise ValueError(f"There is no row of training in {folder} to draw.")
    accuracies = _series(history.evaluations, "top1")
    heights = [3, 2, 1] if accuracies else [3, 1]
    figure = _figure(9, 1.4 * sum(heights))
    panels = list(
        figure.subplots(
            len(heights), sharex=True, squeeze=True, gridspec_kw={"height_ratios": heights}
        )
    )

    _draw_training_loss(panels[0], *_columns(history.training, "loss"))
    losses = _series(history.evaluations, "loss")
    for color, (name, steps, values) in zip(_COLORS[1:], losses, strict=False):
        panels[0].plot(steps, values, color=color, marker="o", markersize=3, label=name)
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False)

    if accuracies:
        for color, (name, steps, values) in zip(_COLORS[1:], accuracies, strict=False):
            if np.isfinite(values).any():
                best = int(np.nanargmax(values))
                name += f", best {100 * values[best]:.2f}% at step {steps[best]:,}"
            panels[1].plot(steps, 100 * values, color=color, marker="o", markersize=3, label=name)
        panels[1].set_ylabel("top-1, %")
        panels[1].legend(frameon=False, loc="lower right")

    panels[-1].plot(*_columns(history.training, "learning_rate"), color=_INK)
    panels[-1].set_ylabel("learning rate")
    panels[-1].set_ylim(bottom=0)
    panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    panels[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    for panel in panels:
        panel.grid(color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels(panels)
    return _save(figure, pathlib.Path(folder) / "curves.png")


def confusion(matrix: Any, classes: Sequence[str], path: str | os.PathLike) -> pathlib.Path:
    """Draws a confusion matrix; the color is the share of a true class's samples.

    Args:
        matrix: (classes, classes), counts; rows are the truth. Readable from 2 to about 1,000
            classes: names stand at up to 40, numbers in the cells at up to 12.
        classes: names, by id.
        path: of the image, a PNG file.

    Returns:
        The path.

    Raises:
        ValueError: the matrix is not square, or there are not as many names.
        ImportError: matplotlib is not installed.
    """
    matrix, number = np.asarray(matrix), len(classes)
    if matrix.shape != (number, number):
        raise ValueError(
            "The matrix must have a row and a column for each class. "
            f"Received: a matrix of shape {matrix.shape} and {number} names"
        )
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)

    side = float(np.clip(3 + 0.28 * number, 5, 11))  # 1,000 classes: a pixel a cell, or more
    figure = _figure(side + 1, side)
    panel = figure.subplots()
    import matplotlib

    # The root makes room for the rare mistakes, which are what one looks for.
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="#f0e6dc")
    norm = matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1)
    if number <= _CELL_CLASSES:
        drawn = panel.imshow(shares, cmap=colors, norm=norm, interpolation="nearest")
    else:
        drawn = _draw_dots(panel, np.nan_to_num(shares), cmap=colors, norm=norm)
    bar = figure.colorbar(drawn, ax=panel, shrink=0.8, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1%", "5%", "20%", "50%", "100%"])
    bar.outline.set_visible(False)
    bar.set_label("share of the true class")
    panel.set_xlabel("answer")
    panel.set_ylabel("truth")
    panel.tick_params(length=0)
    if number <= _NAMED_CLASSES:
        names = [_shortened(name) for name in classes]
        slanted = max(map(len, names)) * number > 60
        panel.set_xticks(range(number), names, rotation=90 if slanted else 0)
        panel.set_yticks(range(number), names)
        panel.set_xticks(np.arange(number + 1) - 0.5, minor=True)
        panel.set_yticks(np.arange(number + 1) - 0.5, minor=True)
        panel.grid(which="minor", color="white", linewidth=1)
        panel.tick_params(which="minor", length=0)
    if number <= _NUMBERED_CLASSES:
        for row, column in np.ndindex(number, number):
            pale = np.nan_to_num(shares[row, column]) < 0.3
            panel.text(
                column,
                row,
                f"{matrix[row, column]:,}",
                ha="center",
                va="center",
                fontsize=9 if matrix.max() < 10_000 else 7,
                color=_INK if pale else "white",
            )
    panel.spines[:].set_visible(False)
    known = np.diag(matrix).sum() / max(matrix.sum(), 1)
    panel.set_title(f"{number} classes, {matrix.sum():,} samples, {known:.2%} right", fontsize=11)
    return _save(figure, pathlib.Path(path))


def _draw_dots(panel: Any, shares: np.ndarray, **colors: Any) -> Any:
    rows, columns = np.nonzero(shares)
    order = np.argsort(shares[rows, columns])  # what matters most lies on top
    rows, columns = rows[order], columns[order]
    panel.set_xlim(-0.5, len(shares) - 0.5)
    panel.set_ylim(len(shares) - 0.5, -0.5)
    panel.set_aspect("equal")
    return panel.scatter(
        columns, rows, c=shares[rows, columns], s=3, marker="s", linewidths=0, **colors
    )


def check_matplotlib() -> None:
    """Checks that images can be drawn, for those who draw them only at the end of long work.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Images need matplotlib: pip install "keras-coatnet[training]"'
        ) from error


def _figure(width: float, height: float) -> Any:
    check_matplotlib()
    import matplotlib.backends.backend_agg
    import matplotlib.figure

    figure = matplotlib.figure.Figure((width, height), dpi=130, layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    with whole_file(path) as partial, warnings.catch_warnings():
        # matplotlib's font lacks many scripts; a class named in one of them gets boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(partial, format="png")
    return path


def _columns(rows: list[log.Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    known = [(row["step"], row[name]) for row in rows if row[name] is not None]
    steps, values = zip(*known, strict=True) if known else ((), ())
    return np.array(steps), np.array(values, "float64")


def _series(rows: list[log.Row], kind: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Columns of the evaluations that hold such a figure: there may be one of averaged weights."""
    names = [name for name in (rows[0] if rows else ()) if kind in name.split("_")]
    return [(name.replace("_", " "), *_columns(rows, name)) for name in names]


def _draw_training_loss(panel: Any, steps: np.ndarray, losses: np.ndarray) -> None:
    if len(steps) < _SMOOTHED_ROWS:
        panel.plot(steps, losses, color=_COLORS[0], label="training loss")
        return
    width = max(2, round(_SMOOTHING * len(steps)))
    # The mean of the last `width` rows, of fewer at the start.
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - width, 0)
    panel.plot(steps, losses, color=_QUIET, linewidth=0.7)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    panel.plot(steps, means, color=_COLORS[0], label=f"training loss, mean of {width} rows")


def _shortened(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
