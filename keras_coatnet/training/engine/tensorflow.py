"""One training step under any `tf.distribute` strategy.

Keras's `fit` fails under MultiWorkerMirroredStrategy, and its optimizers clip each replica's
gradients before they are summed. So the step is written out here: gradients are summed over the
replicas, then clipped by their global norm, then applied; and the same few lines serve one device,
several, and several machines. They are written for TPUs, too, but were never run on one: see
`devices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_coatnet.model import CoAtNetModel
from keras_coatnet.training.engine.average import momentum_at
from keras_coatnet.training.engine.devices import is_chief
from keras_coatnet.training.engine.losses import per_example_loss
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.training.engine.state import check_same_keys, named_variables, numbered
from keras_coatnet.training.recipe import Recipe


class TensorFlowEngine:
    """A model, its optimizer and the average of its weights, as a strategy holds them.

    Args:
        strategy: where it all lives.
        make_model: builds the model; called in the strategy's scope.
        make_optimizer: builds the optimizer for a model; called there too.
        recipe: what is computed.

    Attributes:
        model: the model.
        optimizer: its optimizer.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        make_model: Callable[[], CoAtNetModel],
        make_optimizer: Callable[[CoAtNetModel], AdamW],
        recipe: Recipe,
    ) -> None:
        self.strategy = strategy
        self.recipe = recipe
        self.replicas = strategy.num_replicas_in_sync
        with strategy.scope():
            self.model = make_model()
            self.optimizer = make_optimizer(self.model)
            self.optimizer.build(self.model.trainable_variables)
            self._averages = self._make_averages()
            self._sums = self._make_sums()
        self._accumulate = tf.function(self._accumulate_step)
        self._update = tf.function(self._update_step)
        self._predict = tf.function(self._predict_step)
        self._swap = tf.function(self._swap_step)
        self._total = tf.function(self._total_over_replicas)

    # --- What the trainer calls ------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Into how many chunks the devices cut what they compute at once: a chunk for each."""
        return self.replicas

    @property
    def processes(self) -> int:
        """How many processes make up the run."""
        if not isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return 1
        cluster = self.strategy.cluster_resolver.cluster_spec().as_dict()
        return sum(len(cluster.get(job, [])) for job in ("chief", "worker"))

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run's files."""
        return is_chief(self.strategy)

    def iterate(self, chunks: int, make_dataset: Callable[[int, int], tf.data.Dataset]) -> Iterator:
        """Iterates over chunks of batches, one for each replica of this process at once.

        Args:
            chunks: how many chunks there are at once, over all processes.
            make_dataset: makes the data set of some of them: of the first's number and how many.

        Returns:
            An iterator for `train_step` or `predict`.
        """

        def make(context: tf.distribute.InputContext) -> tf.data.Dataset:
            own = chunks // context.num_input_pipelines
            return make_dataset(context.input_pipeline_id * own, own)

        return iter(self.strategy.distribute_datasets_from_function(make))

    def train_step(self, batches: Iterator) -> tuple[Any, Any]:
        """Makes one update.

        Args:
            batches: what `iterate` returned.

        Returns:
            The batch's mean loss and the global norm of its gradients, before clipping; tensors.
        """
        for _ in range(self.recipe.gradient_accumulation_steps - 1):
            self._accumulate(*next(batches))
        return self._update(*next(batches))

    def read(self, values: list) -> np.ndarray:
        """Waits for scalars that `train_step` returned, and fetches all of them at once."""
        return tf.stack(values).numpy()

    def predict(self, batches: Iterator) -> Iterator[tuple[np.ndarray, ...]]:
        """Evaluates a data set with the averaged weights, if there are any.

        Args:
            batches: what `iterate` returned.

        Yields:
            (labels, top, losses, weights) of a global batch: (n,), (n, k), (n,), (n,).
        """
        if self._averages:
            self._swap()
        try:
            for images, labels, weights in batches:
                yield tuple(part.numpy() for part in self._predict(images, labels, weights))
        finally:
            if self._averages:
                self._swap()

    def state(self) -> dict[str, np.ndarray]:
        """Every variable by a key that the same recipe gives it again."""
        return {key: variable.numpy() for key, variable in self._variables().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Sets every variable to what `state` returned once."""
        variables = self._variables()
        check_same_keys(variables, state)
        for key, variable in variables.items():
            variable.assign(state[key])

    def save_weights(self, path: str) -> None:
        """Saves the weights that are evaluated: the averaged ones, if there are any."""
        if self._averages:
            self._swap()
        try:
            self.model.save_weights(path)
        finally:
            if self._averages:
                self._swap()

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All processes must call this at the same step."""
        return self._over_replicas(float(flag)) > 0

    def same_in_all_processes(self, value: int) -> bool:
        """Whether all processes, which must all call this, have the same value."""
        return not self.any_process(self._over_replicas(value) != value * self.replicas)

    def _over_replicas(self, value: float) -> float:
        """The sum of the values of all replicas; each has that of its process."""
        if self.processes == 1:
            return float(value) * self.replicas
        total = self._total(tf.constant(value, tf.float64))
        return float(self.strategy.experimental_local_results(total)[0])

    # --- The step --------------------------------------------------------------------------

    def _gradients(self, images: Any, labels: Any) -> tuple[Any, list]:
        """Loss and gradients of a chunk: its part of the global batch's mean."""
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            losses = per_example_loss(self.recipe.loss, labels, logits)
            loss = tf.reduce_sum(losses) / self.recipe.batch_size
        return loss, tape.gradient(loss, [v.value for v in self.model.trainable_variables])

    def _accumulate_step(self, images: Any, labels: Any) -> None:
        def on_replica(images: Any, labels: Any) -> None:
            loss, gradients = self._gradients(images, labels)
            for total, value in zip(self._sums, [loss, *gradients], strict=True):
                total.assign_add(value)

        self.strategy.run(on_replica, args=(images, labels))

    def _update_step(self, images: Any, labels: Any) -> tuple[Any, Any]:
        def on_replica(images: Any, labels: Any) -> tuple[Any, Any]:
            loss, gradients = self._gradients(images, labels)
            parts = [loss, *gradients]
            if self._sums:
                parts = [s.read_value() + p for s, p in zip(self._sums, parts, strict=True)]
                for total in self._sums:
                    total.assign(tf.zeros_like(total))
            context = tf.distribute.get_replica_context()
            loss, *gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, parts)
            norm = tf.linalg.global_norm(gradients)
            if self.recipe.clip_norm is not None:
                gradients, _ = tf.clip_by_global_norm(gradients, self.recipe.clip_norm, norm)
            self.optimizer.apply(gradients, self.model.trainable_variables)
            return loss, norm

        results = self.strategy.run(on_replica, args=(images, labels))
        self._update_averages()
        return tuple(self.strategy.experimental_local_results(part)[0] for part in results)

    def _predict_step(self, images: Any, labels: Any, weights: Any) -> tuple:
        def on_replica(images: Any, labels: Any, weights: Any) -> tuple:
            logits = tf.cast(self.model(images, training=False), tf.float32)
            _, top = tf.math.top_k(logits, min(5, logits.shape[-1]))
            truth = tf.one_hot(labels, logits.shape[-1])
            return labels, top, per_example_loss(self.recipe.loss, truth, logits), weights

        results = self.strategy.run(on_replica, args=(images, labels, weights))
        return tuple(self.strategy.gather(part, axis=0) for part in results)

    # --- The average of the weights ----------------------------------------------------------

    def _make_averages(self) -> list[tf.Variable]:
        """One for each floating-point variable: also BatchNorm's statistics, which belong to it."""
        if self.recipe.ema is None:
            return []
        self._averaged = [v.value for v in self.model.weights if "float" in v.dtype]
        return [tf.Variable(v.read_value(), trainable=False) for v in self._averaged]

    def _update_averages(self) -> None:
        if not self._averages:
            return
        share = momentum_at(self.optimizer.iterations, self.recipe.ema)

        def mix(average: tf.Variable, value: Any, share: Any) -> None:
            average.assign(value + (average - value) * share)

        extended = self.strategy.extended
        for average, variable in zip(self._averages, self._averaged, strict=True):
            extended.update(average, mix, args=(variable, share), group=False)

    def _swap_step(self) -> None:
        """Exchanges weights and averages, bit for bit."""

        def exchange(average: tf.Variable, variable: tf.Variable) -> None:
            old_average, old_value = tf.identity(average), tf.identity(variable)
            with tf.control_dependencies([old_average, old_value]):
                average.assign(old_value)
                variable.assign(old_average)

        extended = self.strategy.extended
        for average, variable in zip(self._averages, self._averaged, strict=True):
            extended.update(average, exchange, args=(variable,), group=False)

    # --- Where things are ----------------------------------------------------------------------

    def _make_sums(self) -> list[tf.Variable]:
        """Accumulators of the loss and the gradients; each replica has its own."""
        if self.recipe.gradient_accumulation_steps == 1:
            return []
        shapes = [(), *(v.shape for v in self.model.trainable_variables)]
        return [
            tf.Variable(
                tf.zeros(shape),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            for shape in shapes
        ]

    def _variables(self) -> dict[str, Any]:
        named = named_variables(self.model, self.optimizer)
        return named | numbered("average", self._averages)

    def _total_over_replicas(self, value: Any) -> Any:
        def on_replica(value: Any) -> Any:
            context = tf.distribute.get_replica_context()
            value = tf.identity(value)  # on the replica's device, as all_reduce wants it
            return context.all_reduce(tf.distribute.ReduceOp.SUM, value)

        return self.strategy.run(on_replica, args=(value,))
