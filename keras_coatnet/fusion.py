"""`fuse`: the same network for inference, in fewer operations.

A norm that stands beside a product is an affine map, and an affine map goes into the product's
kernel and bias: after it always, before it where nothing else is in between and no padding is
added. What cannot go anywhere stays as it is, so that outputs are the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_coatnet.arguments import boolean
from keras_coatnet.layers import ConvNeXtBlock, MBConv, TransformerBlock
from keras_coatnet.layers.activations import get_activation
from keras_coatnet.layers.fused import (
    FusedAttention,
    FusedSqueezeExcite,
    LoneActivation,
    Pointwise,
)
from keras_coatnet.layers.identity import NetworkIdentity
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


def fuse(model: CoAtNetModel, jit_compile: bool = True) -> keras.Model:
    """Makes a faster model for inference that computes the same.

    BatchNorms are folded into the convolutions beside them, LayerNorms' scale and shift into the
    projections after them, layer scales into those before them; q, k and v become one product
    with the scaling of q in it, and relative biases are expanded once. Under a mixed policy the
    kernels are kept in half precision, instead of being cast at each call.

    The result has copies of the weights: training the model further does not change it. It saves,
    exports and quantizes like any Keras model. It takes the input size that `model` was built for;
    expanded biases grow with its fourth power: 10 MB for CoAtNet0 at 224, 4.2 GB at 1024.

    Args:
        model: a CoAtNet, as `keras_coatnet.CoAtNet` and the like build it, with a static input
            height and width.
        jit_compile: whether XLA compiles the activations that stand alone, on TensorFlow's CPU: a
            few loops, once for each batch size, for a tenth of the time. False for runtimes
            without XLA, such as TensorFlow Serving as it comes.

    Returns:
        A `keras.Model` with the same inputs and outputs; outputs differ by rounding, about 1e-6.
        It is a `CoAtNetModel`, which knows its architecture, classes and preprocessing.

    Raises:
        ValueError: the model is none of this package's, its input size is unknown, it is
            quantized or fused already, or it has layers of its own; or `jit_compile` is no bool.

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
    config = model.architecture
    layer = {each.name: each for each in model.layers}
    inputs = keras.Input(batch_shape=model.input_shape, dtype=model.inputs[0].dtype)
    x = inputs
    if PREPROCESSING in layer:
        x = _again(layer[PREPROCESSING])(x)
    identity = dataclasses.replace(Identity.from_dict(model.identity()), fused=True)
    x = NetworkIdentity(identity.to_dict(), name=NETWORK)(x)
    x = _fused_stem(layer, x, jit_compile)
    for block in config.blocks():
        found = layer[block.name]
        if block.kind == "T":
            x = _fused_transformer(found, x)
        elif config.conv_block == "convnext":
            x = _fused_convnext(found, x)
        else:
            x = _fused_mbconv(found, x, jit_compile)
    x = _fused_head(layer, x)
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
            "The model does not say which CoAtNet it is, as its layers are not those of one whole "
            f"network, from the input to an end that CoAtNet builds. Its last layer is "
            f"{model.layers[-1].name!r}. Fuse the CoAtNet alone, and put your layers around the "
            "result."
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
    own = [
        layer.name
        for layer in model.layers
        if not isinstance(layer, keras.layers.InputLayer)
        and layer.name not in AROUND_BLOCKS
        and not (
            layer.name in blocks and isinstance(layer, (ConvNeXtBlock, MBConv, TransformerBlock))
        )
    ]
    if own:
        raise ValueError(
            f"The model has layers of its own, which cannot be fused: {', '.join(own)}. Fuse the "
            "CoAtNet alone, and put them around the result."
        )
    if any(layer.quantization_mode for layer in model._flatten_layers()):
        raise ValueError("A quantized model cannot be fused. Fuse first, then quantize.")


# --- Values ------------------------------------------------------------------------------------


def _value(variable: Any) -> np.ndarray:
    """A variable in float64, in which kernels are folded."""
    return keras.ops.convert_to_numpy(variable).astype("float64")


def _affine(norm: keras.layers.Layer) -> tuple[np.ndarray, np.ndarray]:
    """What a norm does for inference at its end: y = x * scale + shift for each channel."""
    gamma, beta = _value(norm.gamma), _value(norm.beta)
    if isinstance(norm, keras.layers.LayerNormalization):
        return gamma, beta
    scale = gamma / np.sqrt(_value(norm.moving_variance) + norm.epsilon)
    return scale, beta - _value(norm.moving_mean) * scale


def _dense(layer: keras.layers.Layer) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (channels in, out) and bias of a dense layer or a 1x1 convolution."""
    kernel = _value(layer.kernel)
    kernel = kernel.reshape(kernel.shape[-2:])
    bias = _value(layer.bias) if layer.use_bias else np.zeros(kernel.shape[-1])
    return kernel, bias


def _after(
    affine: tuple[np.ndarray, np.ndarray], product: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The product that follows an affine map, with the map in it."""
    (scale, shift), (kernel, bias) = affine, product
    return kernel * scale[:, None], bias + shift @ kernel


def _before(
    product: tuple[np.ndarray, np.ndarray], affine: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The product that an affine map follows, with the map in it. Any kernel: channels last."""
    (kernel, bias), (scale, shift) = product, affine
    return kernel * scale, bias * scale + shift


# --- Layers ------------------------------------------------------------------------------------


def _stored_as_computed(layer: keras.layers.Layer) -> keras.DTypePolicy:
    """Inference has no use for a float32 copy of what is computed in half precision."""
    return keras.DTypePolicy(layer.compute_dtype)


def _options(layer: keras.layers.Layer) -> dict[str, Any]:
    """A layer's configuration for a new one, whose kernel has what LoRA added."""
    return {
        key: value
        for key, value in layer.get_config().items()
        if key not in ("lora_rank", "lora_alpha")
    }


def _again(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A layer like another, without weights of its own yet."""
    return type(layer).from_config(layer.get_config())


def _filled(layer: keras.layers.Layer, x: Any, *values: np.ndarray) -> Any:
    """Applies a new layer, and gives it its weights, in Keras's order of them."""
    y = layer(x)
    layer.set_weights(
        [value.reshape(weight.shape) for value, weight in zip(values, layer.weights, strict=True)]
    )
    return y


def _pointwise(
    x: Any,
    product: tuple[np.ndarray, np.ndarray],
    like: keras.layers.Layer,
    name: str,
    activation: Any = None,
    strides: int = 1,
) -> Any:
    width = product[0].shape[-1]
    dtype = _stored_as_computed(like)
    new = Pointwise(width, activation, strides, dtype=dtype, name=name)
    return _filled(new, x, *product)


def _kept_norm(norm: keras.layers.Layer, x: Any, name: str, affine: bool) -> Any:
    """A norm that stays: a whole BatchNorm, or a LayerNorm with or without its affine map."""
    config = {**norm.get_config(), "name": name}
    if isinstance(norm, keras.layers.LayerNormalization) and not affine:
        return keras.layers.LayerNormalization.from_config(
            {**config, "center": False, "scale": False}
        )(x)
    new = type(norm).from_config({**config, "trainable": False})
    return _filled(new, x, *map(_value, norm.weights))


def _norm_and_affine(norm: keras.layers.Layer, x: Any, name: str) -> tuple[Any, tuple]:
    """What is left of a norm before a product, and what goes into that."""
    if isinstance(norm, keras.layers.LayerNormalization):
        x = _kept_norm(norm, x, name, affine=False)
    return x, _affine(norm)


def _fused_stem(layer: dict[str, keras.layers.Layer], x: Any, jit_compile: bool) -> Any:
    if STEM_PAD in layer:
        x = _again(layer[STEM_PAD])(x)
    conv = layer[STEM_CONV1]
    dtype = _stored_as_computed(conv)
    kernel = _value(conv.kernel)
    bias = _value(conv.bias) if conv.use_bias else np.zeros(kernel.shape[-1])
    norm = layer[STEM_NORM]
    keeps_norm = isinstance(norm, keras.layers.LayerNormalization)
    folded = (kernel, bias) if keeps_norm else _before((kernel, bias), _affine(norm))
    options = {**_options(conv), "use_bias": True, "dtype": dtype}
    x = _filled(keras.layers.Conv2D.from_config(options), x, *folded)
    if keeps_norm:
        x = _kept_norm(norm, x, STEM_NORM, affine=True)
    function = layer[STEM_ACTIVATION].activation
    x = LoneActivation(function, jit_compile, dtype=dtype, name=STEM_ACTIVATION)(x)
    conv = layer[STEM_CONV2]
    new = keras.layers.Conv2D.from_config({**_options(conv), "dtype": dtype})
    return _filled(new, x, *(_value(part) for part in (conv.kernel, conv.bias) if part is not None))


def _fused_mbconv(block: MBConv, x: Any, jit_compile: bool) -> Any:
    name, dtype = block.name, _stored_as_computed(block)
    function = get_activation(block.activation)
    shortcut = x
    if block.shortcut_pooling is not None:
        shortcut = Downsample(block.pool, dtype=dtype, name=f"{name}_shortcut_pooling")(shortcut)
    if block.shortcut is not None:
        shortcut = _pointwise(shortcut, _dense(block.shortcut), block, f"{name}_shortcut")

    strided = block.strides > 1
    expand = _before(_dense(block.expand), _affine(block.expand_norm))
    pools_maxima = strided and block.stride_on == "pool" and block.stride_pool != "avg2"
    if block.prenorm_activation or pools_maxima:
        x = _kept_norm(block.input_norm, x, f"{name}_input_norm", affine=True)
        if block.prenorm_activation:
            x = LoneActivation(function, jit_compile, dtype=dtype, name=f"{name}_input_activation")(
                x
            )
    else:  # a mean over a window and an affine map may change places
        expand = _after(_affine(block.input_norm), expand)
    if strided and block.stride_on == "pool":
        x = Downsample(block.stride_pool, dtype=dtype, name=f"{name}_stride_pooling")(x)
    x = _pointwise(
        x,
        expand,
        block,
        f"{name}_expand",
        function,
        strides=2 if strided and block.stride_on == "expansion" else 1,
    )

    if block.pads:
        pad = block.depthwise.kernel_size[0] // 2
        x = keras.layers.ZeroPadding2D(pad, data_format="channels_last", name=f"{name}_pad")(x)
    depthwise = _value(block.depthwise.kernel)[..., 0], 0.0
    norm = _affine(block.depthwise_norm)
    after_norm = block.squeeze_place == "after_norm"
    if after_norm:
        depthwise = _before(depthwise, norm)
    options = {**block.depthwise.get_config(), "use_bias": after_norm, "dtype": dtype}
    new = keras.layers.DepthwiseConv2D.from_config({**options, "name": f"{name}_depthwise"})
    x = _filled(new, x, *(depthwise if after_norm else depthwise[:1]))
    if not after_norm:
        x = _squeeze_excite(block, x)
        x = _kept_norm(block.depthwise_norm, x, f"{name}_depthwise_norm", affine=True)
    x = LoneActivation(function, jit_compile, dtype=dtype, name=f"{name}_activation")(x)
    if after_norm:
        x = _squeeze_excite(block, x)
    x = _pointwise(x, _dense(block.project), block, f"{name}_project")
    return keras.layers.Add(dtype=dtype, name=f"{name}_add")([shortcut, x])


def _fused_convnext(block: ConvNeXtBlock, x: Any) -> Any:
    name, dtype = block.name, _stored_as_computed(block)
    shortcut = x
    if block.shortcut_pooling is not None:
        shortcut = Downsample(block.pool, dtype=dtype, name=f"{name}_shortcut_pooling")(shortcut)
    if block.shortcut is not None:
        shortcut = _pointwise(shortcut, _dense(block.shortcut), block, f"{name}_shortcut")

    if block.stride_pooling is not None:
        x = Downsample(block.stride_pool, dtype=dtype, name=f"{name}_stride_pooling")(x)
    conv = block.depthwise_conv
    if block.pads:
        pad = conv.kernel_size[0] // 2
        x = keras.layers.ZeroPadding2D(pad, data_format="channels_last", name=f"{name}_pad")(x)
    options = {**conv.get_config(), "dtype": dtype, "name": f"{name}_depthwise"}
    new = keras.layers.DepthwiseConv2D.from_config(options)
    x = _filled(new, x, *map(_value, conv.weights))

    x, affine = _norm_and_affine(block.ffn_norm, x, f"{name}_ffn_norm")
    expand = _after(affine, _dense(block.ffn_expand))
    x = _pointwise(x, expand, block, f"{name}_ffn_expand", get_activation(block.activation))
    x = _pointwise(x, _scaled(block, "ffn", _dense(block.ffn_project)), block, f"{name}_project")
    return keras.layers.Add(dtype=dtype, name=f"{name}_add")([shortcut, x])


def _squeeze_excite(block: MBConv, x: Any) -> Any:
    found = block.squeeze_excite
    name, dtype = f"{block.name}_squeeze_excite", _stored_as_computed(block)
    new = FusedSqueezeExcite(found.squeezed_filters, found.activation, name=name, dtype=dtype)
    return _filled(new, x, *_dense(found.squeeze), *_dense(found.excite))


def _fused_transformer(block: TransformerBlock, x: Any) -> Any:
    name, dtype = block.name, _stored_as_computed(block)
    attention = block.attention
    pools_maxima = block.pooling is not None and block.pool != "avg2"
    if pools_maxima:  # a maximum and an affine map may not change places
        branch = _kept_norm(block.attention_norm, x, f"{name}_attention_norm", affine=True)
        affine = np.ones(x.shape[-1]), np.zeros(x.shape[-1])
    else:
        branch, affine = _norm_and_affine(block.attention_norm, x, f"{name}_attention_norm")
    if block.pooling is not None:
        x = Downsample(block.pool, dtype=dtype, name=f"{name}_shortcut_pooling")(x)
        branch = Downsample(block.pool, dtype=dtype, name=f"{name}_pooling")(branch)
    if block.shortcut is not None:
        x = _pointwise(x, _dense(block.shortcut), block, f"{name}_shortcut")

    scaling = np.full(attention.attention_dim, attention.head_dim**-0.5)
    products = [_after(affine, _dense(part)) for part in (attention.query, attention.key)]
    products[0] = _before(products[0], (scaling, 0.0))
    products.append(_after(affine, _dense(attention.value)))
    kernels, biases = zip(*products, strict=True)
    new = FusedAttention(
        block.width, attention.heads, attention.head_dim, dtype=dtype, name=f"{name}_attention"
    )
    height, width = branch.shape[1:3]
    projection = _scaled(block, "attention", _dense(attention.projection))
    y = new(branch)
    new.query_key_value.set_weights([np.concatenate(kernels, 1), np.concatenate(biases)])
    new.bias.assign(attention.position(height=height, width=width))
    new.projection.set_weights(list(projection))
    x = keras.layers.Add(dtype=dtype, name=f"{name}_attention_add")([x, y])

    branch, affine = _norm_and_affine(block.ffn_norm, x, f"{name}_ffn_norm")
    expand = _after(affine, _dense(block.ffn_expand))
    function = get_activation(block.ffn_activation)
    branch = _pointwise(branch, expand, block, f"{name}_ffn_expand", function)
    project = _scaled(block, "ffn", _dense(block.ffn_project))
    branch = _pointwise(branch, project, block, f"{name}_ffn_project")
    return keras.layers.Add(dtype=dtype, name=f"{name}_ffn_add")([x, branch])


def _scaled(block: TransformerBlock | ConvNeXtBlock, branch: str, product: tuple) -> tuple:
    if block.layer_scale is None:
        return product
    return _before(product, (_value(getattr(block, f"{branch}_scale").scale), 0.0))


def _fused_head(layer: dict[str, keras.layers.Layer], x: Any) -> Any:
    affine = None
    norm_first = FINAL_NORM in layer and len(layer[FINAL_NORM].output.shape) == 4
    products = [layer[name] for name in (HIDDEN, CLASSIFIER) if name in layer]
    if norm_first:
        if products:  # the mean over the map is in between, which an affine map may pass
            x, affine = _norm_and_affine(layer[FINAL_NORM], x, FINAL_NORM)
        else:
            x = _kept_norm(layer[FINAL_NORM], x, FINAL_NORM, affine=True)
    for pooling in (AVG_POOL, MAX_POOL):
        if pooling in layer:
            x = _again(layer[pooling])(x)
    if FINAL_NORM in layer and not norm_first:
        x, affine = _norm_and_affine(layer[FINAL_NORM], x, FINAL_NORM)
    for product in products:
        folded = _dense(product) if affine is None else _after(affine, _dense(product))
        new = keras.layers.Dense.from_config({**_options(product), "use_bias": True})
        x, affine = _filled(new, x, *folded), None
    return x
