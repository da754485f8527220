"""Selects the examples of each batch that a process reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Shard:
    """The same slice of every batch: `count` examples, starting at `first`.

    `tf.data.Dataset.shard(num_shards, index)` takes every n-th example instead. With slices, a
    global batch holds the same examples in the same order for any number of processes, and a
    process may have more devices than another.

    A position is the index of an example in its epoch.

    Attributes:
        batch_size: examples in a batch of all processes together.
        first: index in the batch of the first example of the slice.
        count: examples in the slice.

    Example:
        >>> shard = Shard(batch_size=8, first=4, count=2)
        >>> [position for position in range(16) if shard.holds(position)]
        [4, 5, 12, 13]
        >>> shard.size(0, 14), shard.position(3)
        (4, 13)
    """

    batch_size: int
    first: int
    count: int

    @property
    def is_everything(self) -> bool:
        """Whether the slice is the whole batch."""
        return self.count == self.batch_size

    def holds(self, position: Any) -> Any:
        """Whether the shard holds the example at a position: a number, an array or a tensor."""
        index = position % self.batch_size
        return (index >= self.first) & (index < self.first + self.count)

    def position(self, index: Any) -> Any:
        """The position of the shard's example number `index`: a number or a tensor."""
        return index // self.count * self.batch_size + self.first + index % self.count

    def size(self, start: int, stop: int) -> int:
        """How many of the examples at positions from `start` to `stop - 1` the shard holds."""

        def before(position: int) -> int:
            rest = position % self.batch_size - self.first
            return position // self.batch_size * self.count + min(max(rest, 0), self.count)

        return before(stop) - before(start)

    def filter(self, dataset: tf.data.Dataset, start: int) -> tf.data.Dataset:
        """Keeps only the shard's examples of a dataset.

        Args:
            dataset: one epoch, from the position `start` on.
            start: position of its first example.

        Returns:
            A `tf.data.Dataset` of the same elements, fewer of them.
        """
        # TensorFlow's annotation has one argument, but the parts of an element come as several.
        numbered = dataset.enumerate(start).filter(lambda position, _: self.holds(position))  # pyright: ignore[reportArgumentType]
        return numbered.map(lambda _, example: example)
