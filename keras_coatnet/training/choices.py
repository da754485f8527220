"""The values that a recipe's named choices may have.

The command line, `Recipe` and the parts that carry a choice out all read them here. Nothing is
imported, so that `keras-coatnet train --help` needs neither Keras nor TensorFlow.
"""

from __future__ import annotations

TENSORFLOW_STRATEGIES = ("one_device", "mirrored", "multi_worker", "tpu")
JAX_STRATEGIES = ("one_device", "data_parallel", "model_parallel")
SCHEDULES = ("cosine", "linear", "constant")
LOSSES = ("softmax", "sigmoid")
CROPS = ("random_resized", "center", "whole")
FREEZES = ("none", "stem", "stage1", "stage2", "stage3", "stage4")
DTYPE_POLICIES = ("float32", "mixed_bfloat16")
LABELINGS = ("present", "imagenet")
NAN_POLICIES = ("stop", "skip")
