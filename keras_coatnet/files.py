"""Writing files: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives the name of a partial file, which takes the place of `path` when the block ends.

    The partial file stands in the same folder under a name of its own, so that threads and
    processes that write the same file at once do not meet: the last one to end wins. Where `path`
    is a symbolic link, the link stays, and the file that it points to is replaced. After an
    exception the old file is what it was, and the partial one is gone.

    Args:
        path: the file to write.

    Yields:
        The path to write to. It ends in the name of the file, and does not exist yet.

    Raises:
        ValueError: the folder of the file does not exist.

    Example:
        >>> import tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with whole_file(folder / "note.txt") as partial:
        ...     _ = partial.write_text("whole")
        >>> (folder / "note.txt").read_text()
        'whole'
    """
    target = pathlib.Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(
            f"{os.fspath(path)} cannot be written: there is no folder {target.parent}. Make it "
            "first."
        )
    # The ending is that of the name that was given, which some writers look at, and not of what a
    # link points to.
    name = pathlib.Path(path).name
    partial = target.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.{name}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
