"""Squeeze-and-excitation (Hu et al., 2018)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import whole_number
from keras_coatnet.layers.activations import get_activation
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, kernel_initializer


@keras.saving.register_keras_serializable(PACKAGE)
class SqueezeExcite(CompositeLayer):
    """Scales each channel by a gate computed from the means of all channels over the map.

    mean over the map -> dense to `squeezed_filters` -> activation -> dense -> sigmoid -> product.

    Args:
        squeezed_filters: channels between the two dense layers, at least 1.
        activation: `"silu"`, `"relu"`, `"gelu"` or `"gelu_tanh"`.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input and output shape: `(batch, height, width, channels)`.

    Raises:
        ValueError: `squeezed_filters` is no whole number of at least 1, or there is no such
            activation.

    Example:
        >>> SqueezeExcite(8)(keras.ops.ones((2, 7, 7, 32))).shape == (2, 7, 7, 32)
        True
    """

    def __init__(self, squeezed_filters: int, activation: str = "silu", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.squeezed_filters = whole_number("squeezed_filters", squeezed_filters)
        self.activation = activation
        self._activate = get_activation(activation)

    def build(self, input_shape: tuple) -> None:
        channels = input_shape[-1]
        for name, width in (("squeeze", self.squeezed_filters), ("excite", channels)):
            self.add_sublayer(
                name, keras.layers.Dense, width, kernel_initializer=kernel_initializer()
            )
        self.squeeze.build((input_shape[0], channels))
        self.excite.build((input_shape[0], self.squeezed_filters))
        self.built = True

    def call(self, x: Any) -> Any:
        gate = self.excite(self._activate(self.squeeze(self.mean(x))))
        return x * ops.sigmoid(gate)[:, None, None, :]

    def mean(self, x: Any) -> Any:
        """The mean of each channel over the map."""
        return ops.mean(x, axis=(1, 2))

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "squeezed_filters": self.squeezed_filters,
            "activation": self.activation,
        }
