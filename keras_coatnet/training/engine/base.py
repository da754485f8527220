"""What a training run asks of a backend: the base class of the engines.

An engine holds a model and its optimizer, and compiles a training step for them. The loop calls
`iterate` and `train_step`, evaluation calls `iterate` and `evaluate`, and checkpoints are made of
`state`. A run may have several processes, each with an engine of its own; all of them call the same
methods in the same order.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_coatnet.model import CoAtNetModel
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.training.engine.state import check_same_keys, named_variables, numbered
from keras_coatnet.types import Tensor


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a training step computes.

    Attributes:
        batch_size: images of a step, over all devices.
        loss: `"softmax"` or `"sigmoid"`, see `per_example_loss`.
        gradient_accumulation_steps: chunks in which each device computes its share of a batch.
        global_clipnorm: the largest global norm of the gradients; None: any.
        ema_momentum: momentum of the moving average of the weights; None: there is no average.
    """

    batch_size: int
    loss: str = "softmax"
    gradient_accumulation_steps: int = 1
    global_clipnorm: float | None = None
    ema_momentum: float | None = None


class EvaluatedBatch(NamedTuple):
    """The results for the n images of a global batch.

    Attributes:
        labels: (n,), the numbers of the true classes.
        top: (n, k), the numbers of the k classes with the highest scores, the best first.
        losses: (n,).
        weights: (n,), 1, or 0 for what only fills the batch.
    """

    labels: np.ndarray
    top: np.ndarray
    losses: np.ndarray
    weights: np.ndarray


class Engine(abc.ABC):
    """A model and its optimizer on the devices of a run, with the step that trains them.

    Args:
        make_model: builds the model.
        make_optimizer: builds the optimizer for a model.
        config: what a step computes.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        config: what a step computes.
    """

    def __init__(
        self,
        make_model: Callable[[], CoAtNetModel],
        make_optimizer: Callable[[CoAtNetModel], AdamW],
        config: StepConfig,
    ) -> None:
        self.config = config
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        self.optimizer.build(self.model.trainable_variables)
        has_average = config.ema_momentum is not None
        self._averages: list[Tensor] = self._first_averages() if has_average else []

    # --- Devices and processes -------------------------------------------------------------

    @property
    @abc.abstractmethod
    def replicas(self) -> int:
        """Over how many devices a batch is split."""

    @property
    @abc.abstractmethod
    def num_chunks(self) -> int:
        """How many chunks of a batch `iterate` must deliver for one computation of all devices."""

    @property
    def processes(self) -> int:
        """How many processes make up the run."""
        return 1

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run's files."""
        return True

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All processes must call this at the same step."""
        return flag

    def same_in_all_processes(self, value: int) -> bool:
        """Whether all processes, which must all call this, have the same value."""
        return True

    # --- Training and evaluation -----------------------------------------------------------

    @abc.abstractmethod
    def iterate(self, num_chunks: int, make_dataset: Callable[[int, int], Any]) -> Iterator:
        """Iterates over a data set whose batches are cut into chunks.

        Args:
            num_chunks: how many chunks there are at once, over all processes.
            make_dataset: makes the `tf.data.Dataset` of this process, from the number of its first
                chunk and how many it has.

        Returns:
            An iterator for `train_step` or `evaluate`.
        """

    @abc.abstractmethod
    def train_step(self, batches: Iterator) -> tuple[Tensor, Tensor]:
        """Makes one update.

        Args:
            batches: what `iterate` returned, of (images, labels).

        Returns:
            The batch's mean loss and the global norm of its gradients before clipping. Both are
            scalars on a device: the call returns before they are computed, see `read`.
        """

    @abc.abstractmethod
    def read(self, values: list[Tensor]) -> np.ndarray:
        """Waits for scalars that `train_step` returned, and fetches all of them at once."""

    def evaluate(self, batches: Iterator) -> Iterator[EvaluatedBatch]:
        """Evaluates a data set with the averaged weights, if there are any.

        Args:
            batches: what `iterate` returned, of (images, labels, weights).

        Yields:
            The results for each batch, over all processes.
        """
        with self._averaged_weights():
            for images, labels, weights in batches:
                yield self._evaluate_batch(images, labels, weights)

    @abc.abstractmethod
    def _evaluate_batch(self, images: Tensor, labels: Tensor, weights: Tensor) -> EvaluatedBatch:
        """Evaluates one batch with the model's present weights."""

    # --- State -----------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """All that the next steps depend on: the values of every variable, by key.

        A run with the same recipe gives the same variables the same keys.
        """
        variables = named_variables(self.model, self.optimizer)
        values = variables | numbered("average", self._averages)
        return {key: np.asarray(value) for key, value in values.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Sets every variable to a value that `state` returned.

        Raises:
            ValueError: the state belongs to another network or optimizer.
        """
        variables = named_variables(self.model, self.optimizer)
        averages = numbered("average", self._averages)
        check_same_keys([*variables, *averages], state)
        for key, variable in variables.items():
            variable.assign(state[key])
        self._set_averages([state[key] for key in averages])

    def save_weights(self, path: str | os.PathLike) -> None:
        """Saves the weights that are evaluated: the averaged ones, if there are any."""
        with self._averaged_weights():
            self.model.save_weights(path)

    # --- The average of the weights --------------------------------------------------------

    @abc.abstractmethod
    def _first_averages(self) -> list[Tensor]:
        """Copies of the floating-point variables. They include BatchNorm's moving statistics."""

    @abc.abstractmethod
    def _set_averages(self, values: list[np.ndarray]) -> None:
        """Sets the averages to these values, in the same order."""

    @abc.abstractmethod
    def _swap_averages(self) -> None:
        """Exchanges the model's weights and the averages, bit for bit."""

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """A context in which the model has the averaged weights, if there are any."""
        if not self._averages:
            yield
            return
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()
