"""What the layers' tests share; works alike on TensorFlow, JAX and torch."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_coatnet.config import CoAtNetConfig

Array = np.ndarray

# The possible values of the fields that take one of a few.
CHOICES: dict[str, tuple] = {
    field.name: field.metadata["check"].keywords["choices"]
    for field in dataclasses.fields(CoAtNetConfig)
    if "choices" in getattr(field.metadata["check"], "keywords", ())
}


class Precision(NamedTuple):
    """The dtype in which layers are compared with the reference, and how far they may be off."""

    dtype: str
    tolerance: float


def precision() -> Precision:
    """float64 on TensorFlow; float32 on JAX, which has no other by default, and on torch.

    On torch Keras's LayerNorm, BatchNorm and mean lose about 1e-7 even in float64.
    """
    if keras.backend.backend() == "tensorflow":
        return Precision("float64", 1e-12)
    return Precision("float32", 1e-5)


def bias_tolerance(computed: bool) -> float:
    """`precision().tolerance`, or more where relative biases are computed rather than looked up.

    The weights of a table's resize and the log-spaced offsets of the network are float32 in every
    layer.
    """
    return max(precision().tolerance, 3e-6) if computed else precision().tolerance


# --- values ----------------------------------------------------------------------------------


def to_numpy(x: Any) -> Array:
    """A tensor, variable or array as float64."""
    return np.asarray(keras.ops.convert_to_numpy(x)).astype("float64")


def random_map(*shape: int, seed: int = 0, dtype: str | None = None) -> Array:
    """Standard normal values that `dtype` (default: `precision().dtype`) holds, in that dtype."""
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype(dtype or precision().dtype)


def seedless(variables: Iterable[Any]) -> list[Any]:
    """The variables that are not the state of a random generator."""
    return [v for v in variables if "int" not in keras.backend.standardize_dtype(v.dtype)]


def path_within(layer: keras.layers.Layer, variable: Any) -> str:
    """Path of a variable inside the layer that holds it, e.g. `"expand/kernel"`."""
    return variable.path.removeprefix(f"{layer.name}/")


def randomize(layer: keras.layers.Layer, seed: int = 0) -> dict[str, Array]:
    """Gives every variable random values, and returns them in float64, by path.

    Kernels keep the size of what passes through them. Scales (gamma, LayerScale) have both signs:
    a negative one tells a maximum before the norm from one after it. Variances are positive.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for variable in seedless(layer.variables):
        path, shape = path_within(layer, variable), tuple(variable.shape)
        kind = path.rsplit("/", 1)[-1]
        if kind == "moving_variance":
            values = rng.uniform(0.5, 2.0, shape)
        elif kind in ("gamma", "scale"):
            values = rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
        elif kind == "kernel":
            # A depthwise kernel is (3, 3, channels, 1): each of its outputs sums nine products.
            inputs = np.prod(shape[:2]) if shape[-1] == 1 else np.prod(shape[:-1])
            values = rng.normal(size=shape) / np.sqrt(inputs)
        else:
            values = rng.normal(size=shape)
        variable.assign(values.astype(keras.backend.standardize_dtype(variable.dtype)))
        weights[path] = to_numpy(variable)
    return weights


def copy_weights(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies all weights of one built layer to another."""
    target.set_weights(source.get_weights())


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected value."""
    actual, expected = to_numpy(actual), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_matches(actual: Any, expected: Any, allowed: float | None = None) -> None:
    """Compares with the reference, to `precision().tolerance` where no other is given."""
    allowed = precision().tolerance if allowed is None else allowed
    error = relative_error(actual, expected)
    assert error <= allowed, f"off by {error:.2e} of the largest value; allowed: {allowed:.0e}"


# --- ways to call ----------------------------------------------------------------------------


def call_layer(layer: keras.layers.Layer, *inputs: Any, **kwargs: Any) -> Any:
    """Calls a built layer or model: on JAX as one compiled function, as `fit` and `predict` do.

    Called eagerly, JAX compiles each operation by itself for each shape, which takes longer than
    everything else in these tests.
    """
    if keras.backend.backend() != "jax":
        return layer(*inputs, **kwargs)
    import jax

    def compute(values: list, *inputs: Any) -> Any:
        with keras.StatelessScope(zip(layer.variables, values, strict=True)) as scope:
            output = layer(*inputs, **kwargs)
        return output, [scope.get_current_value(v) for v in layer.non_trainable_variables]

    output, state = jax.jit(compute)([variable.value for variable in layer.variables], *inputs)
    for variable, value in zip(layer.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return output


def outputs(model: keras.Model, images: Array) -> Array:
    """What a model computes at inference. `predict` would trace it first, which takes longer."""
    return keras.ops.convert_to_numpy(call_layer(model, images, training=False))


def with_unknown_size(layer: keras.layers.Layer) -> Callable[[Array], Any]:
    """A layer or model as a function of a map whose size is known only at run time.

    On TensorFlow that is a graph traced once, for no particular batch, height and width. The others
    know the sizes of what they compute on; there only symbolic calls are of unknown size.
    """
    if keras.backend.backend() != "tensorflow":
        return functools.partial(call_layer, layer)
    import tensorflow as tf

    @tf.function
    def call(x: Any) -> Any:
        return layer(x)

    def of_any_size(x: Array) -> Any:
        spec = tf.TensorSpec((None, None, None, x.shape[-1]), x.dtype)
        return call.get_concrete_function(spec)(tf.constant(x))

    return of_any_size


def cotangent_of(shape: Sequence[int]) -> Array:
    """The weights of the loss: random, since a plain sum of normalized values is constant."""
    return np.random.default_rng(99).normal(size=tuple(shape))


def loss_of(output: Any) -> float:
    """The loss that `gradients` differentiates: random weights times the output, summed."""
    output = to_numpy(output)
    return float((output * cotangent_of(output.shape)).sum())


def gradients(
    layer: keras.layers.Layer, *inputs: Any, unknown_size: bool = False, **kwargs: Any
) -> list[Array]:
    """Gradients of `loss_of(layer(*inputs, **kwargs))`, one array for each trainable variable.

    Args:
        layer: a built layer or model.
        *inputs: its positional arguments.
        unknown_size: whether to differentiate what `with_unknown_size` gives.
        **kwargs: its keyword arguments.

    Returns:
        float64 arrays in the order of `layer.trainable_variables`; zeros where a variable is not
        connected to the output.
    """
    variables = [variable.value for variable in layer.trainable_variables]
    cotangent = cotangent_of(_output_shape(layer, inputs, kwargs))
    differentiate = {
        "tensorflow": _tensorflow_gradients,
        "jax": _jax_gradients,
        "torch": _torch_gradients,
    }[keras.backend.backend()]
    found = differentiate(layer, variables, inputs, kwargs, cotangent, unknown_size)
    return [
        np.zeros(tuple(variable.shape)) if gradient is None else to_numpy(gradient)
        for variable, gradient in zip(variables, found, strict=True)
    ]


def _output_shape(layer: keras.layers.Layer, inputs: tuple, kwargs: dict) -> Sequence[int]:
    if not inputs:  # a relative position: its call takes sizes, not a tensor
        return layer(**kwargs).shape
    (x,) = inputs
    return layer.compute_output_shape(x.shape)


def assert_slopes(
    found: dict[str, Array],
    reference: Callable[[dict[str, Array]], Array],
    weights: dict[str, Array],
    allowed: float | None = None,
) -> None:
    """Compares gradients by path with finite differences of the reference, along random directions.

    `reference` computes the output from weights. One direction for each variable.
    """
    if allowed is None:
        allowed = 1e-5 if precision().dtype == "float64" else 1e-3
    rng = np.random.default_rng(7)
    largest = max(np.linalg.norm(gradient) for gradient in found.values())
    for path, gradient in found.items():
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        ahead, behind = (
            loss_of(reference({**weights, path: weights[path] + step * direction}))
            for step in (1e-5, -1e-5)
        )
        slope = (ahead - behind) / 2e-5
        assert abs((gradient * direction).sum() - slope) < allowed * largest, path


def _loss(output: Any, cotangent: Array) -> Any:
    return keras.ops.sum(output * keras.ops.cast(cotangent, output.dtype))


def _tensorflow_gradients(
    layer: Any, variables: list, inputs: tuple, kwargs: dict, cotangent: Array, unknown_size: bool
) -> list:
    import tensorflow as tf

    def compute(*inputs: Any) -> list:
        with tf.GradientTape() as tape:
            loss = _loss(layer(*inputs, **kwargs), cotangent)
        return tape.gradient(loss, variables)

    if unknown_size:
        specs = [tf.TensorSpec((None, None, None, x.shape[-1]), x.dtype) for x in inputs]
        compute = tf.function(compute, input_signature=specs)
    return compute(*inputs)


def _jax_gradients(
    layer: Any, variables: list, inputs: tuple, kwargs: dict, cotangent: Array, unknown_size: bool
) -> list:
    import jax

    fixed = [variable.value for variable in layer.non_trainable_variables]

    def compute(variables: list) -> Any:
        output, _ = layer.stateless_call(variables, fixed, *inputs, **kwargs)
        return _loss(output, cotangent)

    return jax.jit(jax.grad(compute))(variables)


def _torch_gradients(
    layer: Any, variables: list, inputs: tuple, kwargs: dict, cotangent: Array, unknown_size: bool
) -> list:
    import torch

    loss = _loss(layer(*inputs, **kwargs), cotangent)
    return list(torch.autograd.grad(loss, variables, allow_unused=True))


# --- checks that every layer gets ------------------------------------------------------------


def assert_gradients_reach(
    layer: keras.layers.Layer,
    *inputs: Any,
    without: Iterable[str] = (),
    unknown_size: bool = False,
    **kwargs: Any,
) -> dict[str, Array]:
    """Asserts a finite gradient, not all zero, for every trainable variable; returns them by path.

    `without` ends the paths of variables that the output provably does not depend on; their
    gradients must vanish.
    """
    found = gradients(layer, *inputs, unknown_size=unknown_size, **kwargs)
    paths = [path_within(layer, variable) for variable in layer.trainable_variables]
    by_path = dict(zip(paths, found, strict=True))
    largest = max(np.abs(gradient).max() for gradient in found)
    unmet = set(without)
    for path, gradient in by_path.items():
        assert np.isfinite(gradient).all(), path
        matched = {suffix for suffix in without if path.endswith(suffix)}
        unmet -= matched
        if matched:
            assert np.abs(gradient).max() < 1e-5 * largest, path
        else:
            assert np.abs(gradient).max() > 1e-5 * largest, path
    assert not unmet
    return by_path


def assert_same_after_serialization(
    layer: keras.layers.Layer, *inputs: Any, **kwargs: Any
) -> keras.layers.Layer:
    """Asserts that a layer made from the serialized one computes the same; returns it."""
    expected = call_layer(layer, *inputs, **kwargs)
    config = keras.saving.serialize_keras_object(layer)
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is type(layer)
    assert restored.get_config() == layer.get_config()
    if not restored.built:
        restored(*inputs, **kwargs)
    copy_weights(layer, restored)
    found = call_layer(restored, *inputs, **kwargs)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))
    return restored


def assert_config_covers(layer: keras.layers.Layer, arguments: dict[str, Any]) -> None:
    """Asserts that `get_config` gives back every argument of the constructor.

    `arguments`, with which the layer was made, must give each a value that is not its default.
    """
    parameters = inspect.signature(type(layer).__init__).parameters
    own = {
        name: parameter
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert set(own) == set(arguments)
    config = layer.get_config()
    for name, parameter in own.items():
        assert arguments[name] != parameter.default, f"{name} is at its default"
        given = config[name]
        assert (tuple(given) if isinstance(given, list) else given) == arguments[name], name
    assert type(layer).from_config(config).get_config() == config


def assert_shapes(layer: keras.layers.Layer, x: Array, width: int | None = None) -> None:
    """Asserts the output's shape as computed, real and symbolic with unknown sizes.

    `width` is of the output; None: as of the input.
    """
    width = x.shape[-1] if width is None else width
    layer.build(x.shape)
    output = call_layer(layer, x)
    assert tuple(layer.compute_output_shape(x.shape)) == tuple(output.shape)
    assert output.shape[-1] == width
    unknown = (None, None, None, x.shape[-1])
    assert tuple(layer.compute_output_shape(unknown)) == (None, None, None, width)
    symbolic = layer(keras.Input(unknown[1:], dtype=layer.compute_dtype))
    assert tuple(symbolic.shape) == (None, None, None, width)


def assert_initial_values(layer: keras.layers.Layer) -> None:
    """Asserts what a layer starts from: kernels and tables N(0, 0.02), biases 0, norms 1 and 0."""
    drawn = []
    for variable in seedless(layer.variables):
        kind, values = path_within(layer, variable).rsplit("/", 1)[-1], to_numpy(variable)
        if kind in ("kernel", "table"):
            drawn.append(values.ravel())
        else:
            expected = {"gamma": 1.0, "moving_variance": 1.0}.get(kind, 0.0)
            np.testing.assert_array_equal(values, np.full(values.shape, expected), kind)
    # No two start alike, as they would if they shared an initializer with a seed.
    for one, other in itertools.combinations(drawn, 2):
        count = min(len(one), len(other))
        assert not np.array_equal(one[:count], other[:count])
    drawn = np.concatenate(drawn)
    assert abs(drawn.mean()) < 4 * 0.02 / np.sqrt(len(drawn))
    assert abs(drawn.std() / 0.02 - 1) < 4 / np.sqrt(2 * len(drawn))
    # A truncated normal would stop at two standard deviations.
    assert np.abs(drawn).max() > 2.2 * 0.02


# --- choice of cases -------------------------------------------------------------------------


def pairwise(options: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which every value of every option meets every value of every other one.

    A full product would be thousands of cases; two switches that disturb each other show in these.
    Greedy: each case starts from a pair not met yet, and takes what meets most others.

    Which switches disturb each other is a matter of our code, which TensorFlow shows. The other
    backends show that each of the values is computed alike there: every value is in one case.
    """
    if keras.backend.backend() != "tensorflow":
        count = max(map(len, options.values()))
        return [{name: v[i % len(v)] for name, v in options.items()} for i in range(count)]

    def pairs_of(case: dict[str, int]) -> set:
        return set(itertools.combinations(((n, case[n]) for n in options if n in case), 2))

    missing = set()
    for one, other in itertools.combinations(options, 2):
        for i, j in itertools.product(range(len(options[one])), range(len(options[other]))):
            missing |= pairs_of({one: i, other: j})
    cases = []
    while missing:
        case = dict(min(missing))
        for name, values in options.items():
            if name not in case:
                gains = [
                    len(pairs_of({**case, name: index}) & missing) for index in range(len(values))
                ]
                case[name] = gains.index(max(gains))
        missing -= pairs_of(case)
        cases.append({name: options[name][case[name]] for name in options})
    return cases


def case_id(case: dict[str, Any]) -> str:
    """A case of `pairwise` as a short test id."""
    return "-".join(
        "x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in case.values()
    )
