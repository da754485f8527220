"""`fuse`, which builds the same network for inference in fewer operations.

At inference, a BatchNorm is an affine map of each channel, `x * scale + shift`, and so are the last
step of a LayerNorm, a layer scale and the scaling of q in attention. A dense layer or convolution
beside an affine map can contain it:

- `affine(linear(x))`: the kernel is multiplied by the scale, along its output channels.
- `linear(affine(x))`: the kernel is multiplied by the scale, along its input channels, and the bias
  gets the kernel's product with the shift. Zero padding in between would be shifted, too; so this
  is done for 1x1 convolutions and dense layers only.

| in the model | in the fused model |
|---|---|
| BatchNorm after a convolution | in that convolution |
| BatchNorm before a 1x1 convolution or dense layer | in the latter |
| scale and shift of a LayerNorm before dense layers | in these; mean and variance stay |
| layer scale after a projection | in the projection |
| q, k and v, and the scaling of q | one dense layer |
| relative positions | a constant for the input size |

An affine map commutes with average pooling, but not with max pooling or an activation: a norm that
one of these separates from its convolution is kept as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_coatnet.arguments import boolean
from keras_coatnet.layers import ConvNeXtBlock, MBConv, TransformerBlock
from keras_coatnet.layers.activations import get_activation
from keras_coatnet.layers.fused import (
    FusedActivation,
    FusedAttention,
    FusedPointwiseConv2D,
    FusedSqueezeExcite,
)
from keras_coatnet.layers.identity import NetworkIdentity
from keras_coatnet.layers.layer_scale import LayerScale
from keras_coatnet.layers.pooling import Downsample
from keras_coatnet.model import CoAtNetModel, Identity
from keras_coatnet.names import (
    AROUND_BLOCKS,
    AVG_POOL,
    CLASSIFIER,
    FINAL_NORM,
    HIDDEN,
    MAX_POOL,
    NETWORK,
    PREPROCESSING,
    STEM_ACTIVATION,
    STEM_CONV1,
    STEM_CONV2,
    STEM_NORM,
    STEM_PAD,
)
from keras_coatnet.types import Tensor

# Layers by name, of the classes that the names stand for.
Layers = Mapping[str, Any]

Norm = keras.layers.LayerNormalization | keras.layers.BatchNormalization


def fuse(model: CoAtNetModel, jit_compile: bool = True) -> keras.Model:
    """Builds a faster model for inference that computes the same.

    BatchNorms are folded into the convolutions beside them, scale and shift of LayerNorms into the
    dense layers after them, layer scales into the dense layers before them. The dense layers of q,
    k and v become one. The relative biases of all pairs of positions become constants. Under a
    mixed policy, kernels are stored in half precision, and need not be cast in each call.

    The new model has copies of the weights: to train the original further does not change it. It
    saves, exports and quantizes like any Keras model. It takes images of the size that `model` was
    built for. The relative biases grow with the fourth power of the size: CoAtNet0's take 10 MB at
    224 pixels and 4.2 GB at 1024.

    Args:
        model: a model that `keras_coatnet.CoAtNet` or one of the other constructors built, with a
            static input height and width.
        jit_compile: whether XLA compiles the activations that are layers of their own, on
            TensorFlow's CPU. That takes them a tenth of the time, and a moment of compilation for
            each new batch size. Use False for runtimes without XLA, such as the standard build of
            TensorFlow Serving.

    Returns:
        A `CoAtNetModel` with the same inputs, outputs, architecture, classes and preprocessing.
        The outputs differ by rounding, about 1e-6.

    Raises:
        ValueError: `model` was not built by this package, is quantized or fused already, has an
            unknown input size or layers that were added to it, or `jit_compile` is not a bool.

    Example:
        >>> import numpy as np
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> images = np.full((1, 64, 64, 3), 99.0, "float32")
        >>> bool(np.allclose(fuse(model)(images), model(images), atol=1e-5))
        True
    """
    _check(model)
    jit_compile = boolean("jit_compile", jit_compile)
    identity = dataclasses.replace(Identity.from_dict(model.identity()), fused=True)
    layers: Layers = {layer.name: layer for layer in model.layers}
    inputs = keras.Input(batch_shape=model.input_shape, dtype=model.inputs[0].dtype)
    x = inputs
    if PREPROCESSING in layers:
        x = _call_copy(layers[PREPROCESSING], x)
    x = NetworkIdentity(identity.to_dict(), name=NETWORK)(x)
    x = _fuse_stem(layers, x, jit_compile)
    for block in identity.architecture.blocks():
        layer = layers[block.name]
        if isinstance(layer, TransformerBlock):
            x = _fuse_transformer(layer, x)
        elif isinstance(layer, ConvNeXtBlock):
            x = _fuse_convnext(layer, x)
        else:
            x = _fuse_mbconv(layer, x, jit_compile)
    x = _fuse_head(layers, x)
    return CoAtNetModel(inputs, x, name=f"{model.name}_fused", identity=identity)


# --- What can be fused -------------------------------------------------------------------------


def _check(model: Any) -> None:
    if not isinstance(model, CoAtNetModel):
        raise ValueError(
            "Only a model that CoAtNet or one of its sizes built can be fused. Received: "
            f"{type(model).__name__}. Fuse the CoAtNet inside it before you build on it."
        )
    if model.architecture is None:
        raise ValueError(
            "The model does not say which CoAtNet it is: its layers are not those of one whole "
            f"network. Its last layer is {model.layers[-1].name!r}. Fuse the CoAtNet alone, and "
            "put your layers around the result."
        )
    if model.fused:
        raise ValueError("The model is fused already. Fuse the model that it was made from.")
    if None in model.input_shape[1:]:
        raise ValueError(
            "A model must have a known input size to be fused, as its relative biases are expanded "
            f"for one. Its input shape is {model.input_shape}. Build it with input_shape=(height, "
            "width, channels) and load the weights."
        )
    blocks = {block.name for block in model.architecture.blocks()}
    added = [
        layer.name
        for layer in model.layers
        if not isinstance(layer, keras.layers.InputLayer)
        and layer.name not in AROUND_BLOCKS
        and not (
            layer.name in blocks and isinstance(layer, (ConvNeXtBlock, MBConv, TransformerBlock))
        )
    ]
    if added:
        raise ValueError(
            f"The model has added layers, which cannot be fused: {', '.join(added)}. Fuse the "
            "CoAtNet alone, and put them around the result."
        )
    if any(layer.quantization_mode for layer in model._flatten_layers()):
        raise ValueError("A quantized model cannot be fused. Fuse first, then quantize.")


# --- Folding -----------------------------------------------------------------------------------


class Affine(NamedTuple):
    """An affine map of each channel, `y = x * scale + shift`, in float64."""

    scale: np.ndarray
    shift: np.ndarray


class Linear(NamedTuple):
    """The weights of a dense layer or a convolution, `y = x @ kernel + bias`, in float64.

    The last axis of the kernel is the output channels.
    """

    kernel: np.ndarray
    bias: np.ndarray

    def fold_input(self, affine: Affine) -> Linear:
        """Returns `linear(affine(x))` as one linear map, of a kernel of shape (in, out)."""
        return Linear(self.kernel * affine.scale[:, None], self.bias + affine.shift @ self.kernel)

    def fold_output(self, affine: Affine) -> Linear:
        """Returns `affine(linear(x))` as one linear map."""
        return Linear(self.kernel * affine.scale, self.bias * affine.scale + affine.shift)


def _to_float64(variable: Tensor) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), "float64")


def _scale_by(factors: np.ndarray) -> Affine:
    return Affine(factors, np.zeros_like(factors))


def _affine_of(norm: Norm) -> Affine:
    """Returns the affine map that a BatchNorm is at inference, or that a LayerNorm ends with."""
    gamma, beta = _to_float64(norm.gamma), _to_float64(norm.beta)
    if isinstance(norm, keras.layers.LayerNormalization):
        return Affine(gamma, beta)
    scale = gamma / np.sqrt(_to_float64(norm.moving_variance) + norm.epsilon)
    return Affine(scale, beta - _to_float64(norm.moving_mean) * scale)


def _linear_of(layer: keras.layers.Dense | keras.layers.Conv2D) -> Linear:
    """Returns the weights of a dense layer or 1x1 convolution, with a kernel of (in, out)."""
    kernel = _to_float64(layer.kernel)
    filters_in, filters = kernel.shape[-2:]
    return Linear(kernel.reshape(filters_in, filters), _bias_of(layer, filters))


def _bias_of(layer: keras.layers.Dense | keras.layers.Conv2D, filters: int) -> np.ndarray:
    return _to_float64(layer.bias) if layer.use_bias else np.zeros(filters)


def _fold_scale(linear: Linear, layer_scale: LayerScale | None) -> Linear:
    """Folds a layer scale, if there is one, into the projection before it."""
    if layer_scale is None:
        return linear
    return linear.fold_output(_scale_by(_to_float64(layer_scale.scale)))


# --- New layers --------------------------------------------------------------------------------


def _inference_dtype(layer: keras.layers.Layer) -> keras.DTypePolicy:
    """Returns a policy that stores variables in the dtype that the layer computes in.

    Only training needs float32 variables under a mixed policy.
    """
    return keras.DTypePolicy(layer.compute_dtype)


def _config_without_lora(layer: keras.layers.Layer) -> dict[str, Any]:
    """Returns a layer's configuration for a new one, whose kernel includes the LoRA update."""
    config = layer.get_config()
    return {key: config[key] for key in config if key not in ("lora_rank", "lora_alpha")}


def _call_new(layer: keras.layers.Layer, x: Tensor, *weights: np.ndarray) -> Tensor:
    """Calls a new layer, which builds it, and sets its weights."""
    y = layer(x)
    layer.set_weights(
        [value.reshape(each.shape) for value, each in zip(weights, layer.weights, strict=True)]
    )
    return y


def _call_copy(layer: keras.layers.Layer, x: Tensor) -> Tensor:
    """Calls a copy of a layer without weights."""
    return type(layer).from_config(layer.get_config())(x)


def _pointwise(
    x: Tensor,
    linear: Linear,
    dtype: keras.DTypePolicy,
    name: str,
    activation: Callable[[Tensor], Tensor] | None = None,
    strides: int = 1,
) -> Tensor:
    filters = linear.kernel.shape[-1]
    layer = FusedPointwiseConv2D(filters, activation, strides, dtype=dtype, name=name)
    return _call_new(layer, x, *linear)


def _whole_norm(norm: Norm, x: Tensor, name: str) -> Tensor:
    """Applies a copy of a norm that cannot be folded."""
    config = {**norm.get_config(), "name": name, "trainable": False}
    return _call_new(type(norm).from_config(config), x, *map(_to_float64, norm.weights))


def _split_norm(norm: Norm, x: Tensor, name: str) -> tuple[Tensor, Affine]:
    """Applies the part of a norm that cannot be folded, and returns the affine map to be folded.

    All of a BatchNorm can be folded. The mean and the variance of a LayerNorm cannot.
    """
    if isinstance(norm, keras.layers.LayerNormalization):
        config = {**norm.get_config(), "name": name, "center": False, "scale": False}
        x = keras.layers.LayerNormalization.from_config(config)(x)
    return x, _affine_of(norm)


# --- Stem, blocks and head ---------------------------------------------------------------------


def _fuse_stem(layers: Layers, x: Tensor, jit_compile: bool) -> Tensor:
    if STEM_PAD in layers:
        x = _call_copy(layers[STEM_PAD], x)

    conv, norm = layers[STEM_CONV1], layers[STEM_NORM]
    dtype = _inference_dtype(conv)
    kernel = _to_float64(conv.kernel)
    linear = Linear(kernel, _bias_of(conv, kernel.shape[-1]))
    is_layer_norm = isinstance(norm, keras.layers.LayerNormalization)
    if not is_layer_norm:
        linear = linear.fold_output(_affine_of(norm))
    config = {**_config_without_lora(conv), "use_bias": True, "dtype": dtype}
    x = _call_new(keras.layers.Conv2D.from_config(config), x, *linear)
    if is_layer_norm:
        x = _whole_norm(norm, x, STEM_NORM)

    activation = layers[STEM_ACTIVATION].activation
    x = FusedActivation(activation, jit_compile, dtype=dtype, name=STEM_ACTIVATION)(x)

    conv = layers[STEM_CONV2]
    weights = [_to_float64(each) for each in (conv.kernel, conv.bias) if each is not None]
    config = {**_config_without_lora(conv), "dtype": dtype}
    return _call_new(keras.layers.Conv2D.from_config(config), x, *weights)


def _fuse_shortcut(block: MBConv | ConvNeXtBlock, x: Tensor) -> Tensor:
    """Builds the shortcut of a convolutional block, which has no norm to fold."""
    name, dtype = block.name, _inference_dtype(block)
    if block.shortcut_pooling is not None:
        x = Downsample(block.pool, dtype=dtype, name=f"{name}_shortcut_pooling")(x)
    if block.shortcut is not None:
        x = _pointwise(x, _linear_of(block.shortcut), dtype, f"{name}_shortcut")
    return x


def _fuse_mbconv(block: MBConv, x: Tensor, jit_compile: bool) -> Tensor:
    name, dtype = block.name, _inference_dtype(block)
    activation = get_activation(block.activation)
    shortcut = _fuse_shortcut(block, x)

    # The norm after the 1x1 expansion is folded into it. So is the norm before it, unless an
    # activation or a maximum, which do not commute with an affine map, is in between.
    expand = _linear_of(block.expand).fold_output(_affine_of(block.expand_norm))
    max_pooled = block.stride_pooling is not None and block.stride_pool != "avg2"
    if block.prenorm_activation or max_pooled:
        x = _whole_norm(block.input_norm, x, f"{name}_input_norm")
    else:
        expand = expand.fold_input(_affine_of(block.input_norm))
    if block.prenorm_activation:
        options = {"dtype": dtype, "name": f"{name}_input_activation"}
        x = FusedActivation(activation, jit_compile, **options)(x)
    if block.stride_pooling is not None:
        x = Downsample(block.stride_pool, dtype=dtype, name=f"{name}_stride_pooling")(x)
    x = _pointwise(x, expand, dtype, f"{name}_expand", activation, block.expand_strides)

    x = _fuse_depthwise(block, x)
    x = FusedActivation(activation, jit_compile, dtype=dtype, name=f"{name}_activation")(x)
    if block.squeeze_place == "after_norm":
        x = _fuse_squeeze_excite(block, x)

    x = _pointwise(x, _linear_of(block.project), dtype, f"{name}_project")
    return keras.layers.Add(dtype=dtype, name=f"{name}_add")([shortcut, x])


def _fuse_depthwise(block: MBConv, x: Tensor) -> Tensor:
    """Builds the depthwise convolution and its norm, with squeeze-and-excitation if in between."""
    name, conv = block.name, block.depthwise
    if block.pads_symmetrically:
        x = _pad(x, conv.kernel_size[0] // 2, f"{name}_pad")
    folds_norm = block.squeeze_place == "after_norm"
    layer = keras.layers.DepthwiseConv2D.from_config(
        {
            **conv.get_config(),
            "use_bias": folds_norm,
            "dtype": _inference_dtype(block),
            "name": f"{name}_depthwise",
        }
    )
    kernel = _to_float64(conv.kernel)[..., 0]  # (height, width, channels)
    if folds_norm:
        linear = Linear(kernel, np.zeros(kernel.shape[-1]))
        return _call_new(layer, x, *linear.fold_output(_affine_of(block.depthwise_norm)))
    x = _call_new(layer, x, kernel)
    x = _fuse_squeeze_excite(block, x)
    return _whole_norm(block.depthwise_norm, x, f"{name}_depthwise_norm")


def _fuse_squeeze_excite(block: MBConv, x: Tensor) -> Tensor:
    original = block.squeeze_excite
    layer = FusedSqueezeExcite(
        original.squeezed_filters,
        original.activation,
        dtype=_inference_dtype(block),
        name=f"{block.name}_squeeze_excite",
    )
    return _call_new(layer, x, *_linear_of(original.squeeze), *_linear_of(original.excite))


def _pad(x: Tensor, pad: int, name: str) -> Tensor:
    return keras.layers.ZeroPadding2D(pad, data_format="channels_last", name=name)(x)


def _fuse_convnext(block: ConvNeXtBlock, x: Tensor) -> Tensor:
    name, dtype = block.name, _inference_dtype(block)
    shortcut = _fuse_shortcut(block, x)

    if block.stride_pooling is not None:
        x = Downsample(block.stride_pool, dtype=dtype, name=f"{name}_stride_pooling")(x)
    conv = block.depthwise_conv
    if block.pads_symmetrically:
        x = _pad(x, conv.kernel_size[0] // 2, f"{name}_pad")
    config = {**conv.get_config(), "dtype": dtype, "name": f"{name}_depthwise"}
    layer = keras.layers.DepthwiseConv2D.from_config(config)
    x = _call_new(layer, x, *map(_to_float64, conv.weights))

    activation = get_activation(block.activation)
    x, affine = _split_norm(block.ffn_norm, x, f"{name}_ffn_norm")
    expand = _linear_of(block.ffn_expand).fold_input(affine)
    x = _pointwise(x, expand, dtype, f"{name}_ffn_expand", activation)
    project = _fold_scale(_linear_of(block.ffn_project), block.ffn_scale)
    x = _pointwise(x, project, dtype, f"{name}_project")
    return keras.layers.Add(dtype=dtype, name=f"{name}_add")([shortcut, x])


def _fuse_transformer(block: TransformerBlock, x: Tensor) -> Tensor:
    name, dtype = block.name, _inference_dtype(block)

    norm_name, affine = f"{name}_attention_norm", None
    if block.pooling is not None and block.pool != "avg2":  # a maximum does not commute
        branch = _whole_norm(block.attention_norm, x, norm_name)
    else:
        branch, affine = _split_norm(block.attention_norm, x, norm_name)
    if block.pooling is not None:
        x = Downsample(block.pool, dtype=dtype, name=f"{name}_shortcut_pooling")(x)
        branch = Downsample(block.pool, dtype=dtype, name=f"{name}_pooling")(branch)
    if block.shortcut is not None:
        x = _pointwise(x, _linear_of(block.shortcut), dtype, f"{name}_shortcut")
    branch = _fuse_attention(block, branch, affine)
    x = keras.layers.Add(dtype=dtype, name=f"{name}_attention_add")([x, branch])

    activation = get_activation(block.ffn_activation)
    branch, affine = _split_norm(block.ffn_norm, x, f"{name}_ffn_norm")
    expand = _linear_of(block.ffn_expand).fold_input(affine)
    branch = _pointwise(branch, expand, dtype, f"{name}_ffn_expand", activation)
    project = _fold_scale(_linear_of(block.ffn_project), block.ffn_scale)
    branch = _pointwise(branch, project, dtype, f"{name}_ffn_project")
    return keras.layers.Add(dtype=dtype, name=f"{name}_ffn_add")([x, branch])


def _fuse_attention(block: TransformerBlock, x: Tensor, affine: Affine | None) -> Tensor:
    """Builds the attention of a block.

    Args:
        block: the Transformer block.
        x: its input, `(batch, height, width, channels)`.
        affine: the affine map to be folded; None: there is none.

    Returns:
        The attention's output, with the block's layer scale.
    """
    original = block.attention
    query, key, value = map(_linear_of, (original.query, original.key, original.value))
    if affine is not None:
        query, key, value = (each.fold_input(affine) for each in (query, key, value))
    scaling = np.full(original.attention_dim, original.head_dim**-0.5)
    query = query.fold_output(_scale_by(scaling))
    projection = _fold_scale(_linear_of(original.projection), block.attention_scale)

    layer = FusedAttention(
        block.filters,
        original.num_heads,
        original.head_dim,
        dtype=_inference_dtype(block),
        name=f"{block.name}_attention",
    )
    _, height, width, _ = x.shape
    y = layer(x)
    layer.query_key_value.set_weights(
        [
            np.concatenate([query.kernel, key.kernel, value.kernel], axis=1),
            np.concatenate([query.bias, key.bias, value.bias]),
        ]
    )
    layer.bias.assign(original.position(height=height, width=width))
    layer.projection.set_weights(list(projection))
    return y


def _fuse_head(layers: Layers, x: Tensor) -> Tensor:
    dense_layers = [layers[name] for name in (HIDDEN, CLASSIFIER) if name in layers]
    affine = None
    for name, layer in layers.items():  # in the order in which the network calls them
        if name in (AVG_POOL, MAX_POOL):
            x = _call_copy(layer, x)
        elif name == FINAL_NORM and dense_layers:  # a mean in between commutes with an affine map
            x, affine = _split_norm(layer, x, name)
        elif name == FINAL_NORM:
            x = _whole_norm(layer, x, name)

    for dense in dense_layers:
        linear = _linear_of(dense)
        if affine is not None:
            linear, affine = linear.fold_input(affine), None
        config = {**_config_without_lora(dense), "use_bias": True}
        x = _call_new(keras.layers.Dense.from_config(config), x, *linear)
    return x
