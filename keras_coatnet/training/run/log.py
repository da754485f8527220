"""The figures of a run, as rows of CSV files and as TensorBoard events."""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from keras_coatnet.files import whole_file

HISTORY, EVALUATIONS, TENSORBOARD = "history.csv", "evaluations.csv", "tensorboard"

TRAINING_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "gradient_norm",
    "images_per_second",
)

Row = dict[str, "int | float | None"]


class History(NamedTuple):
    """The rows of a run.

    Attributes:
        training: rows of `history.csv`, a dictionary by column each.
        evaluations: rows of `evaluations.csv`.
    """

    training: list[Row]
    evaluations: list[Row]

    def until(self, step: int) -> History:
        """The rows up to a step, which is included."""
        return History(*([row for row in rows if (row["step"] or 0) <= step] for rows in self))


class RunLog:
    """Writes a run's numbers to `history.csv`, `evaluations.csv` and TensorBoard's event files.

    Each row is written to the file at once, so that a killed run keeps all rows. A run that resumes
    from a checkpoint drops the rows after it. Its files equal those of a run that was never
    interrupted, except for the measured speeds. The event files are then written again from the
    rows.

    Args:
        folder: where the files are written; created if it does not exist.
        resume_step: step of the checkpoint that the run resumes from. Default: None, a new run,
            which replaces the files of an earlier one.

    Raises:
        ValueError: a file of the run was not written by this class.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with RunLog(folder, resume_step=None) as log:
        ...     log.train(step=1, epoch=0.1, loss=2.3, learning_rate=1e-3)
        ...     log.evaluation(step=1, loss=2.2, top1=0.25)
        >>> read_history(folder).evaluations
        [{'step': 1, 'validation_loss': 2.2, 'validation_top1': 0.25}]
    """

    def __init__(self, folder: str | os.PathLike, *, resume_step: int | None = None) -> None:
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = History([], [])
        if resume_step is not None:
            kept = read_history(folder).until(resume_step)
        self._training = _Table(self._folder / HISTORY, kept.training, TRAINING_COLUMNS)
        self._evaluations = _Table(self._folder / EVALUATIONS, kept.evaluations)
        self._events = _Events(self._folder / TENSORBOARD)
        for row in (*kept.training, *kept.evaluations):
            self._events.add(row)
        self._events.flush()

    def train(
        self,
        *,
        step: int,
        epoch: float,
        loss: float,
        learning_rate: float,
        gradient_norm: float | None = None,
        images_per_second: float | None = None,
    ) -> None:
        """Adds a row of training.

        Args:
            step: optimizer steps done, from 1.
            epoch: passes over the data done.
            loss: of the step, or the mean since the last row.
            learning_rate: of the step.
            gradient_norm: global norm before clipping; None: not known.
            images_per_second: None: not measured.
        """
        row = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "images_per_second": images_per_second,
        }
        self._add(self._training, row)

    def evaluation(self, *, step: int, **metrics: float | None) -> None:
        """Adds a row of an evaluation.

        Args:
            step: optimizer steps done before it.
            **metrics: what was measured, e.g. `loss`, `top1`, `top5`; the column of each has
                `validation_` before its name. The same ones at each call.

        Raises:
            ValueError: the metrics are not those of the rows before.
        """
        row = {"step": step} | {f"validation_{name}": value for name, value in metrics.items()}
        self._add(self._evaluations, row)

    def _add(self, table: _Table, row: Row) -> None:
        row = {name: _plain(value) for name, value in row.items()}
        table.add(row)
        self._events.add(row)
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._training.close()
        self._evaluations.close()
        self._events.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_history(folder: str | os.PathLike) -> History:
    """Reads the rows that `RunLog` wrote, also while the run goes on, or after it was killed.

    Args:
        folder: the run's.

    Returns:
        A `History`, with empty lists where there is no file. A last line that is incomplete is left
        out.

    Raises:
        ValueError: a line is not a row of a history; the message says which.
    """
    return History(*(_read(pathlib.Path(folder) / name) for name in (HISTORY, EVALUATIONS)))


def _plain(value: Any) -> int | float | None:
    """A number of any library as one of Python's, which is written with all its digits."""
    return value if value is None or isinstance(value, int) else float(value)


def _read(path: pathlib.Path) -> list[Row]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a row counts once its end is written
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    found = []
    for number, row in enumerate(rows, start=2):
        try:
            found.append(_parsed(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Line {number} of {path} is not a row of a run's history: {dict(row)}. Move the "
                "file away, or repair it."
            ) from error
    return found


def _parsed(row: Mapping[str, str]) -> Row:
    values = {
        name: None if text == "" else float(text) for name, text in row.items() if name != "step"
    }
    return {"step": int(row["step"]), **values}


class _Table:
    """A CSV file that grows by rows; the first row decides the columns if nothing else does."""

    def __init__(
        self, path: pathlib.Path, rows: list[Row], columns: Iterable[str] | None = None
    ) -> None:
        self._path = path
        self._columns = tuple(rows[0]) if rows else columns and tuple(columns)
        # The rows before are replaced in one go, so that none is lost if this is interrupted.
        with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            if self._columns:
                file.write(_line(self._columns))
            file.writelines(_line(row.values()) for row in rows)
        self._file = path.open("a", encoding="utf-8", newline="")

    def add(self, row: Row) -> None:
        line = _line(row.values())
        if self._columns is None:
            self._columns = tuple(row)
            line = _line(self._columns) + line
        if tuple(row) != self._columns:
            raise ValueError(
                f"{self._path} has the columns {', '.join(self._columns)}. "
                f"Received a row of: {', '.join(row)}"
            )
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(cells: Iterable[Any]) -> str:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(
        "" if cell is None else cell if isinstance(cell, str) else repr(cell) for cell in cells
    )
    return line.getvalue()


class _Events:
    """TensorBoard's event files.

    `tf.summary.scalar` wants the package `tensorboard`, which nothing else here needs and
    TensorFlow no longer brings; `tf.summary.write` with the same description does not.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        import tensorflow as tf

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._tf = tf
        self._writer = tf.summary.create_file_writer(str(folder))
        metadata = tf.compat.v1.SummaryMetadata
        self._scalar = metadata(
            plugin_data=metadata.PluginData(plugin_name="scalars"), data_class="DATA_CLASS_SCALAR"
        )

    def add(self, row: Row) -> None:
        with self._writer.as_default(step=row["step"]):
            for name, value in row.items():
                if name != "step" and value is not None:
                    value = self._tf.constant(value, "float32")
                    self._tf.summary.write(name, value, metadata=self._scalar)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
