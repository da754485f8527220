"""The result of a run, and its summary for readers."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from keras_coatnet.training.evaluation.metrics import Evaluation, format_figures


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
        return format_figures(self.figures)


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
