"""Where a network looks: Grad-CAM, attention, and relative biases.

All functions take a CoAtNet, plain or fused, or a functional or sequential model with one inside,
and the images that the model takes: raw pixels of 0 to 255, unless it was built with
`include_preprocessing=False`. They return NumPy arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import keras
import numpy as np
from keras import ops

from keras_coatnet.arguments import whole_number
from keras_coatnet.features import Call, Graph, flatten
from keras_coatnet.types import Tensor

# Images that are computed at once.
_BATCH_SIZE = 16


def grad_cam(
    model: keras.Model,
    images: np.ndarray,
    class_index: int | Sequence[int] | None = None,
    layer: str | None = None,
) -> np.ndarray:
    """Computes which regions of images speak for a class (Grad-CAM).

    The channels of a map are weighted by the mean gradient of the class's score, before softmax,
    and added up; what speaks against the class is left out. On maps of few positions, as those of
    small images, this may point beside what decides: compare two stages before you trust it.

    Args:
        model: a classifier with a CoAtNet inside.
        images: `(batch, height, width, channels)`.
        class_index: number of the class, or one for each image; None: the class that the model
            finds.
        layer: whose map: a stage, as `"stage3"`, a block, as `"stage4_block1"`, or another layer
            that all paths to the scores go through; None: the last stage. Lower ones show finer
            detail and less of the class.

    Returns:
        A float32 array `(batch, height, width)`, as large as the images, from 0 to 1: 1 where an
        image speaks most for the class. All zeros where nothing does.

    Raises:
        ValueError: the model is no classifier, the images are not of the shape that it takes, there
            is no such class or layer, the model was quantized by Keras, or the backend computes no
            gradients.

    References:
        - Selvaraju et al., 2017, "Grad-CAM: Visual Explanations from Deep Networks via
          Gradient-based Localization", equations 1 and 2.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> grad_cam(model, np.zeros((2, 64, 64, 3)), class_index=3, layer="stage3").shape
        (2, 64, 64)
    """
    images = _check_images(model, images)
    if layer is not None and not isinstance(layer, str):
        raise ValueError(f"`layer` must be the name of a layer. Received: {layer!r}")
    if any(getattr(each, "quantization_mode", None) for each in model._flatten_layers()):
        raise ValueError(
            f"{model.name!r} was quantized, and Keras computes no gradients of that. Give the "
            "model that it was made from."
        )
    graph = flatten(model)
    layer = layer or [block.name for block in graph.architecture.blocks()][-1]
    target = graph.find(layer).after
    if len(target.shape) != 4:
        raise ValueError(f"`layer` must give a map. {layer!r} gives {target.shape}")
    scores = _logits(graph)
    if len(scores.shape) != 2:
        raise ValueError(f"The model must be a classifier. It gives {scores.shape}")
    body, head = keras.Model(graph.inputs, target), _model_between(target, scores, layer)
    classes = _check_classes(class_index, len(images), scores.shape[-1])

    compute, score, differentiate = _function(body), _function(head), _gradient_function(head)
    maps = []
    for begin, batch in _batches(images):
        features = ops.cast(compute(batch), "float32")
        if classes is None:
            chosen = _to_numpy(score(features)).argmax(axis=-1)
        else:
            chosen = classes[begin : begin + len(batch)]
        gradients = _to_numpy(differentiate(features, chosen))
        weights = gradients.mean(axis=(1, 2), keepdims=True)  # (batch, 1, 1, channels)
        values = (weights * _to_numpy(features)).sum(axis=-1)  # (batch, h, w)
        maps.append(np.maximum(values, 0))
    return _as_large_as(images, np.concatenate(maps))


def attention_maps(model: keras.Model, images: np.ndarray, block: str | None = None) -> np.ndarray:
    """Computes the attention weights of a block (equation 3 of the paper, after the softmax).

    Args:
        model: a model with a CoAtNet inside.
        images: `(batch, height, width, channels)`.
        block: name of a Transformer block, such as `"stage4_block1"`; None: the last one.

    Returns:
        A float32 array `(batch, heads, queries, keys)`, whose last axis sums to 1. Queries and keys
        are the positions of the block's map, row by row.

    Raises:
        ValueError: the block is no Transformer block, or the images are not of the shape that the
            model takes.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3))
        >>> attention_maps(model, np.zeros((1, 64, 64, 3)), "stage3_block1").shape
        (1, 4, 16, 16)
    """
    images = _check_images(model, images)
    graph = flatten(model)
    call = _attention(graph, block)
    compute = _function(keras.Model(graph.inputs, call.before))
    found = [
        _to_numpy(call.layer.attention_weights(compute(batch))) for _, batch in _batches(images)
    ]
    return np.concatenate(found)


def attention_rollout(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Computes how much of each region reaches the end through all layers of attention.

    In each Transformer block, half of what a position becomes counts as its own, for the shortcut,
    and half is what attention brings, the mean over the heads. Where a stage begins, a position
    stands for the 2 x 2 that it covers. The rollout begins at the first block of the last stages
    that have attention alone.

    Args:
        model: a model with a CoAtNet inside.
        images: `(batch, height, width, channels)`.

    Returns:
        A float32 array `(batch, height, width)`, as large as the images, from 0 to 1: 1 where most
        of an image's features come from.

    Raises:
        ValueError: the network has no attention at its end, or the images are not of the shape that
            the model takes.

    References:
        - Abnar and Zuidema, 2020, "Quantifying Attention Flow in Transformers", section 3.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3))
        >>> attention_rollout(model, np.zeros((1, 64, 64, 3))).shape
        (1, 64, 64)
    """
    images = _check_images(model, images)
    graph = flatten(model)
    blocks = list(graph.architecture.blocks())
    while any(block.kind != "T" for block in blocks):
        blocks = blocks[1:]
    if not blocks:
        raise ValueError("The network has no Transformer blocks at its end, whose attention flows.")
    calls = [_attention(graph, block.name) for block in blocks]
    compute = _function(keras.Model(graph.inputs, [call.before for call in calls]))
    sizes = [_map_size(graph, images.shape, block.name) for block in blocks]

    maps = []
    for _, batch in _batches(images):
        rollout: Any = None  # (batch, positions of the last map, positions of the first)
        for number, (call, before) in enumerate(zip(calls, compute(batch), strict=True)):
            weights = _to_numpy(call.layer.attention_weights(before)).mean(axis=1)
            step = (weights + np.eye(weights.shape[-1])) / 2
            if rollout is None:
                rollout = step
                continue
            if blocks[number].strides == 2:
                rollout = _pooling(*sizes[number - 1]) @ rollout
            rollout = step @ rollout
        maps.append(rollout.mean(axis=1).reshape(-1, *sizes[0]))
    return _as_large_as(images, np.concatenate(maps))


def relative_bias(model: keras.Model, block: str | None = None) -> np.ndarray:
    """Returns the relative biases of a block's attention as an image for each head.

    Args:
        model: a model with a CoAtNet inside.
        block: name of a Transformer block, such as `"stage4_block1"`; None: the last one.

    Returns:
        A float32 array `(heads, 2 * height - 1, 2 * width - 1)`, where height and width are those
        of the block's map: the bias of a key `y` below and `x` to the right of its query is at
        `[head, y + height - 1, x + width - 1]`. If the model takes images of any size, it is for
        those of its architecture's size.

    Raises:
        ValueError: the block is no Transformer block.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> relative_bias(CoAtNet(config, input_shape=(64, 64, 3)), "stage3_block1").shape
        (4, 7, 7)
    """
    graph = flatten(model)
    call = _attention(graph, block)
    name = call.layer.name.removesuffix("_attention")
    height, width = _map_size(graph, graph.inputs.shape, name)
    if hasattr(call.layer, "attention"):
        values = call.layer.attention.position.values_of(height, width)
        return _to_numpy(values)
    # A fused block has the biases of all pairs; each offset is that of many.
    pairs = _to_numpy(call.layer.bias).reshape(-1, height, width, height, width)
    down, right = np.arange(1 - height, height)[:, None], np.arange(1 - width, width)[None]
    row, column = np.maximum(-down, 0), np.maximum(-right, 0)  # of a query that has such a key
    return pairs[:, row, column, row + down, column + right]


# --- Checks ------------------------------------------------------------------------------------


def _check_images(model: keras.Model, images: Any) -> np.ndarray:
    images = np.asarray(images, "float32")
    shape = getattr(model, "input_shape", None)
    fits = (
        isinstance(shape, tuple)
        and len(shape) == images.ndim == 4
        and all(size in (None, given) for size, given in zip(shape, images.shape, strict=True))
    )
    if not fits or not len(images):
        raise ValueError(
            f"`images` must be of the shape that the model takes, {shape}. Received: {images.shape}"
        )
    return images


def _check_classes(
    class_index: int | Sequence[int] | None, images: int, classes: int
) -> np.ndarray | None:
    if class_index is None:
        return None
    several = np.ndim(class_index) == 1
    numbers = list(cast(Sequence[int], class_index)) if several else [class_index] * images
    if len(numbers) != images:
        raise ValueError(
            f"`class_index` must be one number, or one for each of the {images} images. Received: "
            f"{len(numbers)}"
        )
    for number in numbers:
        whole_number("class_index", number, least=0)
        if int(cast(int, number)) >= classes:
            raise ValueError(
                f"`class_index` must be below the model's {classes} classes. Received: {number}"
            )
    return np.array(numbers, "int32")


def _attention(graph: Graph, block: str | None) -> Call:
    """Returns the call that attention weights can be asked of: a block's, or a fused attention."""
    names = [each.name for each in graph.architecture.blocks() if each.kind == "T"]
    name = block or (names[-1] if names else None)
    if name not in names:
        raise ValueError(
            f"`block` must be a Transformer block: {', '.join(names) or 'the network has none'}. "
            f"Received: {block!r}"
        )
    return graph.find(name if name in graph.calls else f"{name}_attention")


# --- Arrays ------------------------------------------------------------------------------------


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor), "float32")


def _batches(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for begin in range(0, len(images), _BATCH_SIZE):
        yield begin, images[begin : begin + _BATCH_SIZE]


def _as_large_as(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Scales maps to a maximum of 1 and to the images' size."""
    resized = ops.image.resize(
        maps[..., None].astype("float32"), images.shape[1:3], data_format="channels_last"
    )
    resized = _to_numpy(resized)[..., 0]
    highest = resized.max(axis=(1, 2), keepdims=True)
    return resized / np.where(highest > 0, highest, 1)


def _map_size(graph: Graph, shape: Sequence[int | None], block: str) -> tuple[int, int]:
    """Returns the size of a block's map for images of a shape."""
    given = zip(shape[1:3], graph.architecture.input_sides, strict=True)
    height, width = (-(-(size or side) // 2) for size, side in given)
    for each in graph.architecture.blocks():
        height, width = -(-height // each.strides), -(-width // each.strides)
        if each.name == block:
            break
    return height, width


def _pooling(height: int, width: int) -> np.ndarray:
    """Returns the mean over 2 x 2 positions of a map as a matrix, (positions after, before)."""
    rows, columns = (_halving(size) for size in (height, width))
    return np.kron(rows, columns)


def _halving(size: int) -> np.ndarray:
    covered = np.arange(size)[None] // 2 == np.arange(-(-size // 2))[:, None]
    return covered / covered.sum(axis=1, keepdims=True)


# --- Scores and their gradients ----------------------------------------------------------------


class _WithoutActivation(keras.layers.Layer):
    """Calls a dense layer without its activation, whatever else it does."""

    def __init__(self, dense: keras.layers.Dense) -> None:
        super().__init__(dtype=dense.dtype_policy)
        self.dense = dense
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        activation = self.dense.activation
        self.dense.activation = keras.activations.linear
        try:
            return self.dense(x)
        finally:
            self.dense.activation = activation


# Operations behind which scores are still those of the classes.
_KEEPS_CLASSES = ("Softmax", "Sigmoid", "Identity", "Dropout", "Activation")


def _logits(graph: Graph) -> Tensor:
    """Returns the scores before softmax or sigmoid; the outputs, if they are not found."""
    tensor = graph.outputs
    while True:
        operation, number, _ = tensor._keras_history
        if isinstance(operation, keras.layers.Dense):
            before = operation._inbound_nodes[number].input_tensors[0]
            return _WithoutActivation(operation)(before)
        if type(operation).__name__ not in _KEEPS_CLASSES:
            return graph.outputs
        tensor = operation._inbound_nodes[number].input_tensors[0]


def _model_between(target: Tensor, scores: Tensor, layer: str) -> keras.Model:
    try:
        return keras.Model(target, scores)
    except ValueError as error:
        raise ValueError(
            f"The scores do not come from {layer!r} alone: another path leads around it. Give a "
            "stage or a block as `layer`."
        ) from error


def _function(model: keras.Model) -> Callable[[Any], Any]:
    """Returns a model as a function at inference; compiled on JAX, which is slow without."""
    if keras.backend.backend() != "jax":
        return functools.partial(model, training=False)
    import jax

    @jax.jit
    def compute(variables: Any, x: Any) -> Any:
        outputs: Any = model.stateless_call(*variables, x, training=False)
        return outputs[0]

    return functools.partial(compute, _variables(model))


def _gradient_function(head: keras.Model) -> Callable[[Any, np.ndarray], Any]:
    """Returns a function of features and of one class for each image.

    It gives the gradients of the scores of these classes by the features, in float32.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        def differentiate(features: Any, classes: np.ndarray) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(features)
                scores = head(features, training=False)
                total = tf.reduce_sum(tf.gather(scores, classes, batch_dims=1))
            return tape.gradient(total, features)

        return differentiate
    if backend == "jax":
        import jax

        def total_of(features: Any, classes: Any, variables: Any) -> Any:
            outputs: Any = head.stateless_call(*variables, features, training=False)
            scores = outputs[0]
            return scores[np.arange(len(classes)), classes].sum()

        return functools.partial(jax.jit(jax.grad(total_of)), variables=_variables(head))
    if backend == "torch":
        import torch

        def differentiate(features: Any, classes: np.ndarray) -> Any:
            with torch.enable_grad():
                features = features.detach().requires_grad_()
                scores = head(features, training=False)
                total = scores[torch.arange(len(classes)), torch.as_tensor(classes).long()].sum()
                return torch.autograd.grad(total, features)[0]

        return differentiate
    raise ValueError(f"Keras's {backend} backend computes no gradients, which Grad-CAM needs.")


def _variables(model: keras.Model) -> tuple[list, list]:
    groups = model.trainable_variables, model.non_trainable_variables
    trainable, others = ([variable.value for variable in group] for group in groups)
    return trainable, others
