"""Opens data sets of tensorflow-datasets without downloading anything.

tensorflow-datasets downloads a data set that is not prepared, and without a network it keeps trying
for minutes. Here such a data set is an error that says what to do, unless its files have to be
downloaded by hand anyway (`MANUAL_DATASETS`): then it is prepared from them.
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
        ImportError: it, or a package that it needs, is not installed.
    """
    try:
        # tensorflow-datasets 4.9.10 needs it below Python 3.12, but does not require it.
        importlib.import_module("importlib_resources")
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise ImportError(
            f"Named data sets are read with tensorflow-datasets, which cannot be imported "
            f'({error}). Run: pip install "keras-coatnet[training]"'
        ) from error


# --- Data sets that are prepared from files downloaded by hand ---------------------------------


@dataclasses.dataclass(frozen=True)
class ManualDataset:
    """A data set whose files have to be downloaded by hand, as they may not be redistributed.

    Attributes:
        files: for each split, the names that its file or folder may have in
            `<data_dir>/downloads/manual`.
        source: where the files come from, for the message that they are missing.
        counts: how many images each split has as published.
        check: checks the files before the data set is prepared; raises ValueError.
    """

    files: dict[str, tuple[str, ...]]
    source: str
    counts: dict[str, int]
    check: Callable[[pathlib.Path], None] = lambda manual: None


def _check_validation_names(manual: pathlib.Path) -> None:
    """Checks that no validation image is missing before the last one.

    The builder assigns the labels by position, so all labels after a missing image would be wrong.
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
                f"{path} is not as published: expected {expected} as member {number} in the order "
                f"of names, found {name}. Its labels would be wrong. Download it again."
            )


MANUAL_DATASETS = {
    "imagenet2012": ManualDataset(
        files={
            "train": ("ILSVRC2012_img_train.tar",),
            "validation": ("ILSVRC2012_img_val.tar",),
            "test": ("ILSVRC2012_img_test.tar",),
        },
        source="https://image-net.org/download-images (free registration; 147.9 GB and 6.7 GB)",
        counts={"train": 1_281_167, "validation": 50_000, "test": 100_000},
        check=_check_validation_names,
    ),
    "gashissdb": ManualDataset(
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
        name: `name` or `name/config`, either with `:version`, as in tensorflow-datasets; or the
            path of a prepared data set (a folder with a `dataset_info.json`).
        data_dir: folder of the data sets; None: `default_data_dir()`.
        splits: the splits that are needed. Their files have to be in `<data_dir>/downloads/manual`
            if the data set is prepared from there.

    Returns:
        A `tfds.core.DatasetBuilder` of the prepared data set.

    Raises:
        ValueError: there is no such data set; it is not prepared, and has to be downloaded or lacks
            the files named in the message; or preparing it failed.
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
        manual_dataset = MANUAL_DATASETS.get(builder.name)
        if manual_dataset is None:
            raise _not_prepared(builder, name, root)
        _prepare_manual(tfds, builder, manual_dataset, root, splits)
    return builder


def is_prepared_folder(path: str) -> bool:
    """Whether a folder is a data set that tensorflow-datasets has prepared."""
    return (pathlib.Path(path).expanduser() / "dataset_info.json").is_file()


def folder_of_images(data: str) -> pathlib.Path | None:
    """Returns the folder of images that a `data` argument refers to.

    Args:
        data: a path, or the name of a data set.

    Returns:
        The path, which need not exist; None if `data` is a data set of tensorflow-datasets.
    """
    path = pathlib.Path(data).expanduser()
    looks_like_path = path.is_absolute() or data.startswith((".", "~")) or data.endswith("/")
    if path.exists() or looks_like_path:
        return None if is_prepared_folder(data) else path
    return None


def _find_builder(tfds: ModuleType, name: str, root: pathlib.Path) -> Any:
    match = _NAME.fullmatch(name)
    if match and match["name"] == "gashissdb":
        # The import registers the builder.
        importlib.import_module("keras_coatnet.training.data.builders.gashissdb")
    # The error of `tfds.builder` for an unknown name lists all names that it knows.
    known = set(tfds.list_builders(with_community_datasets=False))
    if root.is_dir():
        known |= {path.name for path in root.iterdir() if path.is_dir()}
    if not match or match["name"] not in known:
        close = difflib.get_close_matches(match["name"] if match else name, sorted(known))
        similar = f" Similar names: {', '.join(close)}." if close else ""
        raise ValueError(
            f"{name!r} is neither a folder nor a data set of tensorflow-datasets, nor prepared "
            f"under {root}.{similar}"
        )
    try:
        return tfds.builder(name, data_dir=os.fspath(root))
    except Exception as error:  # unknown versions and configurations have errors of their own
        raise ValueError(f"The data set {name!r} cannot be opened: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _not_prepared(builder: Any, name: str, root: pathlib.Path) -> ValueError:
    versions = sorted(path.name for path in (root / builder.name).glob("*.*.*"))
    others = f" Prepared versions: {', '.join(versions)}." if versions else ""
    homepage = f" from {builder.info.homepage}" if builder.info.homepage else ""
    return ValueError(
        f"The data set {name!r} ({builder.info.full_name}) is not prepared under {root}, and "
        f"keras_coatnet does not download it.{others} Run `tfds build {name} --data_dir {root}`, "
        f"which downloads it{homepage} and prepares it."
    )


def _prepare_manual(
    tfds: ModuleType,
    builder: Any,
    dataset: ManualDataset,
    root: pathlib.Path,
    splits: Iterable[str],
) -> None:
    manual = root / "downloads" / "manual"
    missing = [
        " or ".join(files)
        for split, files in dataset.files.items()
        if split in splits and not any((manual / file).exists() for file in files)
    ]
    if missing:
        raise ValueError(
            f"The data set {builder.info.full_name!r} is not prepared under {root}. Download "
            f"{' and '.join(dict.fromkeys(missing))} from {dataset.source} into {manual} and run "
            "this again. The data set is then prepared, as with "
            f"`tfds build {builder.name} --data_dir {root}`."
        )
    dataset.check(manual)
    print(f"Preparing {builder.info.full_name} in {root}, once, from {manual}", file=sys.stderr)
    config = tfds.download.DownloadConfig(manual_dir=os.fspath(manual), try_download_gcs=False)
    try:
        builder.download_and_prepare(
            download_dir=os.fspath(root / "downloads"), download_config=config
        )
    except Exception as error:  # archives, images and disks have errors of their own
        raise ValueError(
            f"{builder.info.full_name} could not be prepared in {root} from {manual}: "
            f"{_one_line(error)}"
        ) from error
    for split, info in builder.info.splits.items():
        published = dataset.counts.get(split, info.num_examples)
        note = f"; {published:,} were published" if info.num_examples != published else ""
        print(f"  {split}: {info.num_examples:,} images{note}", file=sys.stderr)
