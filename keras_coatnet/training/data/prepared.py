"""Data sets of tensorflow-datasets: found on disk or prepared from it, never downloaded.

tensorflow-datasets would download what it lacks, and without a network try for minutes. Here a data
set is prepared already, or is one of the few that are prepared from files that the user has to
fetch by hand anyway (`BY_HAND`), or there is an error that says what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import pathlib
import re
import sys
import tarfile
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

_NAME = re.compile(r"(?P<name>\w+)(?:/(?P<config>[\w.+-]+))?(?::(?P<version>\d+\.\d+\.\d+))?")


def import_tfds() -> ModuleType:
    """Imports tensorflow-datasets.

    Raises:
        ImportError: it is not installed, or lacks what it needs; the message says what to install.
    """
    try:
        # tensorflow-datasets 4.9.10 needs it below Python 3.12 and does not ask for it.
        importlib.import_module("importlib_resources")
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise ImportError(
            f"Data sets by name are read with tensorflow-datasets, which cannot be imported "
            f'({error}). Run: pip install "keras-coatnet[training]"'
        ) from error


# --- What can be prepared from files laid by hand ---------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByHand:
    """A data set that is prepared from files that nobody may redistribute.

    Attributes:
        files: for each split, the name of a file or folder in `<data_dir>/downloads/manual`.
        source: where the files come from, for the message that they are missing.
        counts: how many images each split has as it is published.
        check: looks at the files before anything is prepared; raises ValueError.
    """

    files: dict[str, tuple[str, ...]]
    source: str
    counts: dict[str, int]
    check: Callable[[pathlib.Path], None] = lambda manual: None


def _check_validation_names(manual: pathlib.Path) -> None:
    """Checks that the validation images are all there, from the first on.

    The builder knows the labels by position: were an image missing, all after it would be wrong.
    """
    path = manual / "ILSVRC2012_img_val.tar"
    if not path.is_file():
        return
    try:
        with tarfile.open(path) as tar:
            names = sorted(tar.getnames())
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged: {error}. Download it again.") from error
    for number, name in enumerate(names, 1):
        expected = f"ILSVRC2012_val_{number:08d}.JPEG"
        if name != expected:
            raise ValueError(
                f"{path} is not as it was published: expected {expected} as member {number} in the "
                f"order of names, found {name}. Its labels would be wrong; download it again."
            )


BY_HAND = {
    "imagenet2012": ByHand(
        files={
            "train": ("ILSVRC2012_img_train.tar",),
            "validation": ("ILSVRC2012_img_val.tar",),
            "test": ("ILSVRC2012_img_test.tar",),
        },
        source="https://image-net.org/download-images (free registration; 147.9 GB and 6.7 GB)",
        counts={"train": 1_281_167, "validation": 50_000, "test": 100_000},
        check=_check_validation_names,
    ),
    "gashissdb": ByHand(
        files=dict.fromkeys(("train", "validation"), ("GasHisSDB.zip", "GasHisSDB")),
        source="https://gitee.com/neuhwm/GasHisSDB (see arXiv:2106.02473)",
        counts={},
    ),
}


def default_data_dir() -> pathlib.Path:
    """Where tensorflow-datasets keeps its data: `TFDS_DATA_DIR`, or `~/tensorflow_datasets`."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def prepare(
    name: str,
    data_dir: str | os.PathLike | None = None,
    splits: Iterable[str] = ("train", "validation"),
) -> Any:
    """Opens a data set of tensorflow-datasets, and prepares it first if that takes no download.

    Args:
        name: `name`, `name/config`, and either with `:version`, as tensorflow-datasets spells them;
            also the path of a prepared data set (a folder with a `dataset_info.json`).
        data_dir: where it is or will be; None: `default_data_dir()`.
        splits: what is wanted of it. They decide which files have to lie in
            `<data_dir>/downloads/manual` if the data set is yet to be prepared.

    Returns:
        A `tfds.core.DatasetBuilder` that is prepared.

    Raises:
        ValueError: there is no such data set; or it is not prepared and cannot be without files
            that are missing, which the message names; or preparing it failed.
        ImportError: tensorflow-datasets is not installed.

    Example, with the two tars of ImageNet in D/downloads/manual:
        builder = prepare("imagenet2012", "D", ["train", "validation"])
    """
    tfds = import_tfds()
    if is_prepared_folder(name):
        return tfds.builder_from_directory(os.path.expanduser(name))
    root = default_data_dir() if data_dir is None else pathlib.Path(data_dir).expanduser()
    builder = _find_builder(tfds, name, root)
    if not is_prepared_folder(os.fspath(builder.data_path)):
        by_hand = BY_HAND.get(builder.name)
        if by_hand is None:
            raise _download_refused(builder, name, root)
        _prepare_by_hand(tfds, builder, by_hand, root, splits)
    return builder


def is_prepared_folder(path: str) -> bool:
    """Whether a folder is a data set that tensorflow-datasets has prepared."""
    return (pathlib.Path(path).expanduser() / "dataset_info.json").is_file()


def folder_of_images(data: str) -> pathlib.Path | None:
    """Finds the folder of images that a `data` argument means.

    Args:
        data: A path, or the name of a data set.

    Returns:
        The path, which need not exist; `None` if `data` is for tensorflow-datasets.
    """
    path = pathlib.Path(data).expanduser()
    spelt_as_path = path.is_absolute() or data.startswith((".", "~")) or data.endswith("/")
    if path.exists() or spelt_as_path:
        return None if is_prepared_folder(data) else path
    return None


def _find_builder(tfds: ModuleType, name: str, root: pathlib.Path) -> Any:
    match = _NAME.fullmatch(name)
    if match and match["name"] == "gashissdb":
        importlib.import_module(
            "keras_coatnet.training.data.builders.gashissdb"
        )  # which registers it
    # `tfds.builder` would answer an unknown name with the names of all it knows.
    known = set(tfds.list_builders(with_community_datasets=False)) | _names_in(root)
    if not match or match["name"] not in known:
        close = difflib.get_close_matches(match["name"] if match else name, sorted(known))
        near = f" Near to it: {', '.join(close)}." if close else ""
        raise ValueError(
            f"{name!r} is neither a folder nor a data set of tensorflow-datasets, nor prepared "
            f"under {root}.{near}"
        )
    try:
        return tfds.builder(name, data_dir=os.fspath(root))
    except Exception as error:  # each cause has a type of its own: no such version, config, ...
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"The data set {name!r} cannot be opened: {reason}") from error


def _names_in(root: pathlib.Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()


def _download_refused(builder: Any, name: str, root: pathlib.Path) -> ValueError:
    versions = sorted(path.name for path in (root / builder.name).glob("*.*.*"))
    others = f" Prepared are the versions: {', '.join(versions)}." if versions else ""
    homepage = f" from {builder.info.homepage}" if builder.info.homepage else ""
    return ValueError(
        f"The data set {name!r} ({builder.info.full_name}) is not prepared under {root}, and "
        f"nothing is downloaded here.{others} Run `tfds build {name} --data_dir {root}` where "
        f"there is a network: it downloads{homepage} and prepares."
    )


def _prepare_by_hand(
    tfds: ModuleType, builder: Any, by_hand: ByHand, root: pathlib.Path, splits: Iterable[str]
) -> None:
    manual = root / "downloads" / "manual"
    missing = [
        " or ".join(files)
        for split, files in by_hand.files.items()
        if split in splits and not any((manual / file).exists() for file in files)
    ]
    if missing:
        raise ValueError(
            f"The data set {builder.info.full_name!r} is not prepared under {root}. Download "
            f"{' and '.join(dict.fromkeys(missing))} from {by_hand.source} into {manual} and run "
            f"this again: it is then prepared, as `tfds build {builder.name} --data_dir {root}` "
            "would."
        )
    by_hand.check(manual)
    print(f"Preparing {builder.info.full_name} in {root}, once, from {manual}", file=sys.stderr)
    config = tfds.download.DownloadConfig(manual_dir=os.fspath(manual), try_download_gcs=False)
    try:
        builder.download_and_prepare(
            download_dir=os.fspath(root / "downloads"), download_config=config
        )
    except Exception as error:  # of the archive, the images, the disk
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{builder.info.full_name} could not be prepared in {root} from {manual}: {reason}"
        ) from error
    for split, info in builder.info.splits.items():
        published = by_hand.counts.get(split, info.num_examples)
        note = f"; {published:,} were published" if info.num_examples != published else ""
        print(f"  {split}: {info.num_examples:,} images{note}", file=sys.stderr)
