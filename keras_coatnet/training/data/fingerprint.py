"""Records which data a run is trained on, and compares them when the run is resumed.

Another order of the classes would change the meaning of the network's outputs, and another number
of images the schedule. The data may have moved to another place.
"""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

from keras_coatnet.files import whole_file
from keras_coatnet.training.data.held_out import some_names

if TYPE_CHECKING:
    from keras_coatnet.training.data.datasets import ImageDataset

FILE, CLASSES = "data.json", "classes.txt"

_PARTS = ("training", "validation")


def note_data(folder: pathlib.Path, training: ImageDataset, validation: ImageDataset) -> None:
    """Records in a run's folder what the run is trained and validated on.

    A file that is there already is kept.

    Args:
        folder: the run's folder, which exists.
        training: what it is trained on.
        validation: what it is validated on.
    """
    for name, text in (
        (CLASSES, "\n".join(training.classes) + "\n"),
        (FILE, json.dumps(_describe(training, validation), indent=2) + "\n"),
    ):
        path = folder / name
        if not path.exists():
            with whole_file(path) as partial:
                # Names of folders need not be valid text.
                partial.write_bytes(text.encode("utf-8", "backslashreplace"))


def check_same_data(folder: pathlib.Path, training: ImageDataset, validation: ImageDataset) -> None:
    """Checks that a run is resumed with the data that it was started with.

    Args:
        folder: the run's folder; it need not exist.
        training: what it would be trained on.
        validation: what it would be validated on.

    Raises:
        ValueError: the data differ; the message says how.
    """
    difference = _difference(_read_note(folder), _describe(training, validation))
    if difference:
        raise ValueError(
            f"{folder} holds a run on other data: {difference}. Give the data it was started with "
            "to resume it, or choose another output folder."
        )


def check_classes(folder: pathlib.Path, source: ImageDataset) -> None:
    """Checks that images have the classes of a run, in the same order.

    Args:
        folder: the run's folder.
        source: what its network is to be evaluated on.

    Raises:
        ValueError: the classes differ; the message says how.
    """
    difference = _difference(_read_note(folder), {"classes": list(source.classes)})
    if difference:
        raise ValueError(
            f"{source.name} has other classes than the run in {folder}: {difference}. Give "
            "images of the same classes."
        )


def _describe(training: ImageDataset, validation: ImageDataset) -> dict[str, Any]:
    parts = {
        part: {"name": source.name, "count": source.count, "fingerprint": source.fingerprint}
        for part, source in zip(_PARTS, (training, validation), strict=True)
    }
    return {"classes": list(training.classes), **parts}


def _read_note(folder: pathlib.Path) -> dict[str, Any]:
    """Reads what `note_data` wrote; only the classes if somebody has removed `data.json`."""
    path = folder / FILE
    try:
        if path.exists():
            noted = json.loads(path.read_text("utf-8"))
            return {"classes": noted["classes"], **{part: dict(noted[part]) for part in _PARTS}}
        if (folder / CLASSES).exists():
            return {"classes": (folder / CLASSES).read_text("utf-8")[:-1].split("\n")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: {error!r}. Remove it if you are sure that the data are those that "
            "the run was started with."
        ) from error
    return {}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Describes the first difference; None if there is none, or nothing to compare with."""
    old, new = before.get("classes"), now["classes"]
    if old is not None and old != new:
        removed = [name for name in old if name not in set(new)]
        added = [name for name in new if name not in set(old)]
        if not removed and not added:
            return f"the order of its classes was {some_names(old)}, and is now {some_names(new)}"
        return (
            f"its {len(old):,} classes have changed (removed: {some_names(removed) or 'none'}; "
            f"added: {some_names(added) or 'none'})"
        )
    for part in _PARTS:
        old, new = before.get(part), now.get(part)
        if old is None or new is None:
            continue
        if old["count"] != new["count"]:
            return f"it had {old['count']:,} {part} images, and there are now {new['count']:,}"
        if old["fingerprint"] and new["fingerprint"] and old["fingerprint"] != new["fingerprint"]:
            return (
                f"the names or labels of the {part} images differ ({old['name']} before, "
                f"{new['name']} now)"
            )
    return None
