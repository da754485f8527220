"""Counts and names the images that cannot be read."""

from __future__ import annotations

import threading

_SHOWN = 10  # names in an error's message


class UnreadableImages:
    """Collects the images that cannot be read, and ends the run if there are too many.

    TensorFlow replaces an error raised inside a `tf.data` pipeline by an error of its own that does
    not name the cause. `error` keeps the original, for the caller to raise instead.

    Args:
        limit: how many different images may be unreadable, at least 0.

    Attributes:
        limit: as given.
        error: the ValueError that ended the run, with the images' names; None before.

    Raises:
        ValueError: `limit` is not a whole number of at least 0.

    Example:
        >>> unreadable = UnreadableImages(limit=1)
        >>> unreadable.add("cat/17.jpg", "it is empty")
        >>> unreadable.names
        ['cat/17.jpg']
    """

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise ValueError(f"`limit` must be a whole number, at least 0. Received: {limit!r}")
        self.limit = limit
        self.error: ValueError | None = None
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The images' names, each once, in the order in which they were found."""
        with self._lock:
            return list(self._reasons)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each image cannot be read, by its name."""
        with self._lock:
            return dict(self._reasons)

    def add(self, name: str, reason: str) -> None:
        """Adds an image; one that was added before counts once.

        Args:
            name: the name of its file or record.
            reason: why it cannot be read.

        Raises:
            ValueError: there are now more than `limit` different images.
        """
        with self._lock:
            self._reasons.setdefault(name, reason)
            if len(self._reasons) > self.limit:
                self._stop(
                    f"{len(self._reasons)} images cannot be read, more than the limit of "
                    f"{self.limit}",
                    ", or raise the limit: `--unreadable-limit` on the command line, "
                    "`unreadable_limit` of a `Recipe` or of `evaluate`, `limit` of "
                    "`UnreadableImages`",
                )

    def refuse_batch(self, size: int) -> None:
        """Ends the run because no image of a batch can be read, so none can replace the others.

        Args:
            size: how many images the batch should hold.

        Raises:
            ValueError: always.
        """
        with self._lock:
            self._stop(f"No image of a batch of {size} can be read")

    def _stop(self, problem: str, advice: str = "") -> None:
        shown = [f"{name} ({reason})" for name, reason in self._reasons.items()][-_SHOWN:]
        more = f" and {len(self._reasons) - len(shown)} more" if len(self._reasons) > _SHOWN else ""
        self.error = ValueError(
            f"{problem}: {', '.join(shown)}{more}. Repair or remove them{advice}."
        )
        raise self.error
