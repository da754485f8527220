"""The training step on TensorFlow, under any `tf.distribute` strategy.

Keras's `fit` fails under MultiWorkerMirroredStrategy, and Keras's optimizers clip each replica's
gradients before they are summed. So the step is written out here: gradients are summed over the
replicas, clipped by their global norm, and applied. The same code serves one device, several
devices and several machines. It is written for TPUs too, but was never run on one: see `devices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from keras_coatnet.model import CoAtNetModel
from keras_coatnet.training.engine.average import momentum_at
from keras_coatnet.training.engine.base import Engine, EvaluatedBatch, StepConfig
from keras_coatnet.training.engine.losses import per_example_loss
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.training.engine.strategies import count_processes, is_chief
from keras_coatnet.types import Tensor


class TensorFlowEngine(Engine):
    """An engine whose variables live under a `tf.distribute` strategy.

    Args:
        strategy: the strategy.
        make_model: builds the model. It is called in the strategy's scope.
        make_optimizer: builds the optimizer for a model. It is called there too.
        config: what a step computes.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        make_model: Callable[[], CoAtNetModel],
        make_optimizer: Callable[[CoAtNetModel], AdamW],
        config: StepConfig,
    ) -> None:
        self.strategy = strategy
        with strategy.scope():
            super().__init__(make_model, make_optimizer, config)
            self._sums = self._make_sums()
        # The steps have no Python control flow that depends on tensors, for which AutoGraph would
        # search everything that they call.
        self._accumulate = tf.function(self._accumulate_step, autograph=False)
        self._update = tf.function(self._update_step, autograph=False)
        self._evaluate = tf.function(self._evaluate_step, autograph=False)
        self._swap = tf.function(self._swap_step, autograph=False)
        self._total = tf.function(self._total_over_replicas, autograph=False)

    # --- Devices and processes -------------------------------------------------------------

    @property
    def replicas(self) -> int:
        return self.strategy.num_replicas_in_sync

    @property
    def num_chunks(self) -> int:
        return self.replicas  # each replica gets a chunk

    @property
    def processes(self) -> int:
        return count_processes(self.strategy)

    @property
    def is_chief(self) -> bool:
        return is_chief(self.strategy)

    def any_process(self, flag: bool) -> bool:
        return self._over_replicas(float(flag)) > 0

    def same_in_all_processes(self, value: int) -> bool:
        return not self.any_process(self._over_replicas(value) != value * self.replicas)

    def _over_replicas(self, value: float) -> float:
        """The sum of the values of all replicas. Each replica has its process's value."""
        if self.processes == 1:
            return float(value) * self.replicas
        total = self._total(tf.constant(value, tf.float64))
        return float(self.strategy.experimental_local_results(total)[0])

    def _total_over_replicas(self, value: Tensor) -> Tensor:
        def on_replica(value: Tensor) -> Tensor:
            context = tf.distribute.get_replica_context()
            value = tf.identity(value)  # all_reduce needs it on the replica's device
            return context.all_reduce(tf.distribute.ReduceOp.SUM, value)

        return self.strategy.run(on_replica, args=(value,))

    # --- Training --------------------------------------------------------------------------

    def iterate(
        self, num_chunks: int, make_dataset: Callable[[int, int], tf.data.Dataset]
    ) -> Iterator:
        def make(context: tf.distribute.InputContext) -> tf.data.Dataset:
            local_chunks = num_chunks // context.num_input_pipelines
            return make_dataset(context.input_pipeline_id * local_chunks, local_chunks)

        return iter(self.strategy.distribute_datasets_from_function(make))

    def train_step(self, batches: Iterator) -> tuple[Tensor, Tensor]:
        for _ in range(self.config.gradient_accumulation_steps - 1):
            self._accumulate(*next(batches))
        return self._update(*next(batches))

    def read(self, values: list[Tensor]) -> np.ndarray:
        return tf.stack(values).numpy()

    def _accumulate_step(self, images: Tensor, labels: Tensor) -> None:
        def on_replica(images: Tensor, labels: Tensor) -> None:
            for total, part in zip(
                self._sums, self._loss_and_gradients(images, labels), strict=True
            ):
                total.assign_add(part)

        self.strategy.run(on_replica, args=(images, labels))

    def _update_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        def on_replica(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            parts = self._with_sums(self._loss_and_gradients(images, labels))
            context = tf.distribute.get_replica_context()
            loss, *gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, parts)
            norm = tf.linalg.global_norm(gradients)
            if self.config.global_clipnorm is not None:
                gradients, _ = tf.clip_by_global_norm(gradients, self.config.global_clipnorm, norm)
            self.optimizer.apply(gradients, self.model.trainable_variables)
            return loss, norm

        losses, norms = self.strategy.run(on_replica, args=(images, labels))
        self._update_averages()
        # They are the same on all replicas.
        return self._of_one_replica(losses), self._of_one_replica(norms)

    def _of_one_replica(self, values: Tensor) -> Tensor:
        return self.strategy.experimental_local_results(values)[0]

    def _loss_and_gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """What a chunk adds to the mean loss of the global batch, and to its gradients."""
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            losses = per_example_loss(self.config.loss, labels, logits)
            loss = tf.reduce_sum(losses) / self.config.batch_size
        variables = [variable.value for variable in self.model.trainable_variables]
        return [loss, *tape.gradient(loss, variables)]

    def _make_sums(self) -> list[tf.Variable]:
        """Sums of the loss and of the gradients over chunks. Each replica has its own."""
        if self.config.gradient_accumulation_steps == 1:
            return []
        shapes = [(), *(variable.shape for variable in self.model.trainable_variables)]
        return [
            tf.Variable(
                tf.zeros(shape),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            for shape in shapes
        ]

    def _with_sums(self, parts: list[Tensor]) -> list[Tensor]:
        """Adds the sums of the batch's earlier chunks to its last one, and sets them to zero."""
        if not self._sums:
            return parts
        parts = [total.read_value() + part for total, part in zip(self._sums, parts, strict=True)]
        for total in self._sums:
            total.assign(tf.zeros_like(total))
        return parts

    # --- Evaluation ------------------------------------------------------------------------

    def _evaluate_batch(self, images: Tensor, labels: Tensor, weights: Tensor) -> EvaluatedBatch:
        return EvaluatedBatch(*(part.numpy() for part in self._evaluate(images, labels, weights)))

    def _evaluate_step(self, images: Tensor, labels: Tensor, weights: Tensor) -> tuple:
        def on_replica(images: Tensor, labels: Tensor, weights: Tensor) -> tuple:
            logits = tf.cast(self.model(images, training=False), tf.float32)
            classes = logits.shape[-1]
            _, top = tf.math.top_k(logits, min(5, classes))
            losses = per_example_loss(self.config.loss, tf.one_hot(labels, classes), logits)
            return labels, top, losses, weights

        results = self.strategy.run(on_replica, args=(images, labels, weights))
        return tuple(self.strategy.gather(part, axis=0) for part in results)

    # --- The average of the weights --------------------------------------------------------

    @property
    def _averaged(self) -> list[tf.Variable]:
        """The variables that have an average."""
        return [variable.value for variable in self.model.weights if "float" in variable.dtype]

    def _first_averages(self) -> list[tf.Variable]:
        return [tf.Variable(value.read_value(), trainable=False) for value in self._averaged]

    def _set_averages(self, values: list[np.ndarray]) -> None:
        for average, value in zip(self._averages, values, strict=True):
            average.assign(value)

    def _update_averages(self) -> None:
        if self.config.ema_momentum is None:
            return
        momentum = momentum_at(self.optimizer.iterations, self.config.ema_momentum)

        def mix(average: tf.Variable, value: Tensor, momentum: Tensor) -> None:
            average.assign(value + (average - value) * momentum)

        for average, variable in zip(self._averages, self._averaged, strict=True):
            self._on_replicas_of(average, mix, variable, momentum)

    def _swap_averages(self) -> None:
        self._swap()

    def _swap_step(self) -> None:
        def exchange(average: tf.Variable, variable: tf.Variable) -> None:
            old_average, old_value = tf.identity(average), tf.identity(variable)
            with tf.control_dependencies([old_average, old_value]):
                average.assign(old_value)
                variable.assign(old_average)

        for average, variable in zip(self._averages, self._averaged, strict=True):
            self._on_replicas_of(average, exchange, variable)

    def _on_replicas_of(self, variable: tf.Variable, function: Callable, *args: Tensor) -> None:
        """Calls a function for each replica's copy of a variable, on the copy's device."""
        self.strategy.extended.update(variable, function, args=args, group=False)
