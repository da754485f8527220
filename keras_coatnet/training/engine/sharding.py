"""Data and model parallelism by `keras.distribution`, on JAX.

A model that outgrows a device is split along the inside of its blocks, as in Megatron-LM (Shoeybi
et al., 2019, section 3): the layer that widens holds its share of the output channels, the layer
that narrows the same share of its input channels, and what stands between works on that share
alone. So each branch of a block exchanges its outputs once, in their sum.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras

from keras_coatnet.architectures import find_architecture
from keras_coatnet.config import CoAtNetConfig

_NORM = "(gamma|beta|moving_mean|moving_variance)"

# Paths of variables, and which of their axes is split (counted from the last, -1).
_SPLIT = {
    # MBConv: everything between the two 1x1 convolutions is split by channel.
    r".*/expand/kernel": (4, -1),
    rf".*/(expand|depthwise)_norm/{_NORM}": (1, -1),
    r".*/depthwise/kernel": (4, -2),
    r".*/squeeze_excite/squeeze/kernel": (2, -2),
    r".*/squeeze_excite/excite/kernel": (2, -1),
    r".*/squeeze_excite/excite/bias": (1, -1),
    r".*/project/kernel": (4, -2),
    # Attention is split by head.
    r".*/attention/(query|key|value)/kernel": (2, -1),
    r".*/attention/(query|key|value)/bias": (1, -1),
    r".*/attention/position/table": (3, -3),
    r".*/attention/position/values/kernel": (2, -1),
    r".*/attention/position/values/bias": (1, -1),
    r".*/attention/projection/kernel": (2, -2),
    # The feed-forward part and the head, by hidden channel.
    r".*/ffn_expand/kernel": (2, -1),
    r".*/ffn_expand/bias": (1, -1),
    r".*/ffn_project/kernel": (2, -2),
    r"hidden/kernel": (2, -1),
    r"hidden/bias": (1, -1),
    r"predictions/kernel": (2, -2),
}


def layout_map(
    device_mesh: keras.distribution.DeviceMesh, model_axis: str = "model"
) -> keras.distribution.LayoutMap:
    """Says which axis of which variable of a CoAtNet is split over the devices.

    Norms of the blocks' inputs, shortcuts, the stem and the biases of narrowing layers are not.
    A plain `keras.distribution.ModelParallel` with this map needs sizes that the mesh divides;
    the one that `model_parallel` makes leaves other variables whole.

    Args:
        device_mesh: the devices.
        model_axis: the mesh's axis over which models are split.

    Returns:
        A `keras.distribution.LayoutMap`, by path of the variable.

    Raises:
        ValueError: the mesh has no such axis.
    """
    if model_axis not in device_mesh.axis_names:
        raise ValueError(
            f"The mesh has the axes {', '.join(map(repr, device_mesh.axis_names))}. "
            f"Received: model_axis={model_axis!r}"
        )
    layouts = keras.distribution.LayoutMap(device_mesh)
    for pattern, (rank, axis) in _SPLIT.items():
        axes = [None] * rank
        axes[axis] = model_axis
        layouts[pattern] = tuple(axes)
    return layouts


def part_shape(path: str, shape: Sequence[int], parts: int) -> tuple[int, ...]:
    """The shape of one device's part of a variable.

    Args:
        path: the variable's, e.g. `"stage1_block1/expand/kernel"`.
        shape: of the whole.
        parts: devices along the model axis.

    Returns:
        A shape; that of the whole where the variable is not split.

    Example:
        >>> part_shape("stage1_block1/expand/kernel", (1, 1, 192, 768), 4)
        (1, 1, 192, 192)
    """
    shape = list(shape)
    for pattern, (_, axis) in _SPLIT.items():
        if re.fullmatch(pattern, path) and shape[axis] % parts == 0:
            shape[axis] //= parts
    return tuple(shape)


def data_parallel(
    devices: Sequence[str] | None = None, batch_size: int | None = None
) -> keras.distribution.DataParallel:
    """Whole models on every device, each with its share of the batch.

    Args:
        devices: names such as `"gpu:0"`; None: all of the machine's, or of all processes'.
        batch_size: images of a step, to be checked; None: not known.

    Returns:
        A `keras.distribution.DataParallel` for `keras.distribution.set_distribution`. Each process
        must give it its own share of the data.

    Raises:
        ValueError: Keras does not run on JAX, or the devices do not divide the batch.

    Example, on JAX:
        keras.distribution.set_distribution(data_parallel(batch_size=256))
    """
    devices = _devices(devices)
    _check_batch(batch_size, len(devices))
    return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)


def model_parallel(
    shape: tuple[int, int],
    architecture: str | CoAtNetConfig,
    devices: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> keras.distribution.ModelParallel:
    """Models split over groups of devices, each group with its share of the batch.

    Optimizer moments and averaged weights are split as their variables are.

    Args:
        shape: groups, and devices in each: `(2, 4)` splits a model over four devices, twice.
        architecture: what will be split: a name or a `CoAtNetConfig`; its heads must divide.
        devices: names such as `"gpu:0"`; None: all.
        batch_size: images of a step, to be checked; None: not known.

    Returns:
        A `keras.distribution.ModelParallel`, to be set before the model is built. Variables that
        the group does not divide stay whole on each device.

    Raises:
        ValueError: Keras does not run on JAX, the shape is not that of the devices, or it does
            not divide the heads or the batch.

    Example, on JAX and eight devices:
        keras.distribution.set_distribution(model_parallel((2, 4), "coatnet6"))
        model = keras_coatnet.CoAtNet6()
    """
    devices = _devices(devices)
    whole = len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape)
    if not whole or shape[0] * shape[1] != len(devices):
        raise ValueError(
            f"`shape` must be (groups, devices in each), for {len(devices)} devices in all. "
            f"Received: shape={shape!r}"
        )
    check_heads(find_architecture(architecture), shape[1])
    _check_batch(batch_size, shape[0])
    mesh = keras.distribution.DeviceMesh(tuple(shape), ("batch", "model"), devices)
    return _WhereDivisible(
        layout_map=layout_map(mesh), batch_dim_name="batch", auto_shard_dataset=False
    )


class _WhereDivisible(keras.distribution.ModelParallel):
    """Leaves variables whole whose size the model axis does not divide."""

    def get_variable_layout(self, variable: Any) -> Any:
        layout = super().get_variable_layout(variable)
        # A variable that follows another, such as a moment, comes with JAX's layout.
        if isinstance(layout, keras.distribution.TensorLayout):
            parts = dict(zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True))
            sizes = zip(variable.shape, layout.axes, strict=True)
            if any(axis is not None and size % parts[axis] for size, axis in sizes):
                return keras.distribution.TensorLayout(
                    (None,) * len(variable.shape), layout.device_mesh
                )
        return layout


def _devices(devices: Sequence[str] | None) -> list[str]:
    if keras.backend.backend() != "jax":
        raise ValueError(
            "keras.distribution runs on JAX: set the environment variable KERAS_BACKEND=jax. This "
            f"is {keras.backend.backend()!r}, whose strategies are in tf.distribute."
        )
    found = keras.distribution.list_devices()
    if devices is None:
        return found
    unknown = [device for device in devices if device not in found]
    if unknown or not devices:
        raise ValueError(f"`devices` must be among {', '.join(found)}. Received: {list(devices)}")
    return list(devices)


def _check_batch(batch_size: int | None, shares: int) -> None:
    if batch_size is not None and (batch_size < 1 or batch_size % shares):
        raise ValueError(
            f"A batch of {batch_size} images cannot be shared out evenly among {shares}. Take a "
            f"multiple of {shares}, such as {max(1, round(batch_size / shares)) * shares}."
        )


def check_heads(config: CoAtNetConfig, parts: int) -> None:
    """Refuses to split a network over a number of devices that its heads cannot be shared out to.

    Args:
        config: the network.
        parts: devices along the model axis.

    Raises:
        ValueError: it does not divide the heads of one of the blocks.
    """
    for block in config.blocks():
        width = block.width if config.attention_from == "output" else block.width_in
        heads = width // config.head_dim
        if block.kind == "T" and heads % parts:
            raise ValueError(
                f"The {heads} attention heads of {block.name} cannot be shared out evenly among "
                f"{parts} devices. Split the model over a number that divides them."
            )
