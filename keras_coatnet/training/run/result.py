"""The result of a run, and its summary for readers."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from keras_coatnet.training.evaluation.metrics import Evaluation


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        folder: the run's folder.
        evaluation: evaluation of the final weights on the validation part.
        best_top1: highest top-1 accuracy of all evaluations, 0 to 1.
        figures: rows of the summary.
    """

    folder: pathlib.Path
    evaluation: Evaluation
    best_top1: float
    figures: dict[str, Any]

    def summary(self) -> str:
        """The figures as text."""
        return summary(self.figures)


def summary(rows: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> str:
    """Formats names and values as two aligned columns.

    Args:
        rows: names and values. Whole numbers are shown with commas, other numbers with four
            digits, None as a dash, and everything else as text.

    Returns:
        Lines of text.

    Example:
        >>> print(summary({"steps": 12000, "best top-1": 0.81234, "checkpoint": None}))
        steps       12,000
        best top-1  0.8123
        checkpoint  -
    """
    pairs = list(rows.items() if isinstance(rows, Mapping) else rows)
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name:{width}}  {_shown(value)}" for name, value in pairs)


def as_json(figures: Mapping[str, Any]) -> str:
    """Writes figures as a JSON object, without those that are not known.

    Args:
        figures: names and values. None, nan and infinities are left out: JSON has no
            such numbers.

    Returns:
        Lines of text.

    Example:
        >>> print(as_json({"steps": 12, "f1": float("nan"), "images/s": None}))
        {
          "steps": 12
        }
        <BLANKLINE>
    """
    known = {
        name: value
        for name, value in figures.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }
    return json.dumps(known, indent=2) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
