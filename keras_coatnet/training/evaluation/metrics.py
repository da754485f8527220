"""Metrics of a classifier, computed from counts of its answers."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_coatnet.arguments import whole_number
from keras_coatnet.files import whole_file
from keras_coatnet.paths import check_local

# From this many classes on the five best answers say something that the best one does not.
TOP5_CLASSES = 6
# A confusion matrix of ImageNet-21k's classes would take 4 GB; up to here it takes 32 MB.
CONFUSION_CLASSES = 2000


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of an evaluation. A ratio whose denominator is zero is nan.

    Attributes:
        classes: names, by id.
        loss: mean over the samples.
        top1: share of samples whose best answer is right.
        top5: share of samples that are among the five best answers; None below six classes.
        truths: (classes,), how many samples a class has.
        answers: (classes,), how often it was the best answer.
        hits: (classes,), how often that answer was right.
        confusion: (classes, classes), int64, rows are the truth; None above 2,000 classes.
        positive: id of the positive class of a two-class problem; None for other problems.
    """

    classes: tuple[str, ...]
    loss: float
    top1: float
    top5: float | None
    truths: np.ndarray
    answers: np.ndarray
    hits: np.ndarray
    confusion: np.ndarray | None
    positive: int | None

    @property
    def count(self) -> int:
        """Samples in all."""
        return int(self.truths.sum())

    @property
    def recall(self) -> np.ndarray:
        """(classes,), share of a class's samples that were found: its accuracy."""
        return _ratio(self.hits, self.truths)

    @property
    def precision(self) -> np.ndarray:
        """(classes,), share of the answers naming a class that were right."""
        return _ratio(self.hits, self.answers)

    @property
    def f1(self) -> np.ndarray:
        """(classes,), harmonic mean of recall and precision; 0 if no answer is right."""
        return _ratio(2 * self.hits, self.truths + self.answers)

    def figures(self) -> dict[str, int | float]:
        """The figures of all classes together, by name.

        Returns:
            `count`, `loss`, `top1`, `top5` (from six classes on), `macro_recall`,
            `macro_precision` and `macro_f1`: means over the classes that have a value. With two
            classes also `accuracy`, and `recall`, `precision` and `f1` of the positive one.
        """
        found = {"count": self.count, "loss": self.loss, "top1": self.top1}
        if self.top5 is not None:
            found["top5"] = self.top5
        for name in ("recall", "precision", "f1"):
            found[f"macro_{name}"] = _mean(getattr(self, name))
        if self.positive is not None:
            found["accuracy"] = self.top1
            for name in ("recall", "precision", "f1"):
                found[name] = float(getattr(self, name)[self.positive])
        return found

    def summary_table(self) -> str:
        """The figures as lines of text, a name and a value each."""
        rows: dict[str, Any] = {
            name.replace("_", " "): value for name, value in self.figures().items()
        }
        if self.positive is not None:
            rows["positive class"] = self.classes[self.positive]
        return format_figures(rows)

    def per_class_table(self, limit: int | None = None) -> str:
        """A line of text for each class, those of the lowest recall first.

        Args:
            limit: how many lines to show; None: all.

        Returns:
            A table: name, count, recall, precision, F1.

        Raises:
            ValueError: `limit` is below 1.
        """
        if limit is not None:
            limit = whole_number("limit", limit)
        # Classes without samples have no recall: they come last.
        order = np.lexsort((np.nan_to_num(self.recall), self.truths == 0))
        width = max(len("class"), *map(len, self.classes))
        lines = [f"{'class':{width}}  {'count':>7}  {'recall':>6}  {'precision':>9}  {'f1':>6}"]
        columns = (self.truths, self.recall, self.precision, self.f1)
        for index in order[:limit]:
            count, recall, precision, f1 = (_shown(column[index]) for column in columns)
            lines.append(
                f"{self.classes[index]:{width}}  {count:>7}  {recall:>6}  {precision:>9}  {f1:>6}"
            )
        if len(order) > len(lines) - 1:
            lines.append(f"... and {len(order) - len(lines) + 1:,} more classes")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The figures and the classes' as a dictionary that JSON can hold.

        Nan and infinities become None.
        """
        columns = {"count": self.truths, "recall": self.recall, "precision": self.precision}
        columns["f1"] = self.f1
        found: dict[str, Any] = {name: _json(value) for name, value in self.figures().items()}
        if self.positive is not None:
            found["positive_class"] = self.classes[self.positive]
        found["classes"] = [
            {"name": name} | {key: _json(column[index]) for key, column in columns.items()}
            for index, name in enumerate(self.classes)
        ]
        return found

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `evaluation.json`, `per_class.csv`, `confusion.csv` and `confusion.png`.

        A file is replaced only once the new one is whole. Above 2,000 classes there is no
        confusion.

        Args:
            folder: made if it does not exist.

        Raises:
            ImportError: matplotlib is not installed; the other files are written.
        """
        from keras_coatnet.training.evaluation import plots

        check_local(folder, "folder")
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        found = self.to_dict()
        _write(folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
        _write(
            folder / "per_class.csv",
            _csv([list(found["classes"][0]), *(list(row.values()) for row in found["classes"])]),
        )
        if self.confusion is None:
            return
        rows = zip(self.classes, self.confusion.tolist(), strict=True)
        table = [["truth", *self.classes], *([name, *row] for name, row in rows)]
        _write(folder / "confusion.csv", _csv(table))
        plots.confusion(self.confusion, self.classes, folder / "confusion.png")


class EvaluationCounter:
    """Counts a classifier's answers batch by batch.

    Args:
        classes: names, by id; at least two.
        positive: name or id of the positive class, for two classes. Default: the second. With
            more classes it must be None.

    Raises:
        ValueError: there are fewer than two classes, or no such positive class.

    Example:
        >>> counter = EvaluationCounter(["cat", "dog"], positive="dog")
        >>> counter.update(labels=[0, 1], top=[[0, 1], [0, 1]], losses=[0.1, 1.9])
        >>> counter.result().top1
        0.5
    """

    def __init__(self, classes: Sequence[str], positive: str | int | None = None) -> None:
        self._classes = tuple(map(str, classes))
        number = len(self._classes)
        if number < 2:
            raise ValueError(
                f"A classifier tells at least two classes apart. Received: {list(classes)}"
            )
        self._positive = _positive(self._classes, positive)
        self._loss, self._in_top5 = 0.0, 0
        self._truths, self._answers, self._hits = (np.zeros(number, "int64") for _ in range(3))
        # Flat, as pairs are counted by truth * classes + answer.
        small = number <= CONFUSION_CLASSES
        self._confusion = np.zeros(number * number, "int64") if small else None

    def update(self, labels: Any, top: Any, losses: Any, weights: Any = None) -> None:
        """Counts one batch.

        Args:
            labels: (batch,), ids of the true classes.
            top: (batch, k), ids of the best answers, the best first; k is at least 5 from six
                classes on.
            losses: (batch,), of each sample.
            weights: (batch,), 1, or 0 for samples that only fill the batch up; None: all 1.

        Raises:
            ValueError: shapes or ids do not fit.
        """
        labels, top, losses = np.asarray(labels), np.asarray(top), np.asarray(losses)
        weights = np.ones(len(labels)) if weights is None else np.asarray(weights)
        number = len(self._classes)
        needed = 5 if number >= TOP5_CLASSES else 1
        shapes = {labels.shape, losses.shape, weights.shape, top.shape[:1]}
        if shapes != {(labels.size,)} or top.ndim != 2 or top.shape[1] < needed:
            raise ValueError(
                f"Expected labels, losses and weights of shape (batch,), and the {needed} or more "
                f"best answers of each, (batch, k). Received: {labels.shape}, {losses.shape}, "
                f"{weights.shape} and {top.shape}"
            )
        if not np.isin(weights, (0, 1)).all():
            raise ValueError(f"`weights` must be 0 or 1. Received: {np.unique(weights)[:10]}")
        counted = weights == 1
        labels, top, losses = (array[counted] for array in (labels, top, losses))
        for what, ids in (("a label", labels), ("an answer", top)):
            if ids.size and not (ids.min() >= 0 and ids.max() < number):
                raise ValueError(
                    f"There are {number} classes, 0 to {number - 1}. Received {what} from "
                    f"{ids.min()} to {ids.max()}"
                )
        labels, best = labels.astype("int64"), top[:, 0].astype("int64")
        self._loss += float(losses.astype("float64").sum())
        self._in_top5 += int((top[:, :5] == labels[:, None]).any(axis=1).sum())
        for total, ids in (
            (self._truths, labels),
            (self._answers, best),
            (self._hits, labels[labels == best]),
        ):
            total += np.bincount(ids, minlength=number)
        if self._confusion is not None:
            np.add.at(self._confusion, labels * number + best, 1)

    @property
    def top1(self) -> float:
        """Share of samples so far whose best answer is right; nan before the first one."""
        return float(_ratio(self._hits.sum(), self._truths.sum()))

    def result(self) -> Evaluation:
        """The figures of what was counted so far; nan before the first sample."""
        number, count = len(self._classes), self._truths.sum()
        confusion = self._confusion
        return Evaluation(
            classes=self._classes,
            loss=float(_ratio(self._loss, count)),
            top1=self.top1,
            top5=float(_ratio(self._in_top5, count)) if number >= TOP5_CLASSES else None,
            truths=self._truths.copy(),
            answers=self._answers.copy(),
            hits=self._hits.copy(),
            confusion=None if confusion is None else confusion.reshape(number, number).copy(),
            positive=self._positive,
        )


def _positive(classes: tuple[str, ...], positive: str | int | None) -> int | None:
    if len(classes) != 2:
        if positive is not None:
            raise ValueError(
                f"Only one of two classes can be the positive one; there are {len(classes)}. "
                f"Received: positive={positive!r}"
            )
        return None
    if positive is None:
        return 1
    index = str(classes.index(positive) if positive in classes else positive)
    if index not in ("0", "1"):  # on the command line, numbers are text
        raise ValueError(
            f"`positive` must be one of {', '.join(map(repr, classes))}, or 0 or 1. "
            f"Received: positive={positive!r}"
        )
    return int(index)


def _ratio(part: Any, whole: Any) -> np.ndarray:
    part, whole = np.asarray(part, "float64"), np.asarray(whole, "float64")
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _json(value: Any) -> int | float | None:
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(value) if np.isfinite(value) else None


def format_figures(figures: Mapping[str, Any]) -> str:
    """Formats names and values as two aligned columns.

    Args:
        figures: names and values. Whole numbers are shown with commas, other numbers with four
            decimals, None and nan as a dash, and everything else as text.

    Returns:
        Lines of text.

    Example:
        >>> print(format_figures({"steps": 12000, "best top1": 0.81234, "f1": None}))
        steps      12,000
        best top1  0.8123
        f1         -
    """
    width = max(map(len, figures), default=0)
    return "\n".join(f"{name:{width}}  {_shown(value)}" for name, value in figures.items())


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _csv(rows: list[list]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path: pathlib.Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
