"""Plots of a run and of an evaluation.

They use matplotlib's objects directly: `pyplot` keeps global state, and may open windows.
"""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_coatnet.files import whole_file

# Most classes with names; with numbers in the cells; drawn as cells, beyond which dots are drawn.
_NAMED_CLASSES, _NUMBERED_CLASSES, _CELL_CLASSES = 40, 12, 200
_INK = "#333333"
_COLORS = ("#1f5fa8", "#d1601f")

# A row of a run's history: a value for each column.
Row = Mapping[str, "int | float | None"]


def learning_curve(
    training: Sequence[Row], evaluations: Sequence[Row], path: str | os.PathLike
) -> pathlib.Path:
    """Plots losses, accuracy and learning rate of a run against the step.

    TensorBoard shows the same figures and more. This image needs no program to be looked at.

    Args:
        training: rows with `step`, `loss` and `learning_rate`.
        evaluations: rows with `step`, `validation_loss` and `validation_top1`; may be empty.
        path: of the image, a PNG file.

    Returns:
        The path.

    Raises:
        ValueError: there is no row of training.
        ImportError: matplotlib is not installed.
    """
    if not training:
        raise ValueError("There is no row of training to plot. Received: training=[]")
    curves = {
        "loss": [(training, "loss"), (evaluations, "validation_loss")],
        "top-1": [(evaluations, "validation_top1")],
        "learning rate": [(training, "learning_rate")],
    }
    if not evaluations:
        del curves["top-1"]
    figure = _figure(9, 2.5 * len(curves))
    panels = figure.subplots(len(curves), sharex=True)
    for panel, (title, lines) in zip(panels, curves.items(), strict=True):
        for color, (rows, name) in zip(_COLORS, lines, strict=False):
            known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if known:
                marker = "o" if rows is evaluations else None
                panel.plot(*zip(*known, strict=True), color=color, marker=marker, label=name)
        panel.set_ylabel(title)
        panel.grid(color="#e6e6e6")
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel("step")
    return _save(figure, pathlib.Path(path))


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
    import matplotlib.colors

    # A square-root scale makes rare mistakes visible.
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
    accuracy = np.diag(matrix).sum() / max(matrix.sum(), 1)
    panel.set_title(
        f"{number} classes, {matrix.sum():,} samples, {accuracy:.2%} right", fontsize=11
    )
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


def _shortened(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
