"""Finding files in folders, and writing files so that none is left half written."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator


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


def files_below(folder: str | os.PathLike, unreadable: Callable[[OSError], None]) -> Iterator[str]:
    """Finds all files below a folder, except hidden ones, in an order that is always the same.

    Links are followed. A folder that is reached twice, for example by a link to a folder above it,
    counts once. Hidden folders are skipped.

    Args:
        folder: where to begin.
        unreadable: called with the error of each folder or link that cannot be read. If it
            returns, that folder or link is left out.

    Yields:
        The paths; those of a folder before those of its sub-folders.

    Example:
        >>> import tempfile
        >>> list(files_below(tempfile.mkdtemp(), print))
        []
    """
    seen = set()
    pending = [os.fspath(folder)]
    while pending:
        place = pending.pop()
        try:
            status = os.stat(place)
        except OSError as error:
            unreadable(error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = list_folder(place, unreadable)
        yield from (os.path.join(place, name) for name in files)
        pending += [os.path.join(place, name) for name in reversed(folders)]


def list_folder(
    folder: str | os.PathLike, unreadable: Callable[[OSError], None]
) -> tuple[list[str], list[str]]:
    """Lists the sub-folders and the files of a folder, except hidden ones.

    Args:
        folder: the folder.
        unreadable: as of `files_below`.

    Returns:
        The names of the sub-folders and those of the files, each sorted.

    Example:
        >>> import tempfile
        >>> list_folder(tempfile.mkdtemp(), print)
        ([], [])
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        unreadable(error)
        return [], []
    for entry in sorted(found, key=lambda entry: entry.name):
        try:
            if entry.is_dir():
                folders.append(entry.name)
                continue
            if not entry.is_file():
                entry.stat()  # which fails for a link to nothing
                raise OSError(errno.EINVAL, "it is not a file, but a pipe or the like", entry.path)
        except FileNotFoundError:
            unreadable(OSError(errno.ENOENT, "it is a link to nothing", entry.path))
        except OSError as error:
            unreadable(error)
        else:
            files.append(entry.name)
    return folders, files
