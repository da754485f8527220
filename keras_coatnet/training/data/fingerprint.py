"""Which data a run is trained on: noted in its folder, and compared when it is taken up again.

Another order of the classes would change the meaning of the network's outputs, and another number
of images the schedule. Where the data lies does not count.
"""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

from keras_coatnet.files import whole_file

if TYPE_CHECKING:
    from keras_coatnet.training.data.datasets import ImageDataset

FILE, CLASSES = "data.json", "classes.txt"

_PARTS = ("training", "validation")
_SHOWN = 5  # names in an error's message


def note_data(folder: pathlib.Path, training: ImageDataset, validation: ImageDataset) -> None:
    """Writes what a run is trained and validated on, whole or not at all, unless it is noted.

    Args:
        folder: the run's, which exists.
        training: what it is trained on.
        validation: what it is validated on.
    """
    for name, text in (
        (CLASSES, "\n".join(training.classes) + "\n"),
        (FILE, json.dumps(_identity(training, validation), indent=2) + "\n"),
    ):
        path = folder / name
        if not path.exists():
            with whole_file(path) as partial:
                # Names of folders need not be text.
                partial.write_bytes(text.encode("utf-8", "backslashreplace"))


def check_same_data(folder: pathlib.Path, training: ImageDataset, validation: ImageDataset) -> None:
    """Checks that a run goes on with the data that it began with.

    Args:
        folder: the run's; it need not exist.
        training: what it would be trained on.
        validation: what it would be validated on.

    Raises:
        ValueError: the data are other ones; the message says what differs.
    """
    before, now = _noted(folder), _identity(training, validation)
    difference = _difference(before, now)
    if difference:
        raise ValueError(
            f"{folder} holds a run on other data: {difference}. Give the data it began with to go "
            "on, or choose another output folder."
        )


def check_classes(folder: pathlib.Path, source: ImageDataset) -> None:
    """Checks that images have the classes of a run, in its order.

    Args:
        folder: the run's.
        source: what its network is to be evaluated on.

    Raises:
        ValueError: they do not; the message says what differs.
    """
    before = _noted(folder).get("classes")
    difference = _difference({"classes": before}, {"classes": list(source.classes)})
    if difference:
        raise ValueError(
            f"{source.name} has other classes than the run in {folder}: {difference}. Give "
            "images of the same classes."
        )


def _identity(training: ImageDataset, validation: ImageDataset) -> dict[str, Any]:
    parts = {
        part: {"name": source.name, "count": source.count, "fingerprint": source.fingerprint}
        for part, source in zip(_PARTS, (training, validation), strict=True)
    }
    return {"classes": list(training.classes), **parts}


def _noted(folder: pathlib.Path) -> dict[str, Any]:
    """What was noted of a run's data; of older versions' runs the classes alone."""
    path = folder / FILE
    try:
        if path.exists():
            noted = json.loads(path.read_text("utf-8"))
            return {"classes": noted["classes"], **{part: dict(noted[part]) for part in _PARTS}}
        if (folder / CLASSES).exists():
            return {"classes": (folder / CLASSES).read_text("utf-8")[:-1].split("\n")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say which data the run is trained on: {error!r}. Remove it if you "
            "are sure that they are the same."
        ) from error
    return {}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference in words; None if there is none, or nothing to compare with."""
    old, new = before.get("classes"), now["classes"]
    if old is not None and old != new:
        gone, come = (
            [name for name in some if name not in set(others)]
            for some, others in ((old, new), (new, old))
        )
        if not gone and not come:
            return f"its classes were in the order {_some(old)}, and are in the order {_some(new)}"
        return f"its {len(old):,} classes were with {_some(gone)}, and are with {_some(come)}"
    for part in _PARTS:
        old, new = before.get(part), now.get(part)
        if old is None or new is None:
            continue
        if old["count"] != new["count"]:
            return f"it had {old['count']:,} {part} images, and there are {new['count']:,}"
        if old["fingerprint"] and new["fingerprint"] and old["fingerprint"] != new["fingerprint"]:
            return (
                f"the names or labels of the {part} images are others ({old['name']} then, "
                f"{new['name']} now)"
            )
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more if names else "none"
