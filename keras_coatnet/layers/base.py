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
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return keras.dtype_policies.DTypePolicyMap(
            full_precision(policy.default_policy),
            {path: full_precision(each) for path, each in policy.items()},
        )
    if policy.compute_dtype in ("float16", "bfloat16"):
        return keras.DTypePolicy("float32")
    return policy


def policy_at(policy: keras.DTypePolicy, path: str) -> keras.DTypePolicy:
    """The policy of the layer at a path, which a `DTypePolicyMap` looks up.

    Keras cannot quantize a Dense layer that holds a whole map.
    """
    return policy[path] if isinstance(policy, keras.dtype_policies.DTypePolicyMap) else policy


def spatial_size(x: Any) -> tuple[Any, Any]:
    """Height and width of a channels-last map: ints where they are static, else scalar tensors."""
    dynamic = ops.shape(x)
    return tuple(
        dynamic[axis] if static is None else static
        for axis, static in ((1, x.shape[1]), (2, x.shape[2]))
    )


# What `quantize` and `enable_lora` change in a sublayer's configuration.
_CHANGEABLE = ("dtype", "quantization_config", "lora_rank", "lora_alpha")


class CompositeLayer(keras.layers.Layer):
    """A layer whose sublayers are made in `build`, and keep what was changed in them since.

    Keras's `quantize` and `enable_lora` change the Dense layers inside. The changes are part of
    this layer's configuration, so that a saved, copied or cloned layer has sublayers of the right
    kind again, also where they are made in `__init__`.

    Args:
        sublayer_changes: what `get_config` returned under this name; None: nothing was changed.
        **kwargs: `keras.layers.Layer`'s own arguments.
    """

    def __init__(self, sublayer_changes: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._changes: dict[str, Any] = dict(sublayer_changes or {})
        self._originals: dict[str, dict[str, Any]] = {}

    def add_sublayer(
        self, name: str, make: type[keras.layers.Layer], *args: Any, **kwargs: Any
    ) -> keras.layers.Layer:
        """Makes a sublayer under this layer's policy, with the changes it was saved with.

        Args:
            name: the sublayer's name, and the attribute that will hold it.
            make: its class.
            *args: the class's positional arguments.
            **kwargs: its keyword arguments; a `dtype` among them goes before this layer's policy.

        Returns:
            The sublayer, not built yet.
        """
        options = {"dtype": self.dtype_policy, **kwargs, "name": name}
        changes = self._changes.get(name)
        if issubclass(make, CompositeLayer):
            layer, original = make(*args, sublayer_changes=changes, **options), {}
        else:
            options["dtype"] = policy_at(options["dtype"], f"{self.path}/{name}")
            layer = make(*args, **options)
            original = _changeable(layer)
            if changes is not None:
                layer = make.from_config({**layer.get_config(), **changes})
        setattr(self, name, layer)
        self._originals[name] = original
        return layer

    def _sublayer_changes(self) -> dict[str, Any]:
        changes = {}
        for name, original in self._originals.items():
            layer = getattr(self, name)
            if isinstance(layer, CompositeLayer):
                found = layer._sublayer_changes()
            else:
                now = _changeable(layer)
                found = {key: now[key] for key in now if now[key] != original.get(key)}
            if found:
                changes[name] = found
        return changes if self._originals else self._changes

    def get_config(self) -> dict[str, Any]:
        changes = self._sublayer_changes()
        return {**super().get_config(), **({"sublayer_changes": changes} if changes else {})}

    def build_from_config(self, config: dict[str, Any]) -> None:
        # Older files hold the policies of the sublayers here.
        config = dict(config)
        self._changes = self._changes or _as_changes(config.pop("policies", {}))
        super().build_from_config(config)


def _changeable(layer: keras.layers.Layer) -> dict[str, Any]:
    config = layer.get_config()
    return {key: _unshared(config[key]) for key in _CHANGEABLE if key in config}


def _unshared(value: Any) -> Any:
    """A serialized object without the mark that Keras adds while a whole model is read."""
    if not isinstance(value, dict):
        return value
    return {key: _unshared(part) for key, part in value.items() if key != "shared_object_id"}


def _as_changes(policies: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _as_changes(policy["sublayers"])
        if isinstance(policy, dict) and "sublayers" in policy
        else {"dtype": policy}
        for name, policy in policies.items()
    }
