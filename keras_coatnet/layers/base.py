"""What the package's layers share: sublayers made in `build`, precision, initial values."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

PACKAGE = "keras_coatnet"


def kernel_initializer() -> keras.initializers.Initializer:
    """N(0, 0.02), for every kernel and table; a new one each time, so that no two are equal."""
    return keras.initializers.RandomNormal(stddev=0.02)


def full_precision(policy: keras.DTypePolicy) -> keras.DTypePolicy:
    """The policy for what must not be computed in half precision: at least float32."""
    if policy.compute_dtype in ("float16", "bfloat16"):
        return keras.DTypePolicy("float32")
    return policy


def check_choice(argument: str, value: Any, choices: tuple) -> None:
    """Refuses a value that is none of the choices.

    Args:
        argument: the argument's name.
        value: what came.
        choices: the values it may have.

    Raises:
        ValueError: the value is none of them.
    """
    if value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {argument}={value!r}"
        )


def spatial_size(x: Any) -> tuple[Any, Any]:
    """Height and width of a channels-last map: ints where they are static, else scalar tensors."""
    dynamic = ops.shape(x)
    return tuple(
        dynamic[axis] if static is None else static
        for axis, static in ((1, x.shape[1]), (2, x.shape[2]))
    )


class CompositeLayer(keras.layers.Layer):
    """A layer whose sublayers are made in `build`, and survive a change of their dtype policy.

    Keras's `quantize` changes the policy of the Dense layers inside. Those policies travel in the
    build configuration, so that a saved quantised model finds sublayers of the right kind again.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._policies: dict[str, Any] = {}
        self._sublayer_names: list[str] = []

    def add_sublayer(
        self, name: str, make: type[keras.layers.Layer], *args: Any, **kwargs: Any
    ) -> keras.layers.Layer:
        """Makes a sublayer under this layer's policy, or the one it was saved with.

        Args:
            name: the sublayer's name, and the attribute that will hold it.
            make: its class.
            *args: the class's positional arguments.
            **kwargs: its keyword arguments; a `dtype` among them goes before this layer's policy.

        Returns:
            The sublayer, not built yet.
        """
        dtype = kwargs.pop("dtype", self.dtype_policy)
        policy = self._policies.get(name)
        if isinstance(policy, str | dict) and "sublayers" not in policy:
            dtype = keras.dtype_policies.deserialize(policy)
        layer = make(*args, **kwargs, dtype=dtype, name=name)
        if isinstance(layer, CompositeLayer) and policy is not None:
            layer._policies = policy["sublayers"]
        setattr(self, name, layer)
        self._sublayer_names.append(name)
        return layer

    def _sublayer_policies(self) -> dict[str, Any]:
        policies = {}
        for name in self._sublayer_names:
            layer = getattr(self, name)
            if isinstance(layer, CompositeLayer):
                policies[name] = {"sublayers": layer._sublayer_policies()}
            else:
                policies[name] = keras.dtype_policies.serialize(layer.dtype_policy)
        return policies

    def get_build_config(self) -> dict[str, Any] | None:
        config = super().get_build_config()
        return config and {**config, "policies": self._sublayer_policies()}

    def build_from_config(self, config: dict[str, Any]) -> None:
        self._policies = config["policies"]
        super().build_from_config(
            {key: value for key, value in config.items() if key != "policies"}
        )
