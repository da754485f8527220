"""LayerScale (Touvron et al., 2021)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import number
from keras_coatnet.layers.base import PACKAGE
from keras_coatnet.types import Shape, Tensor


@keras.saving.register_keras_serializable(PACKAGE)
class LayerScale(keras.layers.Layer):
    """Multiplies each channel by a trainable scale.

    Args:
        initial_scale: initial value of the scales.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input and output shape: `(..., channels)`.

    Raises:
        ValueError: `initial_scale` is not a finite number.

    Example:
        >>> LayerScale(1e-6)(keras.ops.ones((2, 7, 7, 64))).shape == (2, 7, 7, 64)
        True
    """

    def __init__(self, initial_scale: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initial_scale = number("initial_scale", initial_scale)

    def build(self, input_shape: Shape) -> None:
        self.scale = self.add_weight(
            name="scale",
            shape=(input_shape[-1],),
            initializer=keras.initializers.Constant(self.initial_scale),
        )
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        return x * ops.cast(self.scale, x.dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "initial_scale": self.initial_scale}
