"""Files of other libraries are read or refused as a whole, and set all variables of a model.

A damaged or foreign file raises a ValueError that names the file, and the model is not changed.
"""

import io
import json
import os
import pathlib
import pickle
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
from safetensors.numpy import save, save_file

import keras_coatnet
from keras_coatnet import cli
from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.weights import foreign_files
from keras_coatnet.weights.source import find_source
from tests import timm_models

KECAM_FILE = pathlib.Path(__file__).parents[1] / "fixtures" / "kecam_96_weights.h5"
KECAM = ARCHITECTURES["kecam_coatnet0"].replace(
    widths=(64, 96, 64, 32), depths=(2, 1, 2, 1), stem_width=32
)
SIZE = 64
SMALL = {"depths": (1, 1, 2, 1), "img_size": SIZE}

# Names of a few tensors, one of each kind that is translated differently.
STEM = "stem.conv1.weight"
DEPTHWISE = "stages.0.blocks.0.conv2_kxk.weight"
VARIANCE = "stages.0.blocks.0.norm1.running_var"
QKV = "stages.2.blocks.1.attn.qkv.weight"
QKV_BIAS = "stages.2.blocks.1.attn.qkv.bias"
TABLE = "stages.2.blocks.1.attn.rel_pos.relative_position_bias_table"
PROJECTION = "stages.2.blocks.1.attn.proj.weight"
MLP = "stages.2.blocks.1.mlp.fc1.weight"
GAMMA = "stages.2.blocks.1.norm1.weight"
FC, FC_BIAS = "head.fc.weight", "head.fc.bias"
KINDS = (STEM, DEPTHWISE, VARIANCE, QKV, QKV_BIAS, TABLE, PROJECTION, MLP, GAMMA, FC, FC_BIAS)


def snapshot(model):
    return {v.path: np.array(keras.ops.convert_to_numpy(v.value)) for v in model.variables}


def compute(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


def build(config, path, **kwargs):
    kwargs = {"include_preprocessing": False, **kwargs}
    if kwargs.get("include_top", True):
        kwargs.setdefault("classifier_activation", None)
    return keras_coatnet.CoAtNet(config, weights=path, **kwargs)


@pytest.fixture(scope="module")
def images():
    return timm_models.images(2, SIZE)


@pytest.fixture(scope="module")
def timm_file(images, tmp_path_factory):
    """A reduced coatnet_0_rw_224: its configuration, path, tensors and logits."""
    model, config = timm_models.random_model("coatnet_0_rw_224", SIZE, small=True, **SMALL)
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    timm_models.save(model, path)
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    return config, path, tensors, timm_models.logits(model, images)


@pytest.fixture(scope="module")
def victim(timm_file):
    """A model into which bad files are loaded, and its values before that."""
    model = build(timm_file[0], None, classes=timm_models.CLASSES)
    return model, snapshot(model)


def load_into(model, config, path):
    find_source(path, [config], None, "CoAtNet(config)").load(model, None)


def assert_refused(path, victim, config, match=None):
    """Asserts that a ValueError names the file, and that no variable of the model has changed."""
    model, before = victim
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of a float64 too large
            with pytest.raises(ValueError, match=match) as caught:
                load_into(model, config, path)
        after = snapshot(model)
        assert list(after) == list(before)
        changed = [n for n, value in before.items() if not np.array_equal(after[n], value)]
        assert not changed
    except BaseException:
        for variable in model.variables:  # a failure does not affect the next test
            variable.assign(before[variable.path])
        raise
    assert path.name in str(caught.value), f"the file is not named: {caught.value}"
    return str(caught.value)


@pytest.fixture
def refused(timm_file, victim, tmp_path):
    """Saves tensors, or writes bytes, as a `.safetensors` file and asserts that it is refused."""

    def check(content, match=None):
        path = tmp_path / "bad.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path)
        return assert_refused(path, victim, timm_file[0], match)

    return check


# --- every tensor is used, and every variable is set -----------------------------------------


@pytest.mark.slow
def test_a_whole_file_sets_every_variable(timm_file, images):
    config, path, _, expected = timm_file
    model = build(config, None, classes=timm_models.CLASSES)
    before = snapshot(model)
    load_into(model, config, path)
    for name, value in snapshot(model).items():
        if "seed_generator" not in name:
            assert not np.array_equal(value, before[name]), name
    np.testing.assert_allclose(compute(model, images), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_tensor_is_refused(refused, timm_file, name):
    message = refused({n: t for n, t in timm_file[2].items() if n != name})
    assert "nothing was loaded" in message


def test_missing_and_surplus_variables_are_both_listed(refused, timm_file):
    moved = {n.replace("blocks.1.mlp.fc1", "blocks.1.norm9"): t for n, t in timm_file[2].items()}
    assert "norm9" in refused(moved)
    # The new name is of timm's layout, but not of this network, and the old one is missing.
    moved = {n.replace("blocks.1.mlp.fc1", "blocks.1.ls1"): t for n, t in timm_file[2].items()}
    moved["stages.2.blocks.1.ls1.gamma"] = np.ones(64, "float32")
    del moved["stages.2.blocks.1.ls1.weight"], moved["stages.2.blocks.1.ls1.bias"]
    message = refused(moved, "nothing was loaded")
    assert "stage3_block2/ffn_expand/kernel" in message
    assert "stage3_block2/attention_scale/scale" in message


@pytest.mark.parametrize(
    "name",
    [
        "surplus",
        "stem.conv3.weight",
        "stages.2.blocks.1.attn.rel_pos.mlp.fc1.weight",
        "stages.2.blocks.1.ls1.gamma",
        "stages.2.blocks.2.norm1.weight",
        "stages.4.blocks.0.norm1.weight",
        "model.head.fc.weight",
        "head.pre_logits.fc.weight",
        "norm.running_mean",
        "stages..2.blocks.1.norm1.weight",
        "../../../etc/passwd",
        "",
        "stages.2.blocks.1.norm1.weight ",
        "stages.2.blocks.1.norm1.weight\n",
    ],
)
def test_a_surplus_tensor_is_refused(refused, timm_file, name):
    refused({**timm_file[2], name: np.ones((4, 4), "float32")})


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("stages.0.blocks.0.se_early.fc1.weight", "stages.0.blocks.0.se.fc1.weight"),
        ("norm.weight", "head.norm.weight"),
        (GAMMA, "stages.2.blocks.1.norm1.norm.weight"),
        (VARIANCE, VARIANCE.replace("stages.0", "stages.00")),
        (VARIANCE, VARIANCE.replace("blocks.0", "blocks.00")),
        (VARIANCE, VARIANCE.replace("stages.0", "stages.\u0660")),  # an Arabic zero
        (GAMMA, GAMMA.replace("stages.2", "stages.02")),
    ],
)
def test_two_tensors_for_one_variable_are_refused(refused, timm_file, name, twin):
    """Otherwise the last one would replace the other without a message."""
    refused({**timm_file[2], twin: timm_file[2][name]})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t[:-1], id="a row less"),
        pytest.param(lambda t: t[:0], id="no row"),
        pytest.param(lambda t: np.concatenate([t, t]), id="twice the rows"),
        pytest.param(lambda t: t[None], id="a rank more"),
        pytest.param(lambda t: t[0], id="a rank less"),
        pytest.param(lambda t: t.reshape(-1)[0], id="one number"),
        pytest.param(lambda t: t[..., :-1], id="a column less"),
        pytest.param(lambda t: t[..., :0], id="no column"),
    ],
)
def test_a_wrong_shape_or_rank_is_refused(refused, timm_file, name, change):
    tensor = np.array(change(timm_file[2][name]), order="C")
    refused({**timm_file[2], name: tensor})


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [QKV, VARIANCE, TABLE, FC_BIAS])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(refused, timm_file, name, value):
    tensor = timm_file[2][name].copy()
    tensor.reshape(-1)[-1] = value
    assert name in refused({**timm_file[2], name: tensor}, "NaN or infinite")


def test_infinities_that_cancel_are_refused(refused, timm_file):
    tensor = timm_file[2][QKV].copy()
    tensor.reshape(-1)[:2] = np.inf, -np.inf
    refused({**timm_file[2], QKV: tensor}, "NaN or infinite")


def test_what_float32_cannot_hold_is_refused(refused, timm_file):
    tensor = timm_file[2][QKV].astype("float64")
    tensor.reshape(-1)[0] = 1e300
    refused({**timm_file[2], QKV: tensor}, "NaN or infinite")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "bool"])
def test_whole_numbers_are_refused(refused, timm_file, dtype):
    tensor = (4 * timm_file[2][QKV]).astype(dtype)
    assert QKV in refused({**timm_file[2], QKV: tensor}, "weights must be")


def test_bfloat16_is_read_exactly(timm_file, images, tmp_path):
    """NumPy has no bfloat16. Some files have it beside float32."""
    timm_models.import_timm()
    import torch
    from safetensors.torch import save_file as save_torch

    config, _, tensors, expected = timm_file
    path = tmp_path / "model.safetensors"
    half = {
        name: torch.from_numpy(tensor).to(torch.bfloat16)
        for name, tensor in tensors.items()
        if tensor.ndim and not name.startswith("head.")
    }
    save_torch({**{n: torch.from_numpy(t) for n, t in tensors.items()}, **half}, path)
    read = foreign_files.read(path)
    for name, tensor in half.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], tensor.float().numpy(), name)
    np.testing.assert_array_equal(read[FC], tensors[FC])
    np.testing.assert_allclose(compute(build(config, path), images), expected, atol=0.5)


def test_bfloat16_that_is_not_finite_is_refused(timm_file, victim, tmp_path):
    timm_models.import_timm()
    import torch
    from safetensors.torch import save_file as save_torch

    path = tmp_path / "bad.safetensors"
    tensors = {name: torch.from_numpy(tensor) for name, tensor in timm_file[2].items()}
    wrong = tensors[QKV].to(torch.bfloat16)
    wrong[0] = torch.nan
    save_torch({**tensors, QKV: wrong}, path)
    assert QKV in assert_refused(path, victim, timm_file[0], "NaN or infinite")


# --- wrapped models, and pickled files -------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module."],
)
def test_the_names_of_a_wrapped_model_are_read(timm_file, images, tmp_path, prefix):
    config, _, tensors, expected = timm_file
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    np.testing.assert_allclose(compute(build(config, path), images), expected, atol=2e-5)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "ema.", "modules."])
def test_an_unknown_prefix_or_one_of_some_names_is_refused(refused, timm_file, prefix):
    tensors = timm_file[2]
    refused({prefix + n if n == FC else n: tensor for n, tensor in tensors.items()})
    if prefix in ("ema.", "modules."):
        refused({prefix + n: tensor for n, tensor in tensors.items()})
    else:  # two models in one file
        both = {prefix + n: tensor for n, tensor in tensors.items()}
        refused({**both, **tensors})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("filename", "form"),
    [
        ("pytorch_model.bin", "values"),
        ("checkpoint.pth", "state_dict"),
        ("with space and \"quote'.pth.tar", "training"),
        ("model.pt", "values"),
        ("last.ckpt", "wrapped"),
    ],
)
def test_a_pickled_file_is_refused_with_the_command_that_converts_it(
    timm_file, images, tmp_path, filename, form
):
    timm_models.import_timm()
    import argparse

    import torch

    config, _, tensors, expected = timm_file
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    content = {
        "values": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        # As timm's training writes it.
        "training": {"state_dict": state, "args": argparse.Namespace(lr=0.1), "version": 2},
        "wrapped": {"state_dict": {f"model.{n}": tensor for n, tensor in state.items()}},
    }[form]
    path = tmp_path / filename
    torch.save(content, path)
    with pytest.raises(ValueError, match="weights_only=True") as caught:
        build(config, path)
    line = str(caught.value).partition("give the new file: python ")[2]
    if form == "training":  # in a shell, with the Python of the tests
        subprocess.run(f"{sys.executable} {line}", shell=True, check=True)
    else:  # the same program, without a process that imports torch
        option, program = shlex.split(line)
        assert option == "-c"
        exec(program, {})
    (converted,) = tmp_path.glob("*.safetensors")
    assert converted.name.split(".")[0] == filename.split(".")[0]
    np.testing.assert_allclose(compute(build(config, converted), images), expected, atol=2e-5)


def test_the_command_does_not_open_a_pickle_that_runs_code(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "model.bin"
    path.write_bytes(pickle.dumps(Trap(str(trace))))
    with pytest.raises(ValueError, match="may run any program") as caught:
        keras_coatnet.CoAtNet0(weights=path)
    _, program = shlex.split(str(caught.value).partition("give the new file: python ")[2])
    with pytest.raises(pickle.UnpicklingError):
        exec(program, {})
    assert not trace.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "{folder}/image.jpg", "--model", "{folder}/model.bin"],
        ["train", "transfer", "--weights", "{folder}/model.pth", "--data", "{folder}"],
        ["train", "transfer", "--weights", "{folder}/missing.pth", "--data", "{folder}"],
    ],
    ids=["predict", "train", "missing"],
)
def test_the_command_line_refuses_a_pickled_file_in_one_line(tmp_path, capsys, command):
    for name in ("image.jpg", "model.bin", "model.pth"):
        (tmp_path / name).write_bytes(b"")
    status = cli.main([argument.format(folder=tmp_path) for argument in command])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    if "missing" in command[3]:
        assert "nor a file that exists" in error and "torch.load" not in error
    else:
        assert 'torch.load("' in error and "weights_only=True" in error
        assert f'"{tmp_path}/model.safetensors")' in error


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.05), ("float64", 2e-5)])
def test_other_precisions_are_read(timm_file, images, tmp_path, dtype, tolerance):
    config, _, tensors, expected = timm_file
    path = tmp_path / "model.safetensors"
    save_file({n: t if t.ndim == 0 else t.astype(dtype) for n, t in tensors.items()}, path)
    model = build(config, path)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    np.testing.assert_allclose(compute(model, images), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"])
def test_kernels_of_rank_two_and_four_are_read(timm_file, images, tmp_path, ending):
    """timm has saved both: of 1x1 convolutions and of dense layers."""
    config, _, tensors, expected = timm_file
    kernels = [name for name in tensors if name.endswith(ending)]
    assert {tensors[name].ndim for name in kernels} == {4}
    path = tmp_path / "model.safetensors"
    save_file({**tensors, **{name: tensors[name][:, :, 0, 0] for name in kernels}}, path)
    np.testing.assert_allclose(compute(build(config, path), images), expected, atol=2e-5)


@pytest.mark.slow
def test_counters_and_indices_are_ignored(timm_file, images, tmp_path):
    config, _, tensors, expected = timm_file
    assert any(name.endswith("num_batches_tracked") for name in tensors)
    without = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    more = {TABLE.replace("bias_table", "index"): np.zeros((16, 16), "int64")}
    for content in (without, {**without, **more}):
        path = tmp_path / "model.safetensors"
        save_file(content, path)
        np.testing.assert_allclose(compute(build(config, path), images), expected, atol=2e-5)


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-5, 1e-3, 0.1, 0.5, 0.999, "last byte"])
def test_a_file_cut_short_is_refused(refused, timm_file, share):
    content = timm_file[1].read_bytes()
    length = len(content) - 1 if share == "last byte" else int(share * len(content))
    refused(content[:length], "cut short|damaged|no safetensors")


def test_a_file_with_bytes_after_its_end_is_refused(refused, timm_file):
    refused(timm_file[1].read_bytes() + b"\0")


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100, 100_000])
def test_random_bytes_are_refused(refused, length):
    refused(np.random.default_rng(length).bytes(length))


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(struct.pack("<Q", 2**60) + b"{}", id="an exabyte of header"),
        pytest.param(struct.pack("<Q", 2**64 - 1) + b"{}", id="the longest header"),
        pytest.param(struct.pack("<Q", 0), id="no header"),
        pytest.param(with_header({}), id="no tensors"),
        pytest.param(with_header([]), id="a list"),
        pytest.param(with_header(b"{" * 1000), id="no JSON"),
        pytest.param(with_header(b"[" * 100_000), id="deep JSON"),
        pytest.param(with_header(b"\xff\xfe{}"), id="no UTF-8"),
        pytest.param(with_header({"a": entry(0, 400)}, bytes(4)), id="ends outside"),
        pytest.param(with_header({"a": entry(-4, 0)}, bytes(4)), id="begins before"),
        pytest.param(with_header({"a": entry(4, 0)}, bytes(4)), id="ends before it begins"),
        pytest.param(with_header({"a": entry(4, 8)}, bytes(8)), id="a gap"),
        pytest.param(
            with_header({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), id="the same twice"
        ),
        pytest.param(
            with_header({"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))}, bytes(12)), id="overlap"
        ),
        pytest.param(with_header({"a": entry(0, 4, (2**62, 2**62))}, bytes(4)), id="a huge shape"),
        pytest.param(with_header({"a": entry(0, 4, (-1,))}, bytes(4)), id="a negative shape"),
        pytest.param(with_header({"a": entry(0, 4, dtype="F33")}, bytes(4)), id="no such type"),
        pytest.param(with_header({"a": 1}, bytes(4)), id="no entry"),
        pytest.param(
            with_header(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                bytes(4),
            ),
            id="a name twice",
        ),
    ],
)
def test_damaged_headers_are_refused(refused, content):
    refused(content)


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".weights.h5", ".keras"])
def test_a_pickle_is_never_opened(timm_file, victim, tmp_path, suffix):
    trace = tmp_path / "trace"
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(pickle.dumps(Trap(str(trace))))
    assert_refused(path, victim, timm_file[0])
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".weights.h5", ".keras"])
def test_a_zip_is_refused(timm_file, victim, tmp_path, suffix):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(str(tmp_path / "trace"))))
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content.getvalue())
    assert_refused(path, victim, timm_file[0])
    assert not (tmp_path / "trace").exists()


def test_a_safetensors_file_with_another_suffix_is_refused(timm_file, victim, tmp_path):
    for suffix in (".h5", ".weights.h5", ".keras", ".bin"):
        path = tmp_path / f"bad{suffix}"
        shutil.copy(timm_file[1], path)
        assert_refused(path, victim, timm_file[0])


# --- HDF5 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kecam_victim():
    model = build(KECAM, None, classes=10, input_shape=(96, 96, 3))
    return model, snapshot(model)


@pytest.fixture
def refused_h5(kecam_victim, tmp_path):
    """Copies the recorded file, lets a function change it, and asserts that it is refused."""
    path = tmp_path / "bad.h5"

    def check(change, match=None):
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            shutil.copy(KECAM_FILE, path)
            with h5py.File(path, "r+") as file:
                change(file)
        return assert_refused(path, kecam_victim, KECAM, match)

    return check


def replace(file, name, value):
    """Puts another value at the only dataset whose path ends in `name`."""
    found = []
    file.visit(lambda path: found.append(path) if path.endswith(name) else None)
    (path,) = found
    del file[path]
    if value is not None:
        file[path] = value


QKV_H5 = "stack_3_block_1_mhsa_qkv_conv/kernel:0"
TABLE_H5 = "stack_3_block_1_mhsa_pos_emb/positional_embedding:0"
GAMMA_H5 = "stack_1_block_1_preact_bn/gamma:0"
KINDS_H5 = ("stem_1_conv/kernel:0", "predictions/kernel:0", QKV_H5, TABLE_H5, GAMMA_H5)


@pytest.mark.slow
def test_the_recorded_h5_is_read(kecam_victim):
    model, before = kecam_victim
    load_into(model, KECAM, KECAM_FILE)
    assert not np.array_equal(snapshot(model)["stem_conv1/kernel"], before["stem_conv1/kernel"])
    for variable in model.variables:
        variable.assign(before[variable.path])


@pytest.mark.parametrize("name", KINDS_H5)
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(None, id="missing"),
        pytest.param(np.float32(1), id="one number"),
        pytest.param(np.zeros((0,), "float32"), id="empty"),
        pytest.param(np.zeros((3, 3), "float32"), id="another rank"),
        pytest.param(np.zeros((1, 1, 7, 96), "float32"), id="another shape"),
        pytest.param(np.full((4,), np.nan, "float32"), id="NaN"),
        pytest.param(np.zeros((4,), "int32"), id="whole numbers"),
        pytest.param(np.zeros((4,), "complex64"), id="complex numbers"),
        pytest.param("text", id="text"),
        pytest.param(np.zeros((4,), [("a", "float32")]), id="records"),
    ],
)
def test_a_wrong_dataset_is_refused(refused_h5, name, value):
    refused_h5(lambda file: replace(file, name, value))


def test_surplus_datasets_are_refused(refused_h5):
    values = np.ones(64, "float32")
    refused_h5(lambda file: file.create_dataset("surplus/kernel:0", data=values))
    refused_h5(lambda file: file.create_dataset("surplus", data=values))
    refused_h5(lambda file: file.create_dataset("stack_9_block_1_preact_bn/gamma:0", data=values))


@pytest.mark.parametrize(
    "twin",
    [
        f"elsewhere/{GAMMA_H5}",
        "stack_01_block_1_preact_bn/gamma:0",
        "stack_1_block_1_preact_bn/stack_1_block_1_preact_bn/gamma",
    ],
)
def test_two_datasets_for_one_variable_are_refused(refused_h5, twin):
    refused_h5(lambda file: file.create_dataset(twin, data=np.ones(32, "float32")))


def test_a_dataset_that_declares_more_than_any_memory_is_refused(refused_h5):
    """HDF5 does not store chunks that were never written, so the file is small."""

    def claim(file):
        replace(file, GAMMA_H5, None)
        name = f"stack_1_block_1_preact_bn/{GAMMA_H5}"
        file.create_dataset(name, (2**46,), "float32", chunks=(1024,))

    refused_h5(claim)


def test_weights_that_are_no_group_are_refused(refused_h5):
    def change(file):
        for name in list(file):
            del file[name]
        file["model_weights"] = np.zeros(4, "float32")

    refused_h5(change)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 0.9, 0.9999])
def test_an_h5_cut_short_is_refused(refused_h5, share):
    content = KECAM_FILE.read_bytes()
    refused_h5(content[: int(share * len(content))], "cut short|damaged|no HDF5|no weights")


def test_an_h5_overwritten_in_places_is_refused_or_read(kecam_victim, tmp_path):
    """It is read, or refused with a ValueError. There is no other exception."""
    rng = np.random.default_rng(0)
    content = np.frombuffer(KECAM_FILE.read_bytes(), "uint8")
    path = tmp_path / "bad.h5"
    for _ in range(30):
        damaged = content.copy()
        # The front has the tree of groups, which is read first.
        places = rng.integers(0, 40_000, 40)
        damaged[places] = rng.integers(0, 256, 40)
        path.write_bytes(damaged.tobytes())
        try:
            find_source(path, [KECAM], None, "CoAtNet(config)")
        except ValueError as error:
            assert path.name in str(error)


def test_an_h5_of_another_library_is_refused(refused_h5, tmp_path):
    def empty(file):
        for name in list(file):
            del file[name]

    def of_keras(file):
        empty(file)
        file["layers/conv2d/vars/0"] = np.zeros((3, 3, 3, 8), "float32")
        file["layers/dense/vars/0"] = np.zeros((8, 10), "float32")

    refused_h5(empty, "no weights")
    refused_h5(of_keras)


# --- another model's file --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constructor", "name"),
    [
        ("CoAtNet0", "coatnet_rmlp_nano_rw_224"),
        ("CoAtNetNano", "coatnet_0_rw_224"),
        ("CoAtNet0", "coatnet_1_rw_224"),
    ],
)
def test_the_file_of_another_size_is_refused_and_its_architecture_named(
    tmp_path, constructor, name
):
    path = tmp_path / "other.safetensors"
    timm_models.save(timm_models.build(name, num_classes=1000), path)
    with pytest.raises(ValueError) as caught:
        getattr(keras_coatnet, constructor)(weights=path, input_shape=(SIZE, SIZE, 3))
    path.unlink()
    message = str(caught.value)
    assert "other.safetensors" in message and constructor in message
    assert f"CoAtNet('{name}', weights=...)" in message


def test_a_reduced_file_fits_no_architecture(timm_file):
    with pytest.raises(ValueError, match=r"model\.safetensors.*CoAtNet\(config, weights=\.\.\.\)"):
        keras_coatnet.CoAtNet0(weights=timm_file[1], input_shape=(SIZE, SIZE, 3))


def test_other_widths_of_the_same_layout_are_refused(timm_file, victim, tmp_path):
    """Only the channels of one stage differ."""
    narrow, _ = timm_models.reduced("coatnet_0_rw_224", **SMALL)
    path = tmp_path / "bad.safetensors"
    tensors = {n: t.numpy() for n, t in narrow.state_dict().items()}
    for name in [n for n, t in tensors.items() if n.startswith("stages.3.") and t.ndim]:
        tensors[name] = np.concatenate([tensors[name], tensors[name]])
    save_file(tensors, path)
    assert_refused(path, victim, timm_file[0])


@pytest.fixture(scope="module")
def of_size_zero(tmp_path_factory):
    """timm's three CoAtNet-0, whole: paths and models by name."""
    folder = tmp_path_factory.mktemp("zero")
    found = {}
    for name in ("coatnet_0_rw_224", "coatnet_bn_0_rw_224", "coatnet_0_224"):
        model = timm_models.random_model(name, SIZE, num_classes=7, img_size=SIZE)
        found[name] = timm_models.save(model, folder / f"{name}.safetensors"), model
    yield found
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.xdist_group("of_size_zero")
@pytest.mark.parametrize("name", ["coatnet_0_rw_224", "coatnet_bn_0_rw_224", "coatnet_0_224"])
def test_coatnet0_finds_the_architecture_of_a_file(of_size_zero, images, name):
    path, theirs = of_size_zero[name]
    ours = keras_coatnet.CoAtNet0(
        weights=path,
        input_shape=(SIZE, SIZE, 3),
        classifier_activation=None,
        include_preprocessing=False,
    )
    assert ours.output_shape == (None, 7)
    assert ours.architecture.same_network(ARCHITECTURES[name])
    tolerance = 2e-4 if "bn" in name else 2e-5
    expected = timm_models.logits(theirs, images)
    np.testing.assert_allclose(compute(ours, images), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.xdist_group("of_size_zero")
def test_fine_tuned_weights_load_again_without_a_name(of_size_zero, images, tmp_path):
    shape = (SIZE, SIZE, 3)
    with pytest.warns(UserWarning, match="classifier for 3 classes"):
        model = keras_coatnet.CoAtNet0(
            weights=of_size_zero["coatnet_0_rw_224"][0], classes=3, input_shape=shape
        )
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    raw = 255 * (images - images.min()) / np.ptp(images)
    before = snapshot(model)["stem_conv1/kernel"]
    model.fit(raw, np.array([0, 2]), epochs=1, batch_size=2, verbose=0)
    assert not np.array_equal(snapshot(model)["stem_conv1/kernel"], before)
    model.save_weights(tmp_path / "tuned.weights.h5")
    again = keras_coatnet.CoAtNet0(weights=tmp_path / "tuned.weights.h5", input_shape=shape)
    assert again.output_shape == (None, 3)
    np.testing.assert_allclose(compute(again, raw), compute(model, raw), rtol=0, atol=1e-6)


# --- models from a file ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_number_of_classes_gets_a_new_classifier_alone(timm_file):
    config, path, _, _ = timm_file
    whole = snapshot(build(config, path))
    with pytest.warns(UserWarning, match=r"classifier for 4 classes.*model\.safetensors"):
        model = build(config, path, classes=4)
    assert model.output_shape == (None, 4)
    for name, value in snapshot(model).items():
        if name.startswith("predictions/"):
            assert value.shape[-1] == 4
        elif "seed_generator" not in name:
            np.testing.assert_array_equal(value, whole[name], name)


def test_the_classes_of_the_file_are_the_default(timm_file):
    config, path, _, _ = timm_file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(config, path).output_shape == (None, timm_models.CLASSES)


def test_a_file_without_classifier(timm_file, images, tmp_path):
    """As timm saves a model of `num_classes=0`."""
    config, _, tensors, _ = timm_file
    path = tmp_path / "bare.safetensors"
    save_file({n: t for n, t in tensors.items() if not n.startswith("head.")}, path)
    assert build(config, path, include_top=False).output_shape == (None, None, None, 96)
    with pytest.warns(UserWarning, match=r"head for 5 classes.*brings none"):
        assert build(config, path, classes=5).output_shape == (None, 5)


@pytest.mark.slow
def test_features_are_timm_s(timm_file, images):
    config, path, tensors, expected = timm_file
    features = compute(build(config, path, include_top=False), images)
    assert features.shape == (2, 2, 2, 96)
    pooled = compute(build(config, path, include_top=False, pooling="avg"), images)
    np.testing.assert_allclose(pooled, features.mean((1, 2)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(pooled @ tensors[FC].T + tensors[FC_BIAS], expected, atol=5e-5)
    highest = compute(build(config, path, include_top=False, pooling="max"), images)
    np.testing.assert_allclose(highest, features.max((1, 2)), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(96, 96), (32, 32), (64, 96), (75, 130)], ids=str)
def test_other_sizes_get_a_resized_table(timm_file, size):
    config, path, _, _ = timm_file
    images = timm_models.images(2, size)
    static = build(config, path, input_shape=(*size, 3), include_top=False)
    name = "stage3_block2/attention/position/table"
    height, width = (-(-side // 16) for side in size)
    table = snapshot(static)[name]
    assert table.shape[1:] == (2 * height - 1, 2 * width - 1)
    if size == (96, 96):
        original = snapshot(build(config, path))[name]
        from keras_coatnet.layers.relative_position import resize_table

        np.testing.assert_allclose(table, resize_table(original, height, width), atol=1e-6)
    # Of unknown size: the table keeps the file's size, and is resized at run time.
    unknown = build(config, path, input_shape=(None, None, 3), include_top=False)
    assert snapshot(unknown)[name].shape == snapshot(build(config, path))[name].shape
    expected = compute(static, images)
    np.testing.assert_allclose(compute(unknown, images), expected, rtol=0, atol=5e-5)
    assert compute(build(config, path, input_shape=(*size, 3)), images).shape == (2, 10)


def test_a_table_is_not_changed_at_the_size_of_the_file(timm_file):
    config, path, tensors, _ = timm_file
    table = snapshot(build(config, path))["stage3_block2/attention/position/table"]
    heads, rows, columns = table.shape
    expected = tensors[TABLE].T.reshape(heads, rows, columns)[:, ::-1, ::-1]
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_another_number_of_channels_is_refused(timm_file, channels):
    config, path, _, _ = timm_file
    with pytest.raises(ValueError, match=r"model\.safetensors.*3 channels.*weights=None"):
        build(config, path, input_shape=(SIZE, SIZE, channels))


def test_half_precision_takes_a_float32_file(timm_file, images):
    config, path, _, expected = timm_file
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = build(config, path)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    scores = compute(model, images)
    assert scores.dtype == "float32"
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1)


def test_the_bytes_of_a_file_are_not_a_path():
    with pytest.raises(ValueError, match=r"a name or a path.*bytes"):
        build(ARCHITECTURES["coatnet_0_rw_224"], save({"a": np.zeros(1, "float32")}))
