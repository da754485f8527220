"""Computes from a configuration what a training step keeps in a device's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from keras_coatnet.architectures import find_architecture
from keras_coatnet.arguments import choice
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.counting.variables import Map, check_split, parts_and_maps, variables
from keras_coatnet.sublayers import Sublayer

# Bytes of an activation, by dtype policy.
_ACTIVATION_BYTES = {"float32": 4, "mixed_bfloat16": 2, "mixed_float16": 2}

# A GELU is several operations, of which two keep a tensor besides its input and output. With these,
# the estimate is within a quarter of what TensorFlow's steps keep on GPUs. On CPUs, where layers
# compile their activations, neither of the two is kept.
_GELU_TENSORS = 2


@dataclass(frozen=True)
class Memory:
    """What a training step keeps in the memory of one device, in bytes.

    Attributes:
        parameters: weights and moving statistics, float32.
        gradients: the gradients of the weights, float32.
        moments: AdamW's two moments of each weight.
        average: the moving average of the weights.
        copies: copies of the weights in half precision; 0 in float32.
        activations: an estimate, within about a quarter, of the tensors that the gradients need. On
            CPUs, where TensorFlow compiles activations, a third less is needed.
        rematerialized: the same if the blocks are rematerialized
            (`keras_coatnet.training.engine.remat`).
    """

    parameters: int
    gradients: int
    moments: int
    average: int
    copies: int
    activations: int
    rematerialized: int

    def total(self, remat: bool = False) -> int:
        """Returns the sum of all.

        Args:
            remat: whether blocks are rematerialized: `rematerialized` is added instead of
                `activations`.

        Returns:
            Bytes.
        """
        fixed = self.parameters + self.gradients + self.moments + self.average + self.copies
        return fixed + (self.rematerialized if remat else self.activations)


def memory_per_device(
    architecture: str | CoAtNetConfig,
    shape: tuple[int, int] = (1, 1),
    input_shape: tuple[int, int, int] = (224, 224, 3),
    batch_per_device: int = 8,
    dtype_policy: str = "mixed_bfloat16",
    use_ema: bool = True,
    classes: int = 1000,
) -> Memory:
    """Computes what a training step keeps in the memory of one device.

    Args:
        architecture: a name from `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        shape: (number of groups of devices, devices in each group), as for
            `training.engine.sharding.model_parallel`. Each device of a group holds a part of the
            model.
        input_shape: (height, width, channels) in pixels.
        batch_per_device: images in a group's share of the batch, which all devices of the group
            compute.
        dtype_policy: `"float32"`, `"mixed_bfloat16"` or `"mixed_float16"`.
        use_ema: whether a moving average of the weights is kept.
        classes: outputs of the classifier.

    Returns:
        A `Memory`. All fields are exact except the activations. The memory of the framework and of
        the input pipeline is not included.

    Raises:
        ValueError: there is no such architecture or dtype policy, or the attention heads cannot be
            divided among the devices of a group.

    Example:
        >>> memory = memory_per_device("coatnet7", (2, 4), batch_per_device=1)
        >>> round(memory.parameters / 2**30, 2)
        2.3
    """
    config = find_architecture(architecture)
    choice("dtype_policy", dtype_policy, tuple(_ACTIVATION_BYTES))
    num_shards = shape[1]
    check_split(config, num_shards)
    weights = state = 0
    for variable in variables(config, input_shape, classes):
        size = 4 * math.prod(variable.shard_shape(num_shards))
        weights += size if variable.trainable else 0
        state += 0 if variable.trainable else size
    size = _ACTIVATION_BYTES[dtype_policy]
    plain, rematerialized = _activations(config, input_shape, num_shards, size)
    return Memory(
        parameters=weights + state,
        gradients=weights,
        moments=2 * weights,
        average=weights if use_ema else 0,
        copies=weights // 2 if size == 2 else 0,
        activations=batch_per_device * plain,
        rematerialized=batch_per_device * rematerialized,
    )


# --- Activations -----------------------------------------------------------------------------


def _activations(
    config: CoAtNetConfig, input_shape: tuple[int, int, int], num_shards: int, size: int
) -> tuple[int, int]:
    """Returns the bytes kept for one image on one device, without and with rematerialization."""
    stem, *blocks, _ = parts_and_maps(config, input_shape, None)
    outside = sum(_kept(sublayer, stem[1], num_shards, size) for sublayer in stem[0].sublayers)
    inside = []
    for block, sizes in blocks:
        outside += size * block.filters_in * math.prod(sizes.before)
        # The last sublayer is the sum, which is counted as the input of the next block.
        inside.append(sum(_kept(each, sizes, num_shards, size) for each in block.sublayers[:-1]))
    outside += size * config.output_filters * math.prod(blocks[-1][1].after)
    return outside + sum(inside), outside + max(inside)


def _kept(sublayer: Sublayer, sizes: Map, num_shards: int, size: int) -> int:
    """Returns the bytes of a sublayer's output, which the next sublayer's gradients need."""
    if sublayer.place not in ("input", "output"):
        return 0  # vectors and offsets are small compared with maps
    filters, positions = sublayer.filters, sizes.positions(sublayer)
    if sublayer.split == "filters" and filters % num_shards == 0:
        filters //= num_shards
    if sublayer.kind == "attention_weights":
        # Logits and weights are float32; in half precision a copy of the weights is kept, too.
        return filters * positions**2 * (2 * 4 + (size if size < 4 else 0))
    tensors = 1 + _GELU_TENSORS if sublayer.kind == "activation" else 1
    return size * tensors * filters * positions
