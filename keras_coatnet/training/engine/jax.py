"""The training step on JAX, on one device or laid out over many by `keras.distribution`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import keras
import numpy as np
import tensorflow as tf

from keras_coatnet.model import CoAtNetModel
from keras_coatnet.training.engine.average import momentum_at
from keras_coatnet.training.engine.base import Engine, EvaluatedBatch, StepConfig
from keras_coatnet.training.engine.losses import per_example_loss
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.types import Tensor

Distribution = keras.distribution.DataParallel | keras.distribution.ModelParallel


class JaxEngine(Engine):
    """An engine whose variables are laid out over devices by `keras.distribution`.

    Args:
        distribution: the layout; None: one device.
        make_model: builds the model.
        make_optimizer: builds the optimizer for a model.
        config: what a step computes.
    """

    def __init__(
        self,
        distribution: Distribution | None,
        make_model: Callable[[], CoAtNetModel],
        make_optimizer: Callable[[CoAtNetModel], AdamW],
        config: StepConfig,
    ) -> None:
        self.distribution = distribution
        keras.distribution.set_distribution(distribution)
        super().__init__(make_model, make_optimizer, config)
        self._gradients = jax.jit(self._loss_and_gradients)
        self._apply = jax.jit(self._apply_gradients, donate_argnums=(0, 1, 2, 4))
        self._forward = jax.jit(self._top_and_losses)

    # --- Devices ---------------------------------------------------------------------------

    @property
    def replicas(self) -> int:
        return data_replicas(self.distribution)

    @property
    def num_chunks(self) -> int:
        return 1  # JAX itself splits a chunk over the devices

    def _on_devices(self, value: np.ndarray) -> Tensor:
        if self.distribution is None:
            return jnp.asarray(value)
        layout = self.distribution.get_data_layout(value.shape)
        return keras.distribution.distribute_tensor(value, layout)

    # --- Training --------------------------------------------------------------------------

    def iterate(
        self, num_chunks: int, make_dataset: Callable[[int, int], tf.data.Dataset]
    ) -> Iterator:
        for chunk in make_dataset(0, num_chunks):
            yield tuple(self._on_devices(part.numpy()) for part in chunk)

    def train_step(self, batches: Iterator) -> tuple[Tensor, Tensor]:
        trainable, others = _values(self._trainable), _values(self._others)
        total, others = self._gradients(trainable, others, *next(batches))
        for _ in range(self.config.gradient_accumulation_steps - 1):
            part, others = self._gradients(trainable, others, *next(batches))
            total = jax.tree.map(jnp.add, total, part)
        loss, gradients = total
        trainable, optimizer, self._averages, norm = self._apply(
            trainable, _values(self.optimizer.variables), self._averages, others, gradients
        )
        _assign(self._trainable, trainable)
        _assign(self._others, others)
        _assign(self.optimizer.variables, optimizer)
        return loss, norm

    def read(self, values: list[Tensor]) -> np.ndarray:
        return np.array(jax.device_get(values))

    def _loss_and_gradients(
        self, trainable: list, others: list, images: Tensor, labels: Tensor
    ) -> tuple[tuple[Tensor, list], list]:
        """What a chunk adds to the batch's mean loss and its gradients; and the other variables."""

        def part_of_mean(trainable: list) -> tuple[Tensor, list]:
            logits, updated = self._call(trainable, others, images, training=True)
            losses = per_example_loss(self.config.loss, labels, logits)
            return jnp.sum(losses) / self.config.batch_size, updated

        (loss, others), gradients = jax.value_and_grad(part_of_mean, has_aux=True)(trainable)
        return (loss, gradients), others

    def _apply_gradients(
        self, trainable: list, optimizer: list, averages: list, others: list, gradients: list
    ) -> tuple[list, list, list, Tensor]:
        """New values of trainable variables, optimizer and averages; and the gradients' norm."""
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients))
        limit = self.config.global_clipnorm
        if limit is not None:
            gradients = [gradient * (limit / jnp.maximum(norm, limit)) for gradient in gradients]
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        if self.config.ema_momentum is not None:
            step = optimizer[self._iterations_index()]
            momentum = momentum_at(step, self.config.ema_momentum)
            values = [v for v in [*trainable, *others] if jnp.issubdtype(v.dtype, jnp.floating)]
            averages = [v + (a - v) * momentum for a, v in zip(averages, values, strict=True)]
        return trainable, optimizer, averages, norm

    def _call(
        self, trainable: list, others: list, images: Tensor, training: bool
    ) -> tuple[Tensor, list]:
        """Logits, and the values of the other variables after the call."""
        result = self.model.stateless_call(trainable, others, images, training=training)
        return result[0], list(result[1])

    def _iterations_index(self) -> int:
        variables = self.optimizer.variables
        return next(i for i, v in enumerate(variables) if v is self.optimizer.iterations)

    # --- Evaluation ------------------------------------------------------------------------

    def _evaluate_batch(self, images: Tensor, labels: Tensor, weights: Tensor) -> EvaluatedBatch:
        values = _values(self._trainable), _values(self._others)
        top, losses = self._forward(*values, images, labels)
        return EvaluatedBatch(*map(np.asarray, (labels, top, losses, weights)))

    def _top_and_losses(
        self, trainable: list, others: list, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, _ = self._call(trainable, others, images, training=False)
        logits = logits.astype("float32")
        classes = logits.shape[-1]
        _, top = jax.lax.top_k(logits, min(5, classes))
        return top, per_example_loss(self.config.loss, jax.nn.one_hot(labels, classes), logits)

    # --- Variables and their averages --------------------------------------------------------

    @property
    def _trainable(self) -> list[keras.Variable]:
        return self.model.trainable_variables

    @property
    def _others(self) -> list[keras.Variable]:
        return self.model.non_trainable_variables

    @property
    def _averaged(self) -> list[keras.Variable]:
        """The variables that have an average."""
        return [v for v in [*self._trainable, *self._others] if "float" in v.dtype]

    def _first_averages(self) -> list[Tensor]:
        return [jnp.copy(value) for value in _values(self._averaged)]

    def _set_averages(self, values: list[np.ndarray]) -> None:
        self._averages = [
            jax.device_put(value, average.sharding)
            for value, average in zip(values, self._averages, strict=True)
        ]

    def _swap_averages(self) -> None:
        values = _values(self._averaged)
        _assign(self._averaged, self._averages)
        self._averages = values


def _values(variables: list[keras.Variable]) -> list[Tensor]:
    return [variable.value for variable in variables]


def _assign(variables: list[keras.Variable], values: list[Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def data_replicas(distribution: Distribution | None) -> int:
    """Over how many devices a batch is split."""
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    axis = distribution.batch_dim_name or mesh.axis_names[0]
    return int(mesh.shape[mesh.axis_names.index(axis)])
