"""The network's parts in plain NumPy, float64, loop by loop from their definitions.

Written apart from the package, so that a mistake in one is not a mistake in the other: positions
and windows are Python loops, padding is "this position is outside, leave it out". Slow, for maps
of a few pixels.

Maps are `(batch, height, width, channels)`. `weights` maps the path of a variable inside its layer,
e.g. `"expand/kernel"`, to an array; a bias that is not there is not added.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]

# --- activations -----------------------------------------------------------------------------


def gelu(x: Array) -> Array:
    """`x * Phi(x)`, with the error function."""
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.flat]).reshape(x.shape)


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of GELU (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: Array) -> Array:
    """`1 / (1 + exp(-x))`, through tanh so that no x overflows."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def silu(x: Array) -> Array:
    """`x * sigmoid(x)`."""
    return x * sigmoid(x)


def relu(x: Array) -> Array:
    """`max(x, 0)`."""
    return np.where(x > 0, x, 0.0)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "relu": relu,
}

# --- convolution, pooling, dense -------------------------------------------------------------


def _windows(size: int, kernel: int, strides: int, padding: str) -> list[list[tuple[int, int]]]:
    """For each output position along one axis, its (tap, input position) pairs inside the map.

    "same": ceil(size / strides) outputs, what has to be padded is shared out, the odd one at the
    end. "symmetric": kernel // 2 at both ends. "valid": none.
    """
    if padding == "same":
        count = math.ceil(size / strides)
        before = max((count - 1) * strides + kernel - size, 0) // 2
    else:
        before = kernel // 2 if padding == "symmetric" else 0
        count = (size + 2 * before - kernel) // strides + 1
    return [
        [
            (tap, position * strides - before + tap)
            for tap in range(kernel)
            if 0 <= position * strides - before + tap < size
        ]
        for position in range(count)
    ]


def _positions(
    x: Array, kernel: tuple[int, int], strides: int, padding: str
) -> tuple[tuple[int, int], Iterator[tuple[int, int, list[tuple[int, int, int, int]]]]]:
    """Size of the output map, and for each of its positions the taps (a, b) on inputs (r, c)."""
    rows = _windows(x.shape[1], kernel[0], strides, padding)
    columns = _windows(x.shape[2], kernel[1], strides, padding)

    def positions() -> Iterator[tuple[int, int, list[tuple[int, int, int, int]]]]:
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                yield i, j, [(a, b, r, c) for a, r in row for b, c in column]

    return (len(rows), len(columns)), positions()


def conv2d(
    x: Array, kernel: Array, bias: Array | None = None, strides: int = 1, padding: str = "same"
) -> Array:
    """Convolution with a kernel of (rows, columns, channels in, channels out)."""
    size, positions = _positions(x, kernel.shape[:2], strides, padding)
    out = np.zeros((len(x), *size, kernel.shape[3]))
    for i, j, taps in positions:
        for a, b, r, c in taps:
            out[:, i, j] += x[:, r, c] @ kernel[a, b]
    return out if bias is None else out + bias


def depthwise_conv2d(
    x: Array, kernel: Array, bias: Array | None = None, strides: int = 1, padding: str = "same"
) -> Array:
    """Convolution of each channel on its own; the kernel is (rows, columns, channels, multiplier).

    All that is made of one channel stands together.
    """
    size, positions = _positions(x, kernel.shape[:2], strides, padding)
    multiplier = kernel.shape[3]
    out = np.zeros((len(x), *size, x.shape[3] * multiplier))
    for i, j, taps in positions:
        for (a, b, r, c), number in itertools.product(taps, range(multiplier)):
            out[:, i, j, number::multiplier] += x[:, r, c] * kernel[a, b, :, number]
    return out if bias is None else out + bias


def _pool(x: Array, window: int, padding: str, reduce: Callable[[Array], Array]) -> Array:
    size, positions = _positions(x, (window, window), 2, padding)
    out = np.zeros((len(x), *size, x.shape[3]))
    for i, j, taps in positions:
        out[:, i, j] = reduce(np.stack([x[:, r, c] for _, _, r, c in taps]))
    return out


def max_pool(x: Array) -> Array:
    """Maximum of 2x2 windows two apart; an odd last row or column makes a window of its own."""
    return _pool(x, 2, "same", lambda values: values.max(axis=0))


def avg_pool(x: Array) -> Array:
    """Mean of 2x2 windows two apart; at an odd end, of the positions that there are."""
    return _pool(x, 2, "same", lambda values: values.mean(axis=0))


def max_pool_3x3(x: Array) -> Array:
    """Maximum of the 3x3 windows centered on every other position, whatever of them is inside."""
    return _pool(x, 3, "symmetric", lambda values: values.max(axis=0))


POOLS: dict[str, Callable[[Array], Array]] = {
    "max2": max_pool,
    "avg2": avg_pool,
    "max3": max_pool_3x3,
}


def dense(x: Array, weights: Weights, name: str) -> Array:
    """The dense layer of that name, over the last axis."""
    return x @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", 0.0)


# --- normalization ---------------------------------------------------------------------------


def batch_norm(
    x: Array, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float
) -> Array:
    """BatchNorm with given statistics of each channel."""
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


def batch_statistics(x: Array) -> tuple[Array, Array]:
    """Mean and (biased) variance of each channel over samples and positions."""
    values = x.reshape(-1, x.shape[-1])
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def layer_norm(x: Array, gamma: Array, beta: Array, epsilon: float) -> Array:
    """LayerNorm over the channels of each position."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


class BatchNorms:
    """The BatchNorms of a layer, by name.

    At inference they use the moving statistics. In training they use the batch's, and `moved`
    collects what the moving ones become.
    """

    def __init__(
        self, weights: Weights, epsilon: float, training: bool = False, momentum: float = 0.99
    ) -> None:
        self.weights = weights
        self.epsilon = epsilon
        self.training = training
        self.momentum = momentum
        self.moved: dict[str, Array] = {}

    def __call__(self, x: Array, name: str) -> Array:
        """Normalizes by the BatchNorm of that name."""
        moving = {key: self.weights[f"{name}/moving_{key}"] for key in ("mean", "variance")}
        mean, variance = moving["mean"], moving["variance"]
        if self.training:
            mean, variance = batch_statistics(x)
            for key, new in (("mean", mean), ("variance", variance)):
                self.moved[f"{name}/moving_{key}"] = (
                    self.momentum * moving[key] + (1 - self.momentum) * new
                )
        gamma, beta = self.weights[f"{name}/gamma"], self.weights[f"{name}/beta"]
        return batch_norm(x, gamma, beta, mean, variance, self.epsilon)


# --- relative position -----------------------------------------------------------------------


def resize_bilinear(image: Array, rows: int, columns: int) -> Array:
    """Bilinear resize of (..., rows, columns) with half-pixel centers, without antialiasing."""

    def neighbors(position: int, source: int, target: int) -> tuple[int, int, float]:
        center = (position + 0.5) * source / target - 0.5
        center = min(max(center, 0.0), source - 1.0)
        first = math.floor(center)
        return first, min(first + 1, source - 1), center - first

    out = np.zeros((*image.shape[:-2], rows, columns))
    for i in range(rows):
        top, bottom, down = neighbors(i, image.shape[-2], rows)
        for j in range(columns):
            left, right, across = neighbors(j, image.shape[-1], columns)
            out[..., i, j] = (
                (1 - down) * (1 - across) * image[..., top, left]
                + (1 - down) * across * image[..., top, right]
                + down * (1 - across) * image[..., bottom, left]
                + down * across * image[..., bottom, right]
            )
    return out


def fit_table(table: Array, height: int, width: int) -> Array:
    """A table of relative biases for a map of that size: one value a head and offset."""
    return resize_bilinear(table, 2 * height - 1, 2 * width - 1)


def mlp_offsets(weights: Weights, height: int, width: int, prefix: str = "") -> Array:
    """One value a head and offset, from the two layers over log-spaced offsets of key to query."""

    def log_spaced(offset: int) -> float:
        return math.copysign(math.log(1 + abs(offset)), offset)

    heads = weights[f"{prefix}values/kernel"].shape[1]
    out = np.zeros((heads, 2 * height - 1, 2 * width - 1))
    for down in range(-height + 1, height):
        for across in range(-width + 1, width):
            offset = np.array([log_spaced(down), log_spaced(across)])
            hidden = relu(dense(offset, weights, f"{prefix}hidden"))
            values = dense(hidden, weights, f"{prefix}values")
            out[:, down + height - 1, across + width - 1] = values
    return out


def spread_to_pairs(offsets: Array, height: int, width: int) -> Array:
    """The bias of every query on every key, from one value a head and offset."""
    out = np.zeros((len(offsets), height * width, height * width))
    for i, j, k, m in itertools.product(range(height), range(width), range(height), range(width)):
        bias = offsets[:, k - i + height - 1, m - j + width - 1]
        out[:, i * width + j, k * width + m] = bias
    return out


def offsets_of(weights: Weights, height: int, width: int) -> Array:
    """The offsets' values of an attention layer, from its table or its network."""
    if "position/table" in weights:
        return fit_table(weights["position/table"], height, width)
    return mlp_offsets(weights, height, width, "position/")


# --- the layers ------------------------------------------------------------------------------


def squeeze_excite(x: Array, weights: Weights, activation: str = "silu") -> Array:
    """Means over the map -> dense -> activation -> dense -> sigmoid, times the map."""
    means = sum(x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2]))
    means = means / (x.shape[1] * x.shape[2])
    hidden = ACTIVATIONS[activation](dense(means, weights, "squeeze"))
    gate = sigmoid(dense(hidden, weights, "excite"))
    return x * gate[:, None, None, :]


def attention(x: Array, weights: Weights, head_dim: int, offsets: Array | None = None) -> Array:
    """Relative self-attention: each query on each key, one pair of positions at a time.

    `offsets` is (heads, 2 * height - 1, 2 * width - 1); None: what the weights make for the map.
    """
    batch, height, width, _ = x.shape
    offsets = offsets_of(weights, height, width) if offsets is None else offsets
    heads = len(offsets)
    query, key, value = (
        dense(x, weights, name).reshape(batch, height, width, heads, head_dim)
        for name in ("query", "key", "value")
    )
    mixed = np.zeros((batch, height, width, heads, head_dim))
    for head in range(heads):
        for i, j in itertools.product(range(height), range(width)):
            logits = np.zeros((batch, height, width))
            for k, m in itertools.product(range(height), range(width)):
                scaled = query[:, i, j, head] * head_dim**-0.5
                logits[:, k, m] = (scaled * key[:, k, m, head]).sum(axis=-1)
                logits[:, k, m] += offsets[head, k - i + height - 1, m - j + width - 1]
            share = np.exp(logits - logits.max(axis=(1, 2), keepdims=True))
            share /= share.sum(axis=(1, 2), keepdims=True)
            for k, m in itertools.product(range(height), range(width)):
                mixed[:, i, j, head] += share[:, k, m, None] * value[:, k, m, head]
    return dense(mixed.reshape(batch, height, width, heads * head_dim), weights, "projection")


def within(weights: Weights, name: str) -> dict[str, Array]:
    """The weights of one sublayer, by their paths inside it."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}


def mbconv_branches(
    x: Array,
    weights: Weights,
    norms: BatchNorms,
    *,
    strides: int = 1,
    stride_on: str = "expansion",
    pool: str = "max2",
    stride_pool: str = "avg2",
    padding: str = "same",
    activation: str = "gelu_tanh",
    prenorm_activation: bool = False,
    squeeze_activation: str = "silu",
    squeeze_place: str = "after_norm",
) -> tuple[Array, Array]:
    """Shortcut and residual branch of an MBConv block; whatever has no weights is not there."""
    activate = ACTIVATIONS[activation]
    halves = {place: strides == 2 and stride_on == place for place in ("pool", "expansion")}
    depthwise_strides = strides if stride_on == "depthwise" else 1

    y = norms(x, "input_norm")
    if prenorm_activation:
        y = activate(y)
    if halves["pool"]:
        y = POOLS[stride_pool](y)
    y = conv2d(y, weights["expand/kernel"], strides=2 if halves["expansion"] else 1)
    y = activate(norms(y, "expand_norm"))
    y = depthwise_conv2d(
        y,
        weights["depthwise/kernel"],
        strides=depthwise_strides,
        padding=padding if depthwise_strides == 2 else "same",
    )
    squeeze_weights = within(weights, "squeeze_excite")
    if squeeze_place == "before_norm":
        y = squeeze_excite(y, squeeze_weights, squeeze_activation)
    y = activate(norms(y, "depthwise_norm"))
    if squeeze_place == "after_norm":
        y = squeeze_excite(y, squeeze_weights, squeeze_activation)
    y = conv2d(y, weights["project/kernel"], weights.get("project/bias"))

    shortcut = POOLS[pool](x) if strides == 2 else x
    if "shortcut/kernel" in weights:
        shortcut = conv2d(shortcut, weights["shortcut/kernel"], weights.get("shortcut/bias"))
    return shortcut, y


def mbconv(x: Array, weights: Weights, norms: BatchNorms, **switches: object) -> Array:
    """An MBConv block: `mbconv_branches`, added."""
    shortcut, branch = mbconv_branches(x, weights, norms, **switches)
    return shortcut + branch


def convnext_branches(
    x: Array,
    weights: Weights,
    *,
    strides: int = 1,
    stride_on: str = "depthwise",
    pool: str = "avg2",
    stride_pool: str = "avg2",
    padding: str = "same",
    activation: str = "gelu",
    norm_epsilon: float = 1e-6,
) -> tuple[Array, Array]:
    """Shortcut and residual branch of a ConvNeXt block; whatever has no weights is not there."""
    y = POOLS[stride_pool](x) if strides == 2 and stride_on == "pool" else x
    depthwise_strides = strides if stride_on == "depthwise" else 1
    y = depthwise_conv2d(
        y,
        weights["depthwise_conv/kernel"],
        weights.get("depthwise_conv/bias"),
        strides=depthwise_strides,
        padding=padding if depthwise_strides == 2 else "same",
    )
    y = layer_norm(y, weights["ffn_norm/gamma"], weights["ffn_norm/beta"], norm_epsilon)
    y = dense(ACTIVATIONS[activation](dense(y, weights, "ffn_expand")), weights, "ffn_project")
    y = y * weights.get("ffn_scale/scale", 1.0)

    shortcut = POOLS[pool](x) if strides == 2 else x
    return (dense(shortcut, weights, "shortcut") if "shortcut/kernel" in weights else shortcut), y


def convnext(x: Array, weights: Weights, **switches: object) -> Array:
    """A ConvNeXt block: `convnext_branches`, added."""
    shortcut, branch = convnext_branches(x, weights, **switches)
    return shortcut + branch


def _transformer_norm(
    x: Array, weights: Weights, name: str, epsilon: float, norms: BatchNorms | None
) -> Array:
    if norms is not None:
        return norms(x, name)
    return layer_norm(x, weights[f"{name}/gamma"], weights[f"{name}/beta"], epsilon)


def transformer_attention_branches(
    x: Array,
    weights: Weights,
    *,
    head_dim: int,
    strides: int = 1,
    pool: str = "max2",
    norm_epsilon: float = 1e-5,
    norms: BatchNorms | None = None,
) -> tuple[Array, Array]:
    """Shortcut and residual branch of a Transformer block's first half."""
    y = _transformer_norm(x, weights, "attention_norm", norm_epsilon, norms)
    if strides == 2:
        x, y = POOLS[pool](x), POOLS[pool](y)
    y = attention(y, within(weights, "attention"), head_dim)
    y = y * weights.get("attention_scale/scale", 1.0)
    return (dense(x, weights, "shortcut") if "shortcut/kernel" in weights else x), y


def transformer_ffn_branch(
    x: Array,
    weights: Weights,
    *,
    ffn_activation: str = "gelu_tanh",
    norm_epsilon: float = 1e-5,
    norms: BatchNorms | None = None,
) -> Array:
    """Residual branch of a Transformer block's second half."""
    y = _transformer_norm(x, weights, "ffn_norm", norm_epsilon, norms)
    y = ACTIVATIONS[ffn_activation](dense(y, weights, "ffn_expand"))
    return dense(y, weights, "ffn_project") * weights.get("ffn_scale/scale", 1.0)


def transformer_block(
    x: Array,
    weights: Weights,
    *,
    head_dim: int,
    strides: int = 1,
    pool: str = "max2",
    norm_epsilon: float = 1e-5,
    norms: BatchNorms | None = None,
    ffn_activation: str = "gelu_tanh",
) -> Array:
    """A Transformer block with LayerNorm, or with the BatchNorms given."""
    shared = {"norm_epsilon": norm_epsilon, "norms": norms}
    shortcut, branch = transformer_attention_branches(
        x, weights, head_dim=head_dim, strides=strides, pool=pool, **shared
    )
    x = shortcut + branch
    return x + transformer_ffn_branch(x, weights, ffn_activation=ffn_activation, **shared)


# --- the network's two ends ------------------------------------------------------------------


def stem(
    x: Array,
    weights: Weights,
    norms: Callable[[Array, str], Array],
    *,
    activation: str = "gelu_tanh",
    padding: str = "same",
) -> Array:
    """3x3 of stride 2 -> norm -> activation -> 3x3; nothing after the second one."""
    y = conv2d(
        x, weights["stem_conv1/kernel"], weights.get("stem_conv1/bias"), strides=2, padding=padding
    )
    y = ACTIVATIONS[activation](norms(y, "stem_norm"))
    return conv2d(y, weights["stem_conv2/kernel"], weights.get("stem_conv2/bias"))


def head(
    x: Array,
    weights: Weights,
    *,
    final_norm: str | None = "after_pool",
    norm_epsilon: float = 1e-5,
    norms: BatchNorms | None = None,
) -> Array:
    """Mean over the map, norm, the hidden tanh layer if there is one, and the classifier's logits.

    `final_norm` is `"after_pool"`, `"before_pool"` or None; of LayerNorm, or of the BatchNorms.
    """
    if final_norm == "before_pool":
        x = _transformer_norm(x, weights, "norm", norm_epsilon, norms)
    x = sum(x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])) / (
        x.shape[1] * x.shape[2]
    )
    if final_norm == "after_pool":
        x = _transformer_norm(x, weights, "norm", norm_epsilon, norms)
    if "hidden/kernel" in weights:
        x = np.tanh(dense(x, weights, "hidden"))
    return dense(x, weights, "predictions")
