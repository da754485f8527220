"""One training step on JAX, on one device or laid out over many by `keras.distribution`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_coatnet.model import CoAtNetModel
from keras_coatnet.training.engine.average import momentum_at
from keras_coatnet.training.engine.losses import per_example_loss
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.training.engine.state import check_same_keys, named_variables, numbered
from keras_coatnet.training.recipe import Recipe


class JaxEngine:
    """A model, its optimizer and the average of its weights; see `TensorFlowEngine`.

    Args:
        distribution: a `keras.distribution.DataParallel` or `ModelParallel`; None: one device.
        make_model: builds the model.
        make_optimizer: builds the optimizer for a model.
        recipe: what is computed.

    Attributes:
        model: the model.
        optimizer: its optimizer.
    """

    is_chief = True
    processes = 1

    def __init__(
        self,
        distribution: Any,
        make_model: Callable[[], CoAtNetModel],
        make_optimizer: Callable[[CoAtNetModel], AdamW],
        recipe: Recipe,
    ) -> None:
        self.recipe = recipe
        self.distribution = distribution
        keras.distribution.set_distribution(distribution)
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        self.optimizer.build(self.model.trainable_variables)
        self.replicas = data_replicas(distribution)
        self._averages = self._first_averages()
        self._gradients = jax.jit(self._loss_and_gradients)
        self._apply = jax.jit(self._applied, donate_argnums=(0, 1, 2, 4))
        self._forward = jax.jit(self._evaluated)

    # --- What the trainer calls ------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Into how many chunks the devices cut what they compute at once: JAX splits it itself."""
        return 1

    def iterate(self, chunks: int, make_dataset: Callable[[int, int], Any]) -> Iterator:
        """Iterates over chunks of batches, each laid out over the devices."""
        for chunk in make_dataset(0, chunks):
            yield tuple(self._on_devices(part.numpy()) for part in chunk)

    def train_step(self, batches: Iterator) -> tuple[Any, Any]:
        """Makes one update; returns the batch's mean loss and its gradients' global norm."""
        trainable = _values(self.model.trainable_variables)
        others = _values(self._untrained())
        total = None
        for _ in range(self.recipe.gradient_accumulation_steps):
            *parts, others = self._gradients(trainable, others, *next(batches))
            total = parts if total is None else jax.tree.map(jnp.add, total, parts)
        loss, gradients = total
        trainable, optimizer, averages, norm = self._apply(
            trainable, _values(self.optimizer.variables), self._averages, others, gradients
        )
        _assign(self.model.trainable_variables, trainable)
        _assign(self._untrained(), others)
        _assign(self.optimizer.variables, optimizer)
        self._averages = averages
        return loss, norm

    def read(self, values: list) -> np.ndarray:
        """Waits for scalars that `train_step` returned, and fetches all of them at once."""
        return np.array(jax.device_get(values))

    def predict(self, batches: Iterator) -> Iterator[tuple[np.ndarray, ...]]:
        """Evaluates a data set with the averaged weights, if there are any."""
        trainable, others = self._evaluated_values()
        for images, labels, weights in batches:
            top, losses = self._forward(trainable, others, images, labels)
            yield tuple(np.asarray(part) for part in (labels, top, losses, weights))

    def state(self) -> dict[str, np.ndarray]:
        """Every variable by a key that the same recipe gives it again."""
        variables = named_variables(self.model, self.optimizer)
        values = {key: variable.value for key, variable in variables.items()}
        values |= numbered("average", self._averages)
        return {key: np.asarray(value) for key, value in values.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Sets every variable to what `state` returned once."""
        variables = named_variables(self.model, self.optimizer)
        averages = numbered("average", self._averages)
        check_same_keys([*variables, *averages], state)
        for key, variable in variables.items():
            variable.assign(state[key])
        self._averages = [
            jax.device_put(state[key], average.sharding) for key, average in averages.items()
        ]

    def save_weights(self, path: str) -> None:
        """Saves the weights that are evaluated: the averaged ones, if there are any."""
        variables = [*self.model.trainable_variables, *self._untrained()]
        kept = _values(variables)
        trainable, others = self._evaluated_values()
        _assign(variables, [*trainable, *others])
        try:
            self.model.save_weights(path)
        finally:
            _assign(variables, kept)

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process: there is one."""
        return flag

    def same_in_all_processes(self, value: int) -> bool:
        """Whether all processes have the same value: there is one."""
        return True

    # --- The step --------------------------------------------------------------------------

    def _loss_and_gradients(self, trainable: list, others: list, images: Any, labels: Any) -> Any:
        def part_of_mean(trainable: list) -> tuple[Any, list]:
            logits, updated = self.model.stateless_call(trainable, others, images, training=True)
            losses = per_example_loss(self.recipe.loss, labels, logits)
            return jnp.sum(losses) / self.recipe.batch_size, updated

        (loss, others), gradients = jax.value_and_grad(part_of_mean, has_aux=True)(trainable)
        return loss, gradients, others

    def _applied(
        self, trainable: list, optimizer: list, averages: list, others: list, gradients: list
    ) -> tuple:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradients))
        if self.recipe.clip_norm is not None:
            scale = self.recipe.clip_norm / jnp.maximum(norm, self.recipe.clip_norm)
            gradients = [g * scale for g in gradients]
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        if averages:
            iterations = optimizer[self._iterations_index()]
            share = momentum_at(iterations, self.recipe.ema)
            current = self._averaged([*trainable, *others])
            averages = [v + (a - v) * share for a, v in zip(averages, current, strict=True)]
        return trainable, optimizer, averages, norm

    def _evaluated(self, trainable: list, others: list, images: Any, labels: Any) -> tuple:
        logits, _ = self.model.stateless_call(trainable, others, images, training=False)
        logits = logits.astype("float32")
        _, top = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        truth = jax.nn.one_hot(labels, logits.shape[-1])
        return top, per_example_loss(self.recipe.loss, truth, logits)

    # --- Variables ---------------------------------------------------------------------------

    def _untrained(self) -> list:
        return self.model.non_trainable_variables

    def _averaged(self, values: list) -> list:
        """Those of the model's values that have an average: the floating-point ones."""
        return [value for value in values if jnp.issubdtype(value.dtype, jnp.floating)]

    def _first_averages(self) -> list:
        if self.recipe.ema is None:
            return []
        variables = [*self.model.trainable_variables, *self._untrained()]
        return [jnp.copy(value) for value in self._averaged(_values(variables))]

    def _evaluated_values(self) -> tuple[list, list]:
        trainable, others = _values(self.model.trainable_variables), _values(self._untrained())
        if not self._averages:
            return trainable, others
        averages = iter(self._averages)
        mixed = [
            next(averages) if jnp.issubdtype(value.dtype, jnp.floating) else value
            for value in [*trainable, *others]
        ]
        return mixed[: len(trainable)], mixed[len(trainable) :]

    def _iterations_index(self) -> int:
        variables = self.optimizer.variables
        return next(i for i, v in enumerate(variables) if v is self.optimizer.iterations)

    def _on_devices(self, value: np.ndarray) -> Any:
        if self.distribution is None:
            return jnp.asarray(value)
        layout = self.distribution.get_data_layout(value.shape)
        return keras.distribution.distribute_tensor(value, layout)


def _values(variables: list) -> list:
    return [variable.value for variable in variables]


def _assign(variables: list, values: list) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def data_replicas(distribution: Any) -> int:
    """Over how many devices a batch is split."""
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    axis = distribution.batch_dim_name or mesh.axis_names[0]
    return int(mesh.shape[mesh.axis_names.index(axis)])
