"""Rematerialization: a training step keeps a block's input, and computes the block twice.

The gradients need what is computed inside a block. Kept for all blocks, it is most of a training
step's memory. Kept for one block at a time, it costs a second forward computation.

Keras's own `RematScope` does not fit blocks with state. In Keras 3.15 a training step raises: on
TensorFlow because of the keyword `training`, on JAX because `training` becomes a traced value.
Where a layer is called without it, BatchNorm's statistics and the random seeds are updated by both
computations, and the second one drops other samples than the first. Here a block is a pure function
of its input and variables, as `keras.remat` expects, and the state is assigned once, outside.

The step keeps the stem and the head as without rematerialization, and the input of each block. In
the backward pass, the inside of one block at a time is added. On JAX, XLA's compiler for CPUs
merges the two computations again (its pass `cse`), so nothing is gained there. Measurements are in
`benchmarks/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable

import keras

from keras_coatnet.layers import ConvNeXtBlock, MBConv, TransformerBlock
from keras_coatnet.types import Tensor

_BLOCKS = (MBConv, ConvNeXtBlock, TransformerBlock)


def remat(model: keras.Model) -> int:
    """Makes training compute a model's blocks twice, instead of keeping what is inside them.

    It takes less memory and more time. Outputs, gradients, moving statistics and random draws do
    not change, nor do variables, weights files, configuration and inference. A saved model does not
    keep the setting: call `remat` again after loading. Call it before the first training step,
    which compiles the blocks.

    Args:
        model: a CoAtNet, or a functional model with blocks of one.

    Returns:
        The number of blocks that are computed twice.

    Raises:
        ValueError: it is not a Keras model, or has no block of a CoAtNet.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> remat(CoAtNet(config, input_shape=(64, 64, 3), classes=10))
        5
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a Keras model. Received: model of type {type(model).__name__}"
        )
    blocks = [layer for layer in model.layers if isinstance(layer, _BLOCKS)]
    if not blocks:
        raise ValueError(
            f"The model {model.name!r} has no MBConv, ConvNeXtBlock or TransformerBlock to "
            "compute twice. Give the CoAtNet itself, or a functional model of its layers."
        )
    for block in blocks:
        if not isinstance(block.call, _TwiceComputed):  # `remat` was called before
            block.call = _TwiceComputed(block)
    return len(blocks)


class _TwiceComputed:
    """Replaces the `call` of a block."""

    def __init__(self, block: keras.layers.Layer) -> None:
        self._call = block.call
        self._pure = _Uncast(lambda x: _compute_twice(block, self._call, x))

    def __call__(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self._pure(x) if training else self._call(x, training=training)


class _Uncast(keras.layers.Layer):
    """Calls a function without Keras's automatic cast of variables to the compute dtype.

    `_compute_twice` reads the variables of a whole block, whose sublayers may have other dtypes.
    Each sublayer casts its own variables.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(autocast=False)
        self._function = function
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        return self._function(x)


def _compute_twice(block: keras.layers.Layer, call: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Calls a block as a pure function under `keras.remat`, and assigns its state once."""
    trainable, state = block.trainable_variables, block.non_trainable_variables
    # Copies: on TensorFlow and torch, the second computation would read the variables themselves
    # after their state was assigned, and gradients would not reach them as arguments.
    before = [keras.ops.copy(variable) for variable in state]
    changed = []

    def compute(x: Tensor, *values: Tensor) -> tuple:
        mapping = [*zip(trainable, values, strict=True), *zip(state, before, strict=True)]
        with keras.StatelessScope(mapping) as scope:
            given = [scope.get_current_value(variable) for variable in state]
            y = call(x, training=True)
            after = [scope.get_current_value(variable) for variable in state]
        # Those that change are the same in both computations. Frozen layers change nothing.
        changed[:] = [
            variable
            for variable, old, new in zip(state, given, after, strict=True)
            if new is not old
        ]
        new_values = [new for old, new in zip(given, after, strict=True) if new is not old]
        # Otherwise TensorFlow computes gradients through them too, all zero.
        return y, *map(keras.ops.stop_gradient, new_values)

    values = [keras.ops.copy(variable) for variable in trainable]
    y, *after = keras.remat(compute)(x, *values)
    for variable, value in zip(changed, after, strict=True):
        variable.assign(value)
    return y
