"""What the package's layers share: initial values, dtype policies and sublayers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_coatnet.types import Initializer, Shape

# The package under which Keras registers the layers: part of their names in saved files.
PACKAGE = "keras_coatnet"


def kernel_initializer() -> Initializer:
    """Returns N(0, 0.02), the initial values of every kernel and table.

    Each call returns a new initializer: one that is used twice gives the same values twice.
    """
    return keras.initializers.RandomNormal(stddev=0.02)


def full_precision(policy: keras.DTypePolicy) -> keras.DTypePolicy:
    """Returns a policy of at least float32, for what must not be computed in half precision."""
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return keras.dtype_policies.DTypePolicyMap(
            full_precision(policy.default_policy),
            {path: full_precision(each) for path, each in policy.items()},
        )
    if policy.compute_dtype in ("float16", "bfloat16"):
        return keras.DTypePolicy("float32")
    return policy


def policy_at(policy: keras.DTypePolicy, path: str) -> keras.DTypePolicy:
    """Returns the policy of the layer at a path, which a `DTypePolicyMap` looks up.

    A sublayer gets this single policy, not the map: Keras cannot quantize a layer with a map.
    """
    return policy[path] if isinstance(policy, keras.dtype_policies.DTypePolicyMap) else policy


# The entries of a layer's configuration that `quantize` and `enable_lora` change.
_CHANGEABLE = ("dtype", "quantization_config", "lora_rank", "lora_alpha")


class CompositeLayer(keras.layers.Layer):
    """A layer that makes its sublayers in `build`, and saves how they were changed since.

    Keras's `quantize` and `enable_lora` change the sublayers of a built layer. The changes are part
    of this layer's configuration, so that a saved, copied or cloned layer makes sublayers of the
    same kind.

    A subclass passes `sublayer_options(name)` to each Keras layer that it makes, or
    `composite_options(name)` to each `CompositeLayer`, and assigns it to the attribute `name`.
    `build_dense(name, ...)` makes a dense layer.

    Args:
        sublayer_changes: the entry of that name in `get_config`; None: no sublayer was changed.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Example:
        >>> class Projection(CompositeLayer):
        ...     def build(self, input_shape):
        ...         self.dense = self.build_dense("dense", 4, input_shape)
        ...
        ...     def call(self, x):
        ...         return self.dense(x)
        >>> Projection()(keras.ops.ones((2, 3))).shape == (2, 4)
        True
    """

    def __init__(self, sublayer_changes: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._saved_changes: dict[str, Any] = dict(sublayer_changes or {})
        # By name, the entries of `_CHANGEABLE` that a sublayer has when it is made anew.
        self._original_entries: dict[str, dict[str, Any]] = {}

    def sublayer_options(self, name: str, dtype: keras.DTypePolicy | None = None) -> dict[str, Any]:
        """Returns the keyword arguments that one of Keras's layers is made with as a sublayer.

        Args:
            name: the sublayer's name, and the attribute that holds it.
            dtype: its dtype policy; None: this layer's.

        Returns:
            Its `name`, its `dtype`, and what was changed in it when this layer was saved.
        """
        policy = policy_at(dtype or self.dtype_policy, f"{self.path}/{name}")
        serialized = keras.dtype_policies.serialize(policy)
        self._original_entries[name] = {"dtype": _without_shared_object_ids(serialized)}
        changes = {
            key: keras.saving.deserialize_keras_object(value)
            for key, value in self._saved_changes.get(name, {}).items()
        }
        return {"name": name, "dtype": policy, **changes}

    def composite_options(
        self, name: str, dtype: keras.DTypePolicy | None = None
    ) -> dict[str, Any]:
        """Returns the keyword arguments that a `CompositeLayer` is made with as a sublayer.

        Args:
            name: the sublayer's name, and the attribute that holds it.
            dtype: its dtype policy; None: this layer's.

        Returns:
            Its `name`, its `dtype`, and the `sublayer_changes` inside it.
        """
        self._original_entries[name] = {}
        return {
            "name": name,
            "dtype": dtype or self.dtype_policy,
            "sublayer_changes": self._saved_changes.get(name),
        }

    def build_dense(
        self,
        name: str,
        units: int,
        input_shape: Shape,
        use_bias: bool = True,
        activation: str | Callable | None = None,
    ) -> keras.layers.Dense:
        """Makes and builds a dense layer as a sublayer.

        Args:
            name: the sublayer's name, and the attribute that holds it.
            units: number of channels of its output.
            input_shape: shape of its input.
            use_bias: whether it has a bias.
            activation: its activation; None: none.

        Returns:
            The layer.
        """
        layer = keras.layers.Dense(
            units,
            activation,
            use_bias,
            kernel_initializer=kernel_initializer(),
            **self.sublayer_options(name),
        )
        layer.build(input_shape)
        return layer

    def get_config(self) -> dict[str, Any]:
        changes = self._sublayer_changes()
        return {**super().get_config(), **({"sublayer_changes": changes} if changes else {})}

    def _sublayer_changes(self) -> dict[str, Any]:
        if not self._original_entries:  # not built yet
            return self._saved_changes
        changes = {}
        for name, original in self._original_entries.items():
            sublayer = getattr(self, name)
            if isinstance(sublayer, CompositeLayer):
                found = sublayer._sublayer_changes()
            else:
                current = _changeable_entries(sublayer)
                found = {key: value for key, value in current.items() if value != original.get(key)}
            if found:
                changes[name] = found
        return changes


def _changeable_entries(layer: keras.layers.Layer) -> dict[str, Any]:
    config = layer.get_config()
    return {key: _without_shared_object_ids(config[key]) for key in _CHANGEABLE if key in config}


def _without_shared_object_ids(value: Any) -> Any:
    """A serialized object without the ids that Keras adds while it reads or writes a model."""
    if not isinstance(value, dict):
        return value
    return {
        key: _without_shared_object_ids(part)
        for key, part in value.items()
        if key != "shared_object_id"
    }
