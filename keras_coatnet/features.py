"""What is inside a network: the maps of its stages, of its blocks, and of the parts of these.

The tensors are those of the model itself, wherever a CoAtNet is in it: alone, fused, or inside
models of a user's own, at any depth. New models share the weights, so that they can be trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.layers.identity import NetworkIdentity
from keras_coatnet.model import Identity
from keras_coatnet.names import BLOCK_ENDS, STEM_CONV2, stage_of
from keras_coatnet.types import Tensor


def feature_pyramid(model: keras.Model) -> keras.Model:
    """Builds a model that gives the last map of each size, for detection and segmentation.

    Args:
        model: a CoAtNet, with or without top, plain or fused, or a functional or sequential model
            with one inside.

    Returns:
        A `keras.Model` with the inputs and the weights of `model`. Its output is a dictionary:
        `"P1"` is the stem's map, `(batch, ceil(height / 2), ceil(width / 2), filters)`, and `"P2"`
        to `"P5"` are those of the stages, each half as large as the one before. A norm after the
        last stage is no part of `"P5"`.

    Raises:
        ValueError: there is no CoAtNet in the model's graph, or more than one.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> backbone = CoAtNet(config, include_top=False, input_shape=(64, 96, 3))
        >>> pyramid = feature_pyramid(backbone)
        >>> {name: map.shape[1:] for name, map in pyramid.output.items() if name in ("P1", "P5")}
        {'P1': (32, 48, 16), 'P5': (2, 3, 256)}
    """
    graph = flatten(model)
    outputs, level = {"P1": graph.find(STEM_CONV2).after}, 1
    for block in graph.architecture.blocks():
        level += block.strides == 2
        outputs[f"P{level}"] = graph.find(block.name).after
    return keras.Model(graph.inputs, outputs, name=f"{model.name}_pyramid")


def feature_extractor(model: keras.Model, layers: Sequence[str]) -> keras.Model:
    """Builds a model that gives what layers inside another compute.

    Args:
        model: a CoAtNet, or a functional or sequential model with one inside.
        layers: names. `"stage3"` is the last block of a stage, `"stage3_block2"` is a block,
            `"stage3_block2/attention"` and `"stage1_block1/depthwise"` are parts of a block, named
            by its attributes. Any other layer of the model goes by its name. A fused network has
            layers for parts, such as `"stage3_block2_attention"`, with what was folded into them.

    Returns:
        A `keras.Model` with the inputs and the weights of `model`, whose output is a dictionary
        with these names.

    Raises:
        ValueError: there is no layer of that name, or more than one, or not one CoAtNet.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3))
        >>> inside = feature_extractor(model, ["stage3_block2/attention", "avg_pool"])
        >>> {name: map.shape for name, map in inside.output.items()}
        {'stage3_block2/attention': (None, 4, 4, 128), 'avg_pool': (None, 256)}
    """
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers) or not layers:
        raise ValueError(f"`layers` must be a list of names of layers. Received: {layers!r}")
    graph = flatten(model, [name.partition("/")[0] for name in layers if "/" in name])
    outputs = {name: graph.find(name).after for name in layers}
    return keras.Model(graph.inputs, outputs, name=f"{model.name}_features")


class Call(NamedTuple):
    """A layer in a graph, with the tensor that it gets and the one that it gives."""

    layer: Any
    before: Tensor
    after: Tensor


@dataclasses.dataclass(frozen=True)
class Graph:
    """All layers of a model with one CoAtNet inside, in one graph.

    Attributes:
        inputs: the input.
        outputs: the output.
        calls: the calls of each layer, by its name; of parts of blocks, by `"block/part"`.
        architecture: the network's configuration.
    """

    inputs: keras.KerasTensor
    outputs: Tensor
    calls: dict[str, list[Call]]
    architecture: CoAtNetConfig

    def find(self, name: str) -> Call:
        """Returns the call of a layer.

        Args:
            name: as `feature_extractor` takes it.

        Raises:
            ValueError: there is no layer of that name, or it is called more than once.
        """
        blocks = [block.name for block in self.architecture.blocks()]
        last = {f"stage{stage_of(block)}": block for block in blocks}
        wanted = last.get(name, name)
        # In a fused network a block is several layers.
        names = (wanted + end for end in BLOCK_ENDS)
        found = next((self.calls[each] for each in names if each in self.calls), [])
        if not found:
            block = wanted.partition("/")[0]
            parts = sorted(
                each for each in self.calls if each.startswith((f"{block}/", f"{block}_"))
            )
            raise ValueError(
                f"The model has no layer {name!r}. It has the stages {', '.join(last)}, the blocks "
                f"{', '.join(blocks)}{', and the parts ' if parts else ''}{', '.join(parts)}."
            )
        if len(found) > 1:
            raise ValueError(f"The model calls {name!r} {len(found)} times: it is not one tensor.")
        return found[0]


def flatten(model: keras.Model, split: Sequence[str] = ()) -> Graph:
    """Calls the layers of a model, and of the models inside it, in a graph of their own.

    Args:
        model: a model of one input, with one CoAtNet inside.
        split: names of blocks whose parts are called one by one.

    Returns:
        The `Graph`, which shares the model's layers.

    Raises:
        ValueError: it has no graph, several inputs, or not one CoAtNet inside.
    """
    calls: dict[str, list[Call]] = {}

    def record(name: str, call: Call) -> None:
        calls.setdefault(name, []).append(call)

    def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(operation, keras.Sequential):
            return functools.reduce(lambda x, layer: run(layer, x), operation.layers, args[0])
        if _has_graph(operation):
            # Keras has no public name for this. `clone_model` does it only from new inputs.
            return operation._run_through_graph(args[0], lambda each: each, run)
        if operation.name in split:
            y = operation.call(*args, **kwargs)
            for part in _calls_between(args[0], y):
                record(f"{operation.name}/{part.layer.name}", part)
        else:
            y = operation(*args, **kwargs)
        record(operation.name, Call(operation, args[0] if args else None, y))
        return y

    is_sequential = isinstance(model, keras.Sequential) and model.built
    if not (is_sequential or _has_graph(model)) or len(model.inputs) != 1:
        raise ValueError(
            "The model must be a functional or sequential Keras model of one input, with a CoAtNet "
            f"inside. Received: {type(model).__name__}"
        )
    inputs: Any = keras.Input(batch_shape=model.inputs[0].shape, dtype=model.inputs[0].dtype)
    outputs = run(model, inputs)
    identities = [
        Identity.from_dict(call.layer.identity)
        for found in calls.values()
        for call in found
        if isinstance(call.layer, NetworkIdentity)
    ]
    if len(identities) != 1:
        raise ValueError(
            f"The model must have one CoAtNet inside. {model.name!r} has {len(identities)} in its "
            "graph. Give the CoAtNet itself."
        )
    return Graph(inputs, outputs, calls, identities[0].architecture)


def _has_graph(operation: Any) -> bool:
    """Whether an operation is a functional model, which may be of a user's own class."""
    return isinstance(operation, keras.Model) and hasattr(operation, "_run_through_graph")


def _calls_between(before: Tensor, after: Tensor) -> list[Call]:
    """Returns the calls of layers that one tensor is computed by from another."""
    found, seen, left = [], set(), [after]
    while left:
        tensor = left.pop()
        operation, number, _ = tensor._keras_history
        if tensor is before or (operation, number) in seen:
            continue
        seen.add((operation, number))
        node = operation._inbound_nodes[number]
        left += node.input_tensors
        if isinstance(operation, keras.layers.Layer):
            found.append(Call(operation, node.input_tensors[0], tensor))
    return found
