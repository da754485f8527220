"""Rematerialization: a training step keeps a block's input, and computes the block twice.

The gradients need what is computed inside a block. Kept for all blocks, that is most of a training
step's memory; kept for one block at a time, it takes a second forward computation.

Keras's own `RematScope` does not fit blocks with state. In Keras 3.15 a training step raises, on
TensorFlow for the keyword `training`, on JAX because `training` becomes a traced value; and where a
layer is called without it, its BatchNorm statistics and random seeds would move on in the second
computation as in the first, so that other samples would be dropped in it. Here a block is a pure
function of its input and variables, which `keras.remat` is made for; what the first computation
made of its state is assigned once, outside.

What is kept is decided by the program: the stem and the head as without, and one tensor for each
block, its input. For CoAtNet-0 at 224 pixels, batch 8 and float32, TensorFlow's step keeps 221 MB
from the forward to the backward pass instead of 1,529 (2,466 where a GELU is several operations,
as on GPUs; read off the traced step). In the backward pass the inside of one block at a time comes
on top.

By how much a process grows in that step depends on the processor, too. On x86 TensorFlow uses
oneDNN where there are instructions for neural networks (AVX512-VNNI, AVX512-BF16, AVX-VNNI, AMX),
and then an allocator of its own; without, it uses plain malloc, which keeps much of what is freed.
The same step, measured once each on two cores with AMX; resident memory beyond what was resident
before the step:

    as it is                        449 MB instead of 1,275
    ONEDNN_MAX_CPU_ISA=AVX2         479 MB instead of 1,248
    TF_ENABLE_ONEDNN_OPTS=0         605 MB instead of 1,186

In the last, blocks of 580 MB instead of 1,543 were in use at the peak; part of the plain step's
were resident already. A small network without oneDNN took 243 to 336 MB instead of 400, and 175
with the environment variable MALLOC_MMAP_THRESHOLD_=65536, under which malloc returns every large
block at once. A step takes about a fifth more processor time.

On JAX an eighth is kept for the gradients, but XLA's compiler for CPUs merges the two computations
again (its pass `cse`), so that nothing is gained there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_coatnet.layers import ConvNeXtBlock, MBConv, TransformerBlock

_BLOCKS = (MBConv, ConvNeXtBlock, TransformerBlock)


def remat(model: keras.Model) -> int:
    """Lets the training steps of a model compute its blocks twice instead of keeping them.

    Outputs, gradients, moving statistics and random draws are those of the same model without, and
    so are variables, weights files and configuration: a saved model has to be told again. Inference
    does not change. Call it before the first training step, as that is when the step is compiled.

    Args:
        model: a CoAtNet, or a functional model that has its blocks.

    Returns:
        How many blocks were told.

    Raises:
        ValueError: it is no Keras model, or has no block of a CoAtNet.

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
            "remat. Give the CoAtNet itself, or a functional model of its layers."
        )
    for block in blocks:
        if not isinstance(block.call, _TwiceComputed):  # a model may be told twice
            block.call = _TwiceComputed(block)
    return len(blocks)


class _TwiceComputed:
    """Stands for the `call` of a block."""

    def __init__(self, block: keras.layers.Layer) -> None:
        self._call = block.call
        self._pure = _Uncast(lambda x: _compute_twice(block, self._call, x))

    def __call__(self, x: Any, training: bool | None = None) -> Any:
        return self._pure(x) if training else self._call(x, training=training)


class _Uncast(keras.layers.Layer):
    """Calls a function outside of the scope in which Keras reads variables in half precision.

    A block's variables are read here for layers of several precisions, each of which casts its own.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__(autocast=False)
        self._function = function
        self.built = True

    def call(self, x: Any) -> Any:
        return self._function(x)


def _compute_twice(block: keras.layers.Layer, call: Callable[..., Any], x: Any) -> Any:
    learnt, state = block.trainable_variables, block.non_trainable_variables
    # Copies: on TensorFlow and torch the variables themselves would be read again the second time,
    # when the state has been assigned, and gradients would not reach them as arguments.
    before = [keras.ops.copy(variable) for variable in state]
    changed = []

    def compute(x: Any, *values: Any) -> tuple:
        mapping = [*zip(learnt, values, strict=True), *zip(state, before, strict=True)]
        with keras.StatelessScope(mapping) as scope:
            given = [scope.get_current_value(variable) for variable in state]
            y = call(x, training=True)
            after = [scope.get_current_value(variable) for variable in state]
        # Which they are is the same each time; frozen layers among them do not change.
        changed[:] = [
            variable
            for variable, old, new in zip(state, given, after, strict=True)
            if new is not old
        ]
        new_values = [new for old, new in zip(given, after, strict=True) if new is not old]
        # TensorFlow would go back through them too, with gradients of zero.
        return y, *map(keras.ops.stop_gradient, new_values)

    values = [keras.ops.copy(variable) for variable in learnt]
    y, *after = keras.remat(compute)(x, *values)
    for variable, value in zip(changed, after, strict=True):
        variable.assign(value)
    return y
