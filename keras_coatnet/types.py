"""Types that several files name."""

from __future__ import annotations

from typing import Any

# What a Keras layer takes and gives: a KerasTensor while a model is built, and the backend's own
# tensor (TensorFlow's, JAX's or torch's) while it runs. They have no common base class.
Tensor = Any

# Sizes of a tensor, None where a size is known only at run time.
Shape = tuple[int | None, ...]

# Sizes of a feature map: batch, height, width, channels. The number of channels is always known.
MapShape = tuple[int | None, int | None, int | None, int]

# A `keras.initializers.Initializer`. Type checkers take Keras's parameters for strings, because
# their defaults are strings.
Initializer = Any
