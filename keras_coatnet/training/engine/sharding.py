"""Data and model parallelism by `keras.distribution`, on JAX.

A model that is too large for one device is split inside its blocks, as in Megatron-LM (Shoeybi et
al., 2019, section 3). Each device holds a share of the channels between a block's first layer,
which widens, and its last, which narrows: of the output channels of the first, of the input
channels of the last, and of all that is between. Attention is split by heads. So each branch of a
block needs one exchange, the sum of its outputs. `config.py` says which channels these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_coatnet.architectures import find_architecture
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.counting.variables import check_split, variables


def layout_map(
    architecture: str | CoAtNetConfig,
    device_mesh: keras.distribution.DeviceMesh,
) -> keras.distribution.LayoutMap:
    """Returns which axis of which variable is split over the devices.

    Norms of the blocks' inputs, shortcuts, the stem and the biases of narrowing layers are not.
    A plain `keras.distribution.ModelParallel` with this map needs sizes that the mesh divides. The
    one that `model_parallel` returns keeps other variables whole.

    Args:
        architecture: what will be split: a name or a `CoAtNetConfig`.
        device_mesh: the devices, with an axis `"model"` over which models are split.

    Returns:
        A `keras.distribution.LayoutMap`, by path of the variable.
    """
    layouts = keras.distribution.LayoutMap(device_mesh)
    for pattern, (rank, split_axis) in split_axes(find_architecture(architecture)).items():
        axes: list[str | None] = [None] * rank
        axes[split_axis] = "model"
        layouts[pattern] = tuple(axes)  # pyright: ignore[reportArgumentType]  # Keras takes both
    return layouts


def split_axes(config: CoAtNetConfig) -> dict[str, tuple[int, int]]:
    """Returns the rules by which the variables of a network are split.

    Args:
        config: the network.

    Returns:
        By regular expression for the variable's path: how many axes it has, and which is split.
        A variable of a block has one rule for all blocks.

    Example:
        >>> split_axes(find_architecture("coatnet0"))[".*/expand/kernel"]
        (4, -1)
    """
    blocks = {block.name for block in config.blocks()}
    rules = {}
    for variable in variables(config):
        if variable.split_axis is not None:
            layer, _, rest = variable.path.partition("/")
            pattern = f".*/{rest}" if layer in blocks else variable.path
            rules[pattern] = len(variable.shape), variable.split_axis
    return rules


def data_parallel(devices: Sequence[str] | None = None) -> keras.distribution.DataParallel:
    """Gives each device the whole model and a share of the batch.

    Args:
        devices: names such as `"gpu:0"`; None: all of the machine's, or of all processes'.

    Returns:
        A `keras.distribution.DataParallel` for `keras.distribution.set_distribution`. Each process
        must give it its own share of the data.

    Raises:
        ValueError: Keras does not run on JAX, or there are no such devices.

    Example:
        On JAX:

        keras.distribution.set_distribution(data_parallel())
    """
    return keras.distribution.DataParallel(devices=_devices(devices), auto_shard_dataset=False)


def model_parallel(
    shape: tuple[int, int],
    architecture: str | CoAtNetConfig,
) -> keras.distribution.ModelParallel:
    """Splits the model over a group of devices, and the batch over the groups.

    Optimizer moments and averaged weights are split as their variables are.

    Args:
        shape: how many groups, and how many devices in each. `(2, 4)` makes two groups of four
            devices, and each group holds a model.
        architecture: what will be split: a name or a `CoAtNetConfig`. The devices of a group must
            divide its attention heads.

    Returns:
        A `keras.distribution.ModelParallel`, to be set before the model is built. Variables whose
        size the group does not divide stay whole on each device.

    Raises:
        ValueError: Keras does not run on JAX, the shape is not that of the devices, or it does
            not divide the heads.

    Example:
        On JAX and eight devices:

        keras.distribution.set_distribution(model_parallel((2, 4), "coatnet6"))
        model = keras_coatnet.CoAtNet6(weights=None)
    """
    devices = _devices(None)
    whole = len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape)
    if not whole or shape[0] * shape[1] != len(devices):
        raise ValueError(
            f"`shape` must be (groups, devices in each), for {len(devices)} devices in all. "
            f"Received: shape={shape!r}"
        )
    check_split(find_architecture(architecture), shape[1])
    mesh = keras.distribution.DeviceMesh(tuple(shape), ("batch", "model"), devices)
    return _WhereDivisible(
        layout_map=layout_map(architecture, mesh), batch_dim_name="batch", auto_shard_dataset=False
    )


class _WhereDivisible(keras.distribution.ModelParallel):
    """Keeps variables whole whose size the model axis does not divide."""

    def get_variable_layout(self, variable: Any) -> Any:
        layout = super().get_variable_layout(variable)
        # A variable that follows another, such as a moment, comes with JAX's layout.
        if isinstance(layout, keras.distribution.TensorLayout):
            counts = dict(zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True))
            sizes = zip(variable.shape, layout.axes, strict=True)
            if any(axis is not None and size % counts[axis] for size, axis in sizes):
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
