"""Opening HDF5 files of unknown origin.

An HDF5 file can refer to other files, whose content HDF5 reads as well, and can declare arrays far
larger than what it stores. Files of weights need neither, so such files are refused before any
array is read.
"""

from __future__ import annotations

import contextlib
import io
import math
import pathlib
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import h5py

# A file may declare `FREE_BYTES` plus `EXPANSION` times its own size. Keras does not compress.
# Compressed weights, with an optimizer whose moments are all 0, expand about 3 times.
FREE_BYTES, EXPANSION = 64 << 20, 16
MAX_LINKS = 200_000  # a CoAtNet-7 with its optimizer has about 20,000
MAX_CHUNKS = 200_000
DEEPEST = 64  # groups within groups; for 5,000, HDF5's own visitor takes over 45 seconds

_HEAP = b"GCOL\1\0\0\0"  # the first bytes of a heap
_MAX_HEAP = 16 << 20
_BLOCK = 4 << 20

# What h5py raises for damaged files.
DAMAGE = (
    OSError,
    RuntimeError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    MemoryError,
)


class Refused(ValueError):
    """A file that is not read. The message names it."""


@contextlib.contextmanager
def open_hdf5(
    path: pathlib.Path, content: io.RawIOBase | None = None
) -> Iterator[tuple[h5py.File, dict[str, h5py.Dataset]]]:
    """Opens a file for reading, if all of it can be read safely.

    Args:
        path: the file.
        content: the HDF5 file, if it is a part of `path`; None: all of `path`.

    Yields:
        The open file, and its datasets by their paths. All of them hold numbers.

    Raises:
        Refused: it has links, to other files or within itself, or declares far more than it stores.
        Exception: one of `DAMAGE`, here or in later reading: it is damaged or not an HDF5 file. The
            caller words the message.
    """
    import h5py

    size = path.stat().st_size
    with path.open("rb") as whole:
        _check_heaps(whole if content is None else content, path)
    with h5py.File(path if content is None else content, "r") as file:
        yield file, _checked_datasets(file, path, size)


def refuse_whole_model(file: h5py.File, path: pathlib.Path) -> None:
    """Refuses a whole model in Keras's old format, and says how to convert it.

    Args:
        file: the open file.
        path: where it is.

    Raises:
        Refused: it holds the configuration of a model.
    """
    if "model_config" not in file.attrs:
        return
    new = path.with_name(f"{path.name.removesuffix('.h5').removesuffix('.weights')}.keras")
    raise Refused(
        f"{path} holds a whole model in Keras's old format (HDF5), not weights alone. Load it, "
        "save it as a .keras file, and give that file: "
        f"keras.models.load_model({str(path)!r}).save({str(new)!r})"
    )


def _check_heaps(file: io.IOBase, path: pathlib.Path) -> None:
    """Checks the heaps, which hold strings: HDF5 reads a damaged one in an endless loop."""
    start = 0
    while True:
        file.seek(start)
        block = file.read(_BLOCK)
        if len(block) < len(_HEAP):
            return
        at = block.find(_HEAP)
        while at >= 0:
            _check_heap(file, start + at, path)
            at = block.find(_HEAP, at + 1)
        start += len(block) - len(_HEAP) + 1  # a heap may begin in one block and end in the next


def _check_heap(file: io.IOBase, start: int, path: pathlib.Path) -> None:
    file.seek(start + len(_HEAP))
    size = int.from_bytes(file.read(8), "little")
    if size > _MAX_HEAP:
        _refuse(path, f"it declares a string of {size} bytes")
    heap, place = file.read(size - 16), 0  # 16 bytes are its own header
    while place + 16 <= len(heap):
        number, _, _, length = struct.unpack_from("<HHIQ", heap, place)
        # Number 0 is free space, whose length includes its own header.
        step = 16 + (length + 7) // 8 * 8 if number else length
        if step < 16 or place + step > size - 16:
            _refuse(path, "the list of its strings is damaged")
        place += step


def _checked_datasets(file: h5py.File, path: pathlib.Path, size: int) -> dict[str, h5py.Dataset]:
    import h5py
    import h5py.h5l
    import h5py.h5o

    found: dict[str, h5py.Dataset] = {}
    groups: list[tuple[str, h5py.h5g.GroupID]] = [("", h5py.h5o.open(file.id, b"/"))]
    seen, links, declared, chunks = set(), 0, 0, 0
    while groups:
        prefix, group = groups.pop()
        information = h5py.h5o.get_info(group)
        if information.addr in seen:  # a second link to the same group, perhaps from within it
            continue
        seen.add(information.addr)
        if prefix.count("/") > DEEPEST:
            _refuse(path, f"its groups are more than {DEEPEST} deep")
        for raw in group:
            links += 1
            if links > MAX_LINKS:
                _refuse(path, f"it has more than {MAX_LINKS} entries")
            name = f"{prefix}{raw.decode('utf-8', 'backslashreplace')}"
            if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
                _refuse(path, f"{name} is a link to another file or to another place in this one")
            item = h5py.h5o.open(group, raw)
            if isinstance(item, h5py.h5g.GroupID):
                groups.append((f"{name}/", item))
                continue
            if not isinstance(item, h5py.h5d.DatasetID):
                _refuse(path, f"{name} is neither a group nor an array")
            item_bytes, item_chunks = _declared(item, name, path)
            declared, chunks = declared + item_bytes, chunks + item_chunks
            if declared > FREE_BYTES + EXPANSION * size:
                _refuse(
                    path,
                    f"up to {name} it declares {declared} bytes of arrays, but has {size} bytes",
                )
            if chunks > MAX_CHUNKS:
                _refuse(path, f"its arrays have more than {MAX_CHUNKS} chunks")
            _check_compression(item, name, path)
            found[name] = h5py.Dataset(item)
    return found


def _declared(item: h5py.h5d.DatasetID, name: str, path: pathlib.Path) -> tuple[int, int]:
    """Returns the bytes of memory that an array takes, and its number of chunks."""
    import h5py

    plan = item.get_create_plist()
    # Checked first, as even the shape of a virtual array may come from another file.
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        _refuse(path, f"{name} is a virtual array, whose values are in other files")
    if plan.get_external_count():
        _refuse(path, f"the values of {name} are in another file")
    kind = item.dtype
    is_plain = kind.kind == "V" and kind.names is None and kind.subdtype is None
    if kind.kind not in "fiubc" and not is_plain:  # Keras stores bfloat16 as plain bytes
        _refuse(path, f"{name} holds {kind}, not numbers")
    declared, chunks = math.prod(item.shape) * kind.itemsize, 0
    if plan.get_layout() == h5py.h5d.CHUNKED:
        chunk = plan.get_chunk()
        sides = zip(item.shape, chunk, strict=True)
        chunks = math.prod(math.ceil(whole / part) for whole, part in sides)
        declared = max(declared, math.prod(chunk) * kind.itemsize)
    return declared, chunks


def _check_compression(item: h5py.h5d.DatasetID, name: str, path: pathlib.Path) -> None:
    """Checks the sizes of compressed chunks: HDF5 decompresses more than what is declared."""
    import h5py

    plan = item.get_create_plist()
    filters = [plan.get_filter(index)[0] for index in range(plan.get_nfilters())]
    allowed = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)
    if not set(filters) <= set(allowed) or filters.count(h5py.h5z.FILTER_DEFLATE) > 1:
        _refuse(path, f"{name} has an unknown compression, which h5repack can undo")
    if h5py.h5z.FILTER_DEFLATE not in filters:
        return
    most = math.prod(plan.get_chunk()) * item.dtype.itemsize + 4  # and a checksum
    offsets: list[tuple[int, ...]] = []
    item.chunk_iter(lambda chunk: offsets.append(chunk.chunk_offset))
    for offset in offsets:
        mask, packed = item.read_direct_chunk(offset)
        if mask & (1 << filters.index(h5py.h5z.FILTER_DEFLATE)):  # stored as it is
            continue
        with contextlib.suppress(zlib.error):  # damaged, which HDF5 detects in reading
            if len(zlib.decompressobj().decompress(packed, most + 1)) > most:
                _refuse(path, f"a chunk of {name} decompresses to more than it declares")


def _refuse(path: pathlib.Path, why: str) -> NoReturn:
    raise Refused(
        f"{path} is refused: {why}. Files of weights need no such thing. If you trust its origin, "
        "save it again. Otherwise do not use it."
    )
