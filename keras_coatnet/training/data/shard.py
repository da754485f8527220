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

    A place is the position of an example in an epoch, from 0.

    Attributes:
        batch_size: examples in a batch, of all processes together.
        first: the first of them that is wanted, counted in the batch.
        count: how many are wanted; they follow one another.

    Example:
        >>> shard = Shard(batch_size=8, first=4, count=2)
        >>> [place for place in range(16) if shard.holds(place)]
        [4, 5, 12, 13]
        >>> shard.size(0, 14), shard.place(3)
        (4, 13)
    """

    batch_size: int
    first: int
    count: int

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return self.count == self.batch_size

    def holds(self, place: Any) -> Any:
        """Whether the example at a place is wanted; of a number, an array or a tensor."""
        place = place % self.batch_size
        return (place >= self.first) & (place < self.first + self.count)

    def place(self, index: Any) -> Any:
        """The place of a wanted example by its number among them; of a number or a tensor."""
        return index // self.count * self.batch_size + self.first + index % self.count

    def size(self, start: int, stop: int) -> int:
        """How many examples are wanted of those from the place `start` on and before `stop`."""

        def before(place: int) -> int:
            rest = place % self.batch_size - self.first
            return place // self.batch_size * self.count + min(max(rest, 0), self.count)

        return before(stop) - before(start)

    def filter(self, dataset: tf.data.Dataset, start: int) -> tf.data.Dataset:
        """Leaves the other examples out of a dataset that has all of them.

        Args:
            dataset: one epoch, from the place `start` on.
            start: that place.

        Returns:
            A `tf.data.Dataset` of the same elements, fewer of them.
        """
        # TensorFlow's annotation has one argument, but the parts of an element come as several.
        numbered = dataset.enumerate(start).filter(lambda place, _: self.holds(place))  # pyright: ignore[reportArgumentType]
        return numbered.map(lambda _, example: example)
