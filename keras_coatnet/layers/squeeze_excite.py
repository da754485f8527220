"""Squeeze-and-excitation (Hu et al., 2018)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import whole_number
from keras_coatnet.layers.activations import get_activation
from keras_coatnet.layers.base import PACKAGE, CompositeLayer
from keras_coatnet.types import MapShape, Tensor


@keras.saving.register_keras_serializable(PACKAGE)
class SqueezeExcite(CompositeLayer):
    """Scales each channel by a gate that is computed from the means of all channels.

    The gate is: mean over the map; dense layer to `squeezed_filters`, activation; dense layer to
    the number of channels, sigmoid.

    Args:
        squeezed_filters: number of channels between the two dense layers, at least 1.
        activation: `"silu"`, `"relu"`, `"gelu"` or `"gelu_tanh"`.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input and output shape: `(batch, height, width, channels)`.

    Raises:
        ValueError: `squeezed_filters` is not a whole number of at least 1, or there is no such
            activation.

    Example:
        >>> SqueezeExcite(8)(keras.ops.ones((2, 7, 7, 32))).shape == (2, 7, 7, 32)
        True
    """

    def __init__(self, squeezed_filters: int, activation: str = "silu", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.squeezed_filters = whole_number("squeezed_filters", squeezed_filters)
        self.activation = activation
        self._activation = get_activation(activation)

    def build(self, input_shape: MapShape) -> None:
        batch, _, _, channels = input_shape
        squeezed = self.squeezed_filters
        self.squeeze = self.build_dense("squeeze", squeezed, (batch, channels))
        self.excite = self.build_dense("excite", channels, (batch, squeezed))
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        gate = self.mean(x)  # (batch, channels)
        gate = self._activation(self.squeeze(gate))  # (batch, squeezed_filters)
        gate = ops.sigmoid(self.excite(gate))  # (batch, channels)
        # (batch, height, width, channels)
        return x * gate[:, None, None, :]  # pyright: ignore[reportOptionalSubscript]  # never None

    def mean(self, x: Tensor) -> Tensor:
        """Returns the mean of each channel over the map, `(batch, channels)`."""
        return ops.mean(x, axis=(1, 2))

    def compute_output_shape(self, input_shape: MapShape) -> MapShape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "squeezed_filters": self.squeezed_filters,
            "activation": self.activation,
        }
