"""Builder of GasHisSDB, a data set of gastric histopathology images, for tensorflow-datasets."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, ClassVar

import tensorflow_datasets as tfds

CLASSES = ("Abnormal", "Normal")

# Published number of images of each class, by the side of the images in pixels.
PUBLISHED = {
    "160": {"Abnormal": 13_124, "Normal": 20_160},
    "120": {"Abnormal": 24_801, "Normal": 40_460},
    "80": {"Abnormal": 59_151, "Normal": 87_500},
}

HELD_OUT = 0.2

_DESCRIPTION = """
245,196 crops of 600 microscope images of gastric tissue (H&E stain), squares of 160, 120 and 80
pixels that pathologists labeled: "Abnormal" shows cancer, "Normal" does not.

It is published without splits. This builder takes a fifth of each class for validation, chosen by
the hash of the file names, so it is the same on every machine. Published accuracies were measured
with other random splits, so the images differ. In all of these splits, crops of one microscope
image are in both training and validation.
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
    """Builder of GasHisSDB from its published folder or zip file.

    The configurations `"160"` (the default), `"120"` and `"80"` are the side of the images in
    pixels. The splits are `train` and `validation`.

    Example, with GasHisSDB.zip or GasHisSDB/160/Abnormal/... in D/downloads/manual:
        train, validation = open_datasets("gashissdb/160", data_dir="D")
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Split by the hash of the file names."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put GasHisSDB.zip, or the folder GasHisSDB that it contains, into the manual folder. "
        "https://gitee.com/neuhwm/GasHisSDB links to it and states its terms."
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
        assert self.builder_config is not None  # the first configuration is the default
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
                example = {"image": file, "label": image.label, "file_name": image.name}
                yield image.name, example


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
    """Finds the images of one size, in the folder if there is one, else in the zip file."""
    root = manual / "GasHisSDB"
    openers: dict[str, Callable[[], IO[bytes]]]
    if root.is_dir():
        openers = {str(path): functools.partial(path.open, "rb") for path in root.rglob("*.png")}
    else:
        root = manual / "GasHisSDB.zip"
        archive = zipfile.ZipFile(root)
        openers = {name: functools.partial(archive.open, name) for name in archive.namelist()}
    found = []
    for name, opener in openers.items():
        parts = pathlib.PurePath(name).parts[-3:]
        is_image = name.endswith(".png") and len(parts) == 3
        # macOS puts files called "._name.png" beside the images.
        if is_image and parts[0] == size and parts[1] in CLASSES and parts[2][0] != ".":
            found.append(_Image(size, parts[1], parts[2], opener))
    missing = set(CLASSES) - {image.label for image in found}
    if missing:
        raise ValueError(
            f"{root} is not as published: it has no images "
            f"{' and '.join(f'{size}/{label}/*.png' for label in sorted(missing))}. Download it "
            "again."
        )
    return found
