"""Types that several files name."""

from __future__ import annotations

from typing import Any

# What a Keras layer takes and gives: a KerasTensor while a model is built, and the backend's own
# tensor (TensorFlow's, JAX's or torch's) while it runs. They have no common base class.
Tensor = Any
