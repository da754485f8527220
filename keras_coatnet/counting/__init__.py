"""What a network costs, from its configuration alone: variables, operations, memory.

Example:
    >>> memory_per_device("coatnet0", batch_per_device=32).total() > 4 * count_params("coatnet0")
    True
"""

from keras_coatnet.counting.memory import Memory, memory_per_device
from keras_coatnet.counting.operations import count_flops, count_params

__all__ = ["Memory", "count_flops", "count_params", "memory_per_device"]
