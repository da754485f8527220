"""Files that are made to do harm, or are damaged: for tests of all that opens images."""

from __future__ import annotations

import io
import os
import pathlib

import skimage.data
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge_jpeg(side: int = 65000, progressive: bool = False) -> bytes:
    """A few hundred bytes of JPEG whose header says that it has `side` x `side` pixels."""
    content = bytearray(encode(Image.new("RGB", (16, 16)), progressive=progressive))
    frame = content.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    content[frame + 5 : frame + 9] = side.to_bytes(2, "big") * 2
    return bytes(content)


def fake_ghostscript(folder: pathlib.Path, monkeypatch) -> pathlib.Path:
    """Puts a `gs` on the path; the file that is returned appears when it is started."""
    mark = folder / "started"
    folder.mkdir()
    (folder / "gs").write_text(f'#!/bin/sh\necho "$@" >> {mark}\nexit 1\n')
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    # Pillow remembers whether it has found one.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    return mark


def _originals() -> list[bytes]:
    with Image.open(pathlib.Path(skimage.data.data_dir) / "chelsea.png") as cat:
        small = cat.convert("RGB").resize((24, 17))
    gray = small.convert("L")
    return [
        encode(small),
        encode(small, progressive=True),
        encode(small.convert("CMYK")),
        encode(gray),
        encode(small, "PNG"),
        encode(small.quantize(16), "PNG"),
        encode(gray.convert("LA"), "PNG"),
        encode(small, "GIF", save_all=True, append_images=[small.rotate(90)]),
        encode(small, "BMP"),
        encode(small, "WEBP"),
        encode(small.convert("RGBA"), "WEBP", lossless=True),
        encode(small, "TIFF", compression="tiff_lzw"),
        encode(small, "PPM"),
        encode(small, "JPEG2000"),
        encode(small.convert("RGBA"), "TIFF", compression="tiff_deflate"),
    ]


ORIGINALS = _originals()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real file with bytes changed, cut off, doubled or put in; the header more often."""
    content = bytearray(draw(st.sampled_from(ORIGINALS)))
    for _ in range(draw(st.integers(1, 5))):
        end = len(content) if draw(st.booleans()) else min(len(content), 64)
        place = draw(st.integers(0, max(0, end - 1)))
        what = draw(st.sampled_from(["byte", "number", "cut", "double", "insert"]))
        if what == "byte":
            content[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif what == "number":
            number = draw(st.sampled_from([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 60000]))
            order = draw(st.sampled_from(["big", "little"]))
            content[place : place + 4] = number.to_bytes(4, order)
        elif what == "cut":
            del content[place:]
        elif what == "double":
            content += content[place:]
        else:
            content[place:place] = draw(st.binary(max_size=8))
    return bytes(content)
