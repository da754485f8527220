"""Malicious files of weights, and damaged files that would do the same harm.

Each is refused with a ValueError that names the file, at once and in little memory, by each way to
open a file: a constructor, `open_model`, and the command line.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import shutil
import struct
import time
import warnings
import zipfile
import zlib
from typing import Any

import h5py
import numpy as np
import pytest
import skimage.data

import keras_coatnet
from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.cli import main
from keras_coatnet.inference import open_model
from keras_coatnet.weights import foreign_files, keras_files
from tests.conftest import TINY

pytestmark = pytest.mark.tensorflow_only

CAT = pathlib.Path(skimage.data.data_dir) / "chelsea.png"
KECAM_FILE = pathlib.Path(__file__).parents[1] / "fixtures" / "kecam_96_weights.h5"
KECAM = ARCHITECTURES["kecam_coatnet0"].replace(
    widths=(64, 96, 64, 32), depths=(2, 1, 2, 1), stem_width=32
)
SUFFIXES = (".h5", ".weights.h5", ".keras")
CLASSES = 10
SECONDS, MEGABYTES = 2.0, 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Any]:
    """A valid file of each kind, by suffix, and the values of our model."""
    folder = tmp_path_factory.mktemp("sound")
    model = keras_coatnet.CoAtNet(TINY, input_shape=(32, 32, 3), classes=CLASSES)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    return {
        ".h5": KECAM_FILE,
        ".weights.h5": folder / "model.weights.h5",
        ".keras": folder / "model.keras",
        "weights": model.get_weights(),
    }


def peak() -> float:
    """The peak memory of this process in megabytes, since it was reset."""
    (line,) = (x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def at_once_and_in_little_memory():
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = peak(), time.process_time()
    yield
    took, grown = time.process_time() - start, peak() - before
    assert took < SECONDS, f"{took:.1f} seconds of processor time"
    assert grown < MEGABYTES, f"{grown:.0f} MB"


def ways(path: pathlib.Path):
    """Each way in which a user opens a file."""
    foreign = path.name.endswith(".h5") and not path.name.endswith(".weights.h5")
    yield lambda: keras_coatnet.CoAtNet(KECAM if foreign else TINY, weights=path)
    yield lambda: keras_coatnet.CoAtNet0(weights=str(path))
    yield lambda: open_model(path, "kecam_coatnet0" if foreign else None)


def assert_refused(path: pathlib.Path, match: str | None, capsys) -> None:
    for way in ways(path):
        with at_once_and_in_little_memory(), pytest.raises(ValueError, match=match) as caught:
            way()
        assert path.name in str(caught.value)
    capsys.readouterr()
    foreign = ["--architecture", "kecam_coatnet0"] if path.name == "bad.h5" else []
    with at_once_and_in_little_memory():
        assert main(["predict", str(CAT), "--model", str(path), *foreign]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and path.name in errors
    assert len([line for line in errors.splitlines() if "keras-coatnet: error" in line]) == 1


@pytest.fixture
def refused(saved, tmp_path, capsys):
    """Changes a valid file of one kind, and asserts that it is refused."""

    def check(suffix: str, change, match: str) -> None:
        path = tmp_path / f"bad{suffix}"
        if suffix == ".keras":
            content = io.BytesIO(members(saved[suffix])["model.weights.h5"])
            with h5py.File(content, "r+") as file:
                change(file)
            write_archive(path, {**members(saved[suffix]), "model.weights.h5": content.getvalue()})
        else:
            shutil.copy(saved[suffix], path)
            with h5py.File(path, "r+") as file:
                change(file)
        assert_refused(path, match, capsys)

    return check


def members(path: pathlib.Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_archive(path: pathlib.Path, content: dict[str, bytes], **options) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def a_dataset(file: h5py.File) -> tuple[h5py.Group, str, np.ndarray]:
    """Removes one array from a file. Returns its group, name and values."""
    found = []
    file.visititems(lambda name, item: found.append(name) if hasattr(item, "shape") else None)
    group, _, name = found[-1].rpartition("/")
    value = file[found[-1]][()]
    del file[found[-1]]
    return file[group], name, value


# --- references to other files -------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """Other files of this machine: an HDF5 file, and plain bytes."""
    values = np.random.default_rng(0).normal(size=1_000_000).astype("float32")
    with h5py.File(tmp_path / "private.h5", "w") as file:
        file["values"] = values
    (tmp_path / "private.bin").write_bytes(values.tobytes())
    return tmp_path


def _external_storage(file, elsewhere):
    group, name, value = a_dataset(file)
    places = [(str(elsewhere / "private.bin"), 0, value.nbytes)]
    group.create_dataset(name, value.shape, value.dtype, external=places)


def _virtual(file, elsewhere):
    group, name, value = a_dataset(file)
    layout = h5py.VirtualLayout(value.shape, value.dtype)
    source = h5py.VirtualSource(elsewhere / "private.h5", "values", (1_000_000,))
    layout[...] = source[: value.size]
    group.create_virtual_dataset(name, layout)


def _external_link(file, elsewhere):
    group, name, _ = a_dataset(file)
    group[name] = h5py.ExternalLink(str(elsewhere / "private.h5"), "/values")


def _external_group(file, elsewhere):
    name = "model_weights" if "layers" not in file else "layers"
    if name in file:
        del file[name]
    file[name] = h5py.ExternalLink(str(elsewhere / "private.h5"), "/")


def _soft_link(file, elsewhere):
    group, name, value = a_dataset(file)
    file["aside"] = value
    group[name] = h5py.SoftLink("/aside")


def _dangling_link(file, elsewhere):
    file["nowhere"] = h5py.SoftLink("/there/is/none")


def _reference(file, elsewhere):
    group, name, _ = a_dataset(file)
    values = group.create_dataset(name, (1,), h5py.ref_dtype)
    values[0] = file.ref


def _region(file, elsewhere):
    group, name, value = a_dataset(file)
    file["aside"] = np.ravel(value)
    values = group.create_dataset(name, (1,), h5py.regionref_dtype)
    values[0] = file["aside"].regionref[:1]


def _variable_length(file, elsewhere):
    group, name, _ = a_dataset(file)
    group.create_dataset(name, (1,), h5py.vlen_dtype(np.float32))


def _type(file, elsewhere):
    file["a_type"] = np.dtype("float32")


ELSEWHERE = {
    "external storage": (_external_storage, "in another file"),
    "virtual": (_virtual, "in other files"),
    "external link": (_external_link, "is a link"),
    "external group": (_external_group, "is a link"),
    "soft link": (_soft_link, "is a link"),
    "dangling link": (_dangling_link, "is a link"),
    "reference": (_reference, "not numbers"),
    "region": (_region, "not numbers"),
    "variable length": (_variable_length, "not numbers"),
    "type": (_type, "neither a group nor an array"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_references_are_refused(refused, elsewhere, suffix, case):
    change, match = ELSEWHERE[case]
    refused(suffix, lambda file: change(file, elsewhere), match)


# --- arrays that declare more than they store ----------------------------------------------------

GIGABYTE = 1 << 28  # values of float32


def _zeros(file, total=6 * GIGABYTE, pieces=24, **options):
    for index in range(pieces):
        options = {"chunks": (1 << 20,), **options}
        file.create_dataset(f"zeros/{index}", (total // pieces,), "float32", **options)


def _unpacks_to_more(file):
    """A chunk of 16 kB that decompresses to 32 MB."""
    item = file.create_dataset("packed", (4096,), "float32", chunks=(4096,), compression="gzip")
    item.id.write_direct_chunk((0,), zlib.compress(bytes(32 << 20), 9))


def _in_many_chunks(file):
    file.create_dataset("values", (1 << 24,), "float32", chunks=(1,))


def _deep(file):
    group = file
    for _ in range(5000):  # over 45 seconds for HDF5's own visitor
        group = group.create_group("g")


def _around(file):
    """A group within itself is allowed, and does not end the search for arrays."""
    group = file.create_group("group")
    group["self"] = group
    group["root"] = file["/"]
    _zeros(file)


BOMBS = {
    "fill values": (_zeros, "bytes of arrays"),
    "packed": (lambda file: _zeros(file, compression="gzip"), "bytes of arrays"),
    "in one": (lambda file: _zeros(file, pieces=1), "bytes of arrays"),
    "in many": (lambda file: _zeros(file, pieces=1000), "bytes of arrays"),
    "huge": (lambda file: _zeros(file, 1 << 60, 1, chunks=(1 << 20,)), "bytes of arrays"),
    "a huge chunk": (
        lambda file: file.create_dataset("a", (8,), "f4", maxshape=(None,), chunks=(1 << 29,)),
        "bytes of arrays",
    ),
    "unpacks to more": (_unpacks_to_more, "decompresses to more"),
    "many chunks": (_in_many_chunks, "chunks"),
    "lzf": (
        lambda file: _zeros(file, 4096, 1, chunks=(64,), compression="lzf"),
        "unknown compression",
    ),
    "deep": (_deep, "deep"),
    "around": (_around, "bytes of arrays"),
}


@pytest.mark.parametrize("case", BOMBS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_declares_more_than_it_stores_is_refused(refused, suffix, case):
    change, match = BOMBS[case]
    refused(suffix, change, match)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_compressed_weights_are_read(saved, tmp_path, suffix):
    """HDF5 as `h5repack -f GZIP=9 -f SHUF` writes it, with checksums, and compressed archives."""
    content = io.BytesIO()
    source = saved[suffix]
    if suffix == ".keras":
        source = io.BytesIO(members(source)["model.weights.h5"])
    with h5py.File(source) as file, h5py.File(content, "w") as packed:
        packed.attrs.update(file.attrs)

        def copy(name, item):
            if isinstance(item, h5py.Group):
                packed.require_group(name).attrs.update(item.attrs)
                return
            options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
            packed.create_dataset(name, data=item[()], **(options if item.shape else {}))

        file.visititems(copy)
    path = tmp_path / f"packed{suffix}"
    if suffix == ".keras":
        inside = {**members(saved[suffix]), "model.weights.h5": content.getvalue()}
        write_archive(path, inside, compression=zipfile.ZIP_DEFLATED)
    else:
        path.write_bytes(content.getvalue())
    if suffix == ".h5":
        found, expected = foreign_files.read(path), foreign_files.read(KECAM_FILE)
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    else:
        assert keras_files.read_identity(path) == keras_files.read_identity(saved[suffix])
        found = keras_coatnet.CoAtNet(TINY, weights=path).get_weights()
        for value, expected in zip(found, saved["weights"], strict=True):
            np.testing.assert_array_equal(value, expected)


# --- archives, and the network that they name ----------------------------------------------------


def with_config(path: pathlib.Path, saved, config) -> pathlib.Path:
    """Writes a `.keras` file with another configuration: bytes, or an object for JSON."""
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    write_archive(path, {**members(saved[".keras"]), "config.json": text})
    return path


ODD_CONFIGS = {
    "a list": ([], "damaged"),
    "a text": ("text", "damaged"),
    "a number": (b"1e999", "damaged"),
    "no config": ({}, "damaged"),
    "a list within": ({"config": []}, "a list"),
    "none within": ({"config": None}, "NoneType"),
    "deep": (b"[" * 1_000_000, "damaged"),
    "deep objects": (b'{"a":' * 1_000_000, "damaged"),
    "no JSON": (b"{", "damaged"),
    "no text": (b"\xff\xfe\x00", "damaged"),
    "long number": (b"1" * 100_000, "damaged"),
    "identity a list": ({"config": {"keras_coatnet": []}}, "damaged"),
    "identity empty": ({"config": {"keras_coatnet": {}}}, "damaged"),
    "identity a text": ({"config": {"keras_coatnet": "coatnet0"}}, "damaged"),
}


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_invalid_configurations_are_refused(saved, tmp_path, capsys, case):
    config, match = ODD_CONFIGS[case]
    assert_refused(with_config(tmp_path / "bad.keras", saved, config), match, capsys)


ODD_IDENTITIES = {
    "a billion blocks": ({"depths": [1, 1, 1_000_000_000, 1]}, "at most 1000"),
    "a thousand stages": (
        {"depths": [1] * 9000, "widths": [8] * 9000, "layout": ["C"] * 9000},
        "at most 1000",
    ),
    "wide": ({"widths": [16, 24, 32, 8 * 10**12]}, "at most"),
    "wide and deep": ({"widths": [65536] * 4, "depths": [250] * 4}, "parameters"),
    "expansion": ({"expansion": 10**9}, "at most"),
    "much expansion": ({"expansion": 60_000, "widths": [8192] * 4}, "parameters"),
    "squeeze": ({"squeeze_ratio": 1e29}, "parameters"),
    "infinite": ({"squeeze_ratio": float("inf")}, "squeeze_ratio"),
    "not a number": ({"batch_norm_epsilon": float("nan")}, "batch_norm_epsilon"),
    "long": ({"pixel_std": [10**400] * 3}, "pixel_std"),
    "size": ({"input_size": 10**9}, "at most"),
    "more than the file holds": ({"widths": [512, 512, 1024, 4096]}, "holds"),
    "unknown field": ({"color": 1}, r"Unknown: \['color'\]"),
}


@pytest.mark.parametrize("case", ODD_IDENTITIES)
def test_impossible_networks_are_refused(saved, tmp_path, capsys, case):
    changes, match = ODD_IDENTITIES[case]
    config = json.loads(members(saved[".keras"])["config.json"])
    identity = config["config"]["keras_coatnet"]
    identity["architecture"].update(changes)
    assert_refused(with_config(tmp_path / "bad.keras", saved, config), match, capsys)
    path = tmp_path / "bad.weights.h5"
    shutil.copy(saved[".weights.h5"], path)
    with h5py.File(path, "r+") as file:
        file.attrs["keras_coatnet"] = json.dumps(identity)
    assert_refused(path, match, capsys)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", 10**9),
        ("classes", 0),
        ("classes", "ten"),
        ("classes", True),
        ("channels", 10**9),
        ("channels", None),
        ("include_preprocessing", "False"),
        ("architecture", None),
        ("surplus", 1),
    ],
)
def test_impossible_identities_are_refused(saved, tmp_path, capsys, field, value):
    path = tmp_path / "bad.weights.h5"
    shutil.copy(saved[".weights.h5"], path)
    with h5py.File(path, "r+") as file:
        identity = {**json.loads(file.attrs["keras_coatnet"]), field: value}
        file.attrs["keras_coatnet"] = json.dumps(identity)
    assert_refused(path, None, capsys)


@pytest.mark.parametrize("value", [1, [1, 2], b"\xff", "[]", "[" * 30_000, np.zeros(3)], ids=repr)
def test_an_identity_that_is_not_a_string_is_refused(saved, tmp_path, capsys, value):
    path = tmp_path / "bad.weights.h5"
    shutil.copy(saved[".weights.h5"], path)
    with h5py.File(path, "r+") as file:
        file.attrs["keras_coatnet"] = value
    assert_refused(path, "damaged", capsys)


def _bombed_config(path, content):
    content = {**content, "config.json": b'{"config": "' + b" " * (256 << 20) + b'"}'}
    write_archive(path, content, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def _large_config(path, content):
    write_archive(path, {**content, "config.json": b'{"config": [' + b"[]," * 5_000_000 + b"[]]}"})


def _bombed_weights(path, content):
    content = {**content, "model.weights.h5": bytes(256 << 20)}
    write_archive(path, content, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def _bombed_asset(path, content):
    content = {**content, "assets/a.txt": bytes(256 << 20)}
    write_archive(path, content, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def _encrypted(path, content):
    write_archive(path, content)
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = data.find(mark)
        while start >= 0:
            data[start + place] |= 1
            start = data.find(mark, start + 1)
    path.write_bytes(data)


def _twice(path, content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in [*content.items(), *content.items()]:
                archive.writestr(name, data)


def _declares(size):
    """Writes another size of the configuration into the archive's directory."""

    def change(path, content):
        write_archive(path, content)
        data = bytearray(path.read_bytes())
        entry = data.rfind(b"config.json") - 46  # of the directory, which is at the end
        assert data[entry : entry + 4] == b"PK\1\2"
        struct.pack_into("<II", data, entry + 20, size, size)
        path.write_bytes(data)

    return change


def _without(name):
    return lambda path, content: write_archive(
        path, {key: data for key, data in content.items() if key != name}
    )


ARCHIVES = {
    "bombed config": (_bombed_config, "declares"),
    "large config": (_large_config, "at most"),
    "bombed weights": (_bombed_weights, "declares"),
    "bombed asset": (_bombed_asset, "declares"),
    "encrypted": (_encrypted, "encrypted"),
    "twice": (_twice, "twice"),
    "declares 4 GB": (_declares(2**32 - 2), "declares"),
    "declares 1 MB": (_declares(1 << 20), "damaged"),
    "declares nothing": (_declares(0), "damaged"),
    "no config": (_without("config.json"), "no config.json"),
    "no weights": (_without("model.weights.h5"), "no model.weights.h5"),
    "empty": (lambda path, content: write_archive(path, {}), "no config.json"),
    "bzip2": (
        lambda path, content: write_archive(path, content, compression=zipfile.ZIP_BZIP2),
        "compression that Keras never uses",
    ),
    "cut": (
        lambda path, content: (
            write_archive(path, content),
            path.write_bytes(path.read_bytes()[:-9]),
        ),
        "damaged",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_invalid_archives_are_refused(saved, tmp_path, capsys, case):
    write, match = ARCHIVES[case]
    write(tmp_path / "bad.keras", members(saved[".keras"]))
    assert_refused(tmp_path / "bad.keras", match, capsys)


# --- the command line's own files ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "Received: []"),
        ("null", "Received: None"),
        ('{"name": "x", "a": 1' + " " * (2 << 20) + "}", "at most"),
        ('{"widths": [8, 8], "depths": [1, 1000000000], "layout": ["C", "T"]}', ""),
        ("\udcff", ""),
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("option", ["recipe", "model"])
def test_invalid_json_files_are_refused_in_one_line(tmp_path, capsys, option, text, match):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    words = [str(path)] if option == "recipe" else ["transfer", "--model", str(path)]
    with at_once_and_in_little_memory():
        assert main(["train", *words, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keras-coatnet: error: ") and path.name in line and match in line
