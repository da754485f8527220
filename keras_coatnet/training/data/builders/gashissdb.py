"""GasHisSDB, the gastric histopathology sub-size image database, for tensorflow-datasets."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, ClassVar

import tensorflow_datasets as tfds

CLASSES = ("Abnormal", "Normal")

# Images of each class by their side in pixels: 245,196 in all.
PUBLISHED = {
    "160": {"Abnormal": 13_124, "Normal": 20_160},
    "120": {"Abnormal": 24_801, "Normal": 40_460},
    "80": {"Abnormal": 59_151, "Normal": 87_500},
}

HELD_OUT = 0.2

_DESCRIPTION = """
Parts of 600 microscope images of gastric tissue (H&E stain), 245,196 in all, cut to squares of
160, 120 and 80 pixels and labeled by pathologists: "Abnormal" shows cancer, "Normal" does not.

It is published without splits. Here a fifth of each class is for validation, chosen by the hash of
each file's name: the same images on every machine. Published figures come from random splits of
their authors' own: ours compare with them, but are not of the same images. In all of them, parts
of one microscope image fall on both sides.
"""

_CITATION = """\
@article{hu2022gashissdb,
  title = {{GasHisSDB}: A New Gastric Histopathology Image Dataset for Computer Aided Diagnosis of
           Gastric Cancer},
  author = {Hu, Weiming and Li, Chen and Li, Xiaoyan and Rahaman, Md Mamunur and Ma, Jiquan and
            Zhang, Yong and Chen, Haoyuan and Liu, Wanli and Sun, Changhao and Yao, Yudong and
            Sun, Hongzan and Grzegorzek, Marcin},
  journal = {Computers in Biology and Medicine},
  year = {2022},
  eprint = {2106.02473},
}
"""


class Gashissdb(tfds.core.GeneratorBasedBuilder):
    """Builder of GasHisSDB from the folder, or the zip file, as it is published.

    The configurations are `"160"` (the default), `"120"` and `"80"`: the side of the images in
    pixels. The splits are `train` and `validation`.

    Example, with GasHisSDB.zip or GasHisSDB/160/Abnormal/... in D/downloads/manual:
        train, validation = open_datasets("gashissdb/160", data_dir="D")
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "As published, with a split by the hash of the file names."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put GasHisSDB.zip, or the folder GasHisSDB that is in it, into the manual folder. It is "
        "linked from https://gitee.com/neuhwm/GasHisSDB, with its terms."
    )
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=size, description=f"Images of {size} x {size} pixels.")
        for size in PUBLISHED
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://gitee.com/neuhwm/GasHisSDB",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        assert self.builder_config is not None  # it is the first one by default
        size = self.builder_config.name
        found = _find(pathlib.Path(dl_manager.manual_dir), size)
        parts = {"train": [], "validation": []}
        for label in CLASSES:
            images = sorted((image for image in found if image.label == label), key=_Image.digest)
            count = round(HELD_OUT * len(images))
            parts["validation"] += images[:count]
            parts["train"] += images[count:]
            expected = PUBLISHED[size][label]
            if len(images) != expected:
                warnings.warn(
                    f"GasHisSDB/{size} has {len(images):,} images of the class {label} here; "
                    f"{expected:,} were published.",
                    stacklevel=2,
                )
        return {split: self._generate_examples(images) for split, images in parts.items()}

    def _generate_examples(self, images: list[_Image]) -> Iterator[tuple[str, dict]]:
        for image in images:
            with image.open() as file:
                yield (
                    image.name,
                    {"image": file, "label": image.label, "file_name": image.name},
                )


@dataclasses.dataclass(frozen=True)
class _Image:
    size: str
    label: str
    file: str
    open: Callable[[], IO[bytes]]

    @property
    def name(self) -> str:
        return f"{self.label}/{self.file}"

    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.size}/{self.name}".encode()).digest()


def _find(manual: pathlib.Path, size: str) -> list[_Image]:
    """The images of one size, in the folder if there is one, or else in the zip file."""
    folder, archive = manual / "GasHisSDB", manual / "GasHisSDB.zip"
    if folder.is_dir():
        opener: dict[str, Any] = {
            str(path): functools.partial(path.open, "rb") for path in folder.rglob("*.png")
        }
    else:
        file = zipfile.ZipFile(archive)
        opener = {name: functools.partial(file.open, name) for name in file.namelist()}
    found = []
    for name, open_it in opener.items():
        parts = pathlib.PurePath(name).parts[-3:]
        # macOS leaves "._name.png" files beside the images.
        if len(parts) == 3 and parts[0] == size and parts[1] in CLASSES and parts[2][0] != ".":
            if parts[2].endswith(".png"):
                found.append(_Image(size, parts[1], parts[2], open_it))
    missing = set(CLASSES) - {image.label for image in found}
    if missing:
        raise ValueError(
            f"{folder if folder.is_dir() else archive} is not as it was published: it has no "
            f"images {' and '.join(f'{size}/{label}/*.png' for label in sorted(missing))}."
        )
    return found
