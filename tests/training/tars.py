"""Hand-made data sets in the forms in which real ones are published.

Every image is a flat color, far apart for different classes, with noise that differs from
image to image: a small network learns to tell the classes apart within a few steps.
"""

from __future__ import annotations

import io
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterable

import numpy as np
from PIL import Image

Path = str | os.PathLike


def image(label: int, number: int, size: tuple[int, int] = (40, 32), kind: str = "JPEG") -> bytes:
    """An encoded image of (width, height) pixels; `number` tells images of a class apart."""
    rng = np.random.default_rng((label, number))
    color = np.random.default_rng(1000 + label).uniform(40, 215, 3)
    pixels = color + rng.normal(0, 12, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(file, kind)
    return file.getvalue()


# --- Folders ----------------------------------------------------------------------------------


def write_classes(
    root: Path, counts: dict[str, int], suffix: str = ".jpg", first: int = 0, **options
) -> pathlib.Path:
    """Writes `root/<class>/<number><suffix>`, `counts` images of each class."""
    kind = Image.registered_extensions()[suffix.lower()]
    root = pathlib.Path(root)
    for label, (name, count) in enumerate(sorted(counts.items())):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            content = image(label, number, kind=kind, **options)
            (root / name / f"{number:03d}{suffix}").write_bytes(content)
    return root


def write_pair(
    root: Path, train: dict[str, int], validation: dict[str, int], name: str = "val", **options
) -> pathlib.Path:
    """Writes `root/train/<class>/...` and `root/<name>/<class>/...`, with other images."""
    write_classes(pathlib.Path(root) / "train", train, **options)
    write_classes(pathlib.Path(root) / name, validation, first=1000, **options)
    return pathlib.Path(root)


# --- ImageNet's tars --------------------------------------------------------------------------


def validation_synsets(count: int) -> list[str]:
    """WordNet ids of ImageNet's first validation images, as tensorflow-datasets knows them."""
    import tensorflow_datasets as tfds

    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return path.read_text().split()[:count]


def write_imagenet(
    data_dir: Path, train: int = 4, validation: int = 6, size: tuple[int, int] = (40, 32)
) -> list[str]:
    """Writes ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar where they are looked for.

    The validation images are the first of ImageNet's, with their labels; the training images
    are `train` of each of their classes. A class has the same color in both.

    Returns:
        The WordNet ids of the classes, sorted.
    """
    manual = pathlib.Path(data_dir) / "downloads" / "manual"
    manual.mkdir(parents=True, exist_ok=True)
    synsets = validation_synsets(validation)
    classes = sorted(set(synsets))
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as tar:
        for label, synset in enumerate(classes):
            images = ((f"{synset}_{n}.JPEG", image(label, n, size)) for n in range(train))
            _add(tar, [(f"{synset}.tar", _tar(images))])
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, synset in enumerate(synsets, 1):
            content = image(classes.index(synset), 1000 + number, size)
            _add(tar, [(f"ILSVRC2012_val_{number:08d}.JPEG", content)])
    return classes


def _tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        _add(tar, members)
    return file.getvalue()


def _add(tar: tarfile.TarFile, members: Iterable[tuple[str, bytes]]) -> None:
    for name, content in members:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


# --- Others -----------------------------------------------------------------------------------


def write_gashissdb(
    data_dir: Path, counts: dict[str, int], size: str = "160", zipped: bool = False
) -> None:
    """Writes GasHisSDB, as a folder or as GasHisSDB.zip, with macOS's litter as in the original."""
    manual = pathlib.Path(data_dir) / "downloads" / "manual"
    side = (int(size), int(size))
    files = {
        f"GasHisSDB/{size}/{name}/{name}-{number:05d}.png": image(label, number, side, "PNG")
        for label, (name, count) in enumerate(sorted(counts.items()))
        for number in range(count)
    }
    files |= {f"GasHisSDB/{size}/{name}/._litter.png": b"no image" for name in counts}
    manual.mkdir(parents=True, exist_ok=True)
    if zipped:
        with zipfile.ZipFile(manual / "GasHisSDB.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    for name, content in files.items():
        (manual / name).parent.mkdir(parents=True, exist_ok=True)
        (manual / name).write_bytes(content)


def store(
    data_dir: Path,
    name: str,
    features: dict,
    splits: dict[str, list[dict]],
    shards: int | None = None,
) -> pathlib.Path:
    """Writes a data set as tensorflow-datasets prepares it, for which there is no builder.

    `shards` is the number of files for each split.

    Returns:
        The folder with its `dataset_info.json`.
    """
    import tensorflow_datasets as tfds

    class Writer(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Writer.name = name
    writer = Writer(data_dir=os.fspath(data_dir))
    writer.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=shards)
    )
    return pathlib.Path(writer.data_dir)
