"""Weights by name, end to end: from `weights="imagenet"` to timm's logits.

The hub is a server on this machine, and what it has under the real names are timm's models with
random values. Each job is a process of its own, because the hub's client reads its environment
once, at import.
"""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from keras_coatnet.weights.registry import CHECKPOINTS
from tests import timm_models
from tests.hub_server import HubServer

# One worker of pytest-xdist runs them all: they share a server and 110 MB of weights.
pytestmark = [pytest.mark.tensorflow_only, pytest.mark.xdist_group("names")]

NAME = "coatnet_0_rw_224.sw_in1k"  # what CoAtNet0 means by "imagenet"
NAME_12K = "coatnet_rmlp_1_rw2_224.sw_in12k"  # what CoAtNet1 means by "imagenet12k"

PREAMBLE = """
import json, sys, time
import numpy as np
import keras, keras_coatnet
from keras_coatnet import *
job = json.loads(sys.argv[1])

def timed(make):
    start = time.perf_counter()
    made = make()
    return made, time.perf_counter() - start

def compute(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))
"""


@dataclasses.dataclass(frozen=True)
class Hub:
    """The server, the home folder of its clients, and the expected results."""

    server: HubServer
    home: object
    raw: np.ndarray  # images of 0 to 255
    expected: np.ndarray  # timm's logits of them

    def run(self, script, **environment):
        """Runs a script, and returns the JSON that it printed last and its stderr."""
        self.server.requests.clear()
        job = {"raw": str(self.home / "raw.npy"), "out": str(self.home / "out.npy")}
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + script, json.dumps(job)],
            env=self.server.environment(self.home, **environment),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    @property
    def output(self):
        """What the last script saved."""
        return np.load(self.home / "out.npy")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    raw = np.random.default_rng(0).integers(0, 256, (2, 7, 7, 3))
    raw = raw.repeat(32, 1).repeat(32, 2).astype("float32")
    np.save(home / "raw.npy", raw)
    model = timm_models.random_model("coatnet_0_rw_224", 224, num_classes=1000)
    expected = timm_models.logits(model, (raw / 255 - 0.5) / 0.5)
    path = home / "file.safetensors"
    timm_models.save(model, path)
    with HubServer() as server:
        server.add_model(CHECKPOINTS[NAME].repo, "model.safetensors", path.read_bytes())
        path.unlink()
        yield Hub(server, home, raw, expected)
    for file in home.rglob("*"):  # pytest keeps the folders of three runs
        if file.is_file() and file.stat().st_size > 10_000_000:
            file.unlink()


LOGITS = """
model = CoAtNet0(weights="imagenet", classifier_activation=None)
np.save(job["out"], compute(model, np.load(job["raw"])))
print(json.dumps({"shape": model.output_shape, "classes": model.classes}))
"""


@pytest.mark.slow
def test_imagenet_gives_timm_s_logits_then_again_without_the_network(hub):
    result, log = hub.run(LOGITS)
    assert result == {"shape": [None, 1000], "classes": 1000}
    np.testing.assert_allclose(hub.output, hub.expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(hub.output.argmax(-1), hub.expected.argmax(-1))
    assert f"timm/{NAME}" in log  # says what it downloads
    (got,) = [r for r in hub.server.asked("GET") if r.host == "cdn"]
    assert got.path == f"timm/{NAME}/model.safetensors"

    first = hub.output
    (hub.home / "out.npy").unlink()
    hub.run(LOGITS, HF_ENDPOINT="http://127.0.0.1:9")  # no server
    np.testing.assert_array_equal(hub.output, first)
    assert hub.server.requests == []


WAYS = """
x = np.load(job["raw"])[:, :64, :64]
options = {"include_top": False, "pooling": "avg", "input_shape": (64, 64, 3)}
models = [
    *(CoAtNet0(weights=w, **options) for w in ("imagenet", "NAME", "timm/NAME", "hf://timm/NAME")),
    CoAtNet("coatnet_0_rw_224", weights="hf://timm/NAME", **options),
]
np.save(job["out"], np.stack([compute(model, x) for model in models]))

# The better of two, after those above: a process's first model pays for imports.
warm = min(timed(lambda: CoAtNet0(weights="imagenet"))[1] for _ in range(2))
bare = min(timed(lambda: CoAtNet0(weights=None))[1] for _ in range(2))
same = min(timed(lambda: CoAtNet("coatnet_0_rw_224"))[1] for _ in range(2))
print(json.dumps({"warm": warm, "bare": bare, "same": same}))
""".replace("NAME", NAME)


@pytest.mark.slow
def test_all_names_find_the_same_file_and_a_cached_one_loads_fast(hub, capsys):
    seconds, _ = hub.run(WAYS)
    for output in hub.output[1:]:
        np.testing.assert_array_equal(output, hub.output[0])
    assert len([r for r in hub.server.asked("GET") if r.host == "cdn"]) <= 1
    ratio, own = seconds["warm"] / seconds["bare"], seconds["warm"] / seconds["same"]
    with capsys.disabled():
        print(
            f"\nCoAtNet0: cached weights {seconds['warm']:.2f} s; untrained {seconds['bare']:.2f} s"
            f" (ratio {ratio:.2f}); the same network untrained {seconds['same']:.2f} s ({own:.2f})",
            file=sys.stderr,  # what pytest-xdist shows of a worker
        )
    assert ratio < 3  # under 2 on an idle machine


# Calls that must be refused before any request, and words of the message.
REFUSED = [
    ('CoAtNet3(weights="imagenet")', ["imagenet12k"]),
    ('CoAtNet3(weights="imagenet12k_ft")', ["imagenet12k"]),
    ("CoAtNet3()", ["imagenet12k"]),
    ("CoAtNet5()", ["coatnet5", "weights=None"]),
    ('CoAtNet5(weights="imagenet12k")', ["coatnet5", "weights=None"]),
    ('CoAtNet0(weights="imagenet12k")', ["imagenet"]),
    ('CoAtNet0(weights="imagenet21k")', ["imagenet21k", "Did you mean"]),
    ('CoAtNet0(weights="coatnet_0_rw_224")', ["Did you mean", NAME]),
    ("CoAtNet0(classes=10)", ["1000", "10", "include_top=False"]),
    ('CoAtNet1(weights="imagenet12k", classes=1000)', ["11821", "1000", "include_top=False"]),
    ("CoAtNet0(input_shape=(224, 224, 1))", ["3 channels", "weights=None"]),
    ("CoAtNet0(include_top=False, input_shape=(None, None, 4))", ["3 channels"]),
    ("CoAtNet0(input_tensor=keras.Input((224, 224, 1)))", ["3 channels"]),
    ('CoAtNet0(classifier_activation="relu")', ["relu", "softmax"]),
    ('CoAtNet0(pooling="mean")', ["mean", "avg"]),
    ("CoAtNet0(classes=0)", ["classes=0"]),
    ("CoAtNet0(input_shape=(31, 31, 3))", ["32"]),
    ("CoAtNet0(input_shape=(None, None, 3))", ["include_top"]),
    ('CoAtNet0(weights="coatnet_1_rw_224.sw_in1k")', ["coatnet_1_rw_224", "CoAtNet("]),
    ('CoAtNet("coatnet_0_rw_224", weights="imagenet")', ["imagenet", NAME]),
    (f'CoAtNet("coatnet_1_rw_224", weights="{NAME}")', ["coatnet_0_rw_224"]),
    (f'CoAtNet("coatnet0", weights="{NAME}")', ["coatnet_0_rw_224"]),
    ('CoAtNet0(weights="timm/kecam_coatnet0_224")', ["timm/kecam_coatnet0_224"]),
    ('CoAtNet0(weights="missing.safetensors")', ["missing.safetensors"]),
    ("CoAtNet0(weights=1)", ["int"]),
]
REFUSALS = """
def outcome(call):
    try:
        return f"built {eval(call)}"
    except ValueError as error:
        return f"ValueError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([outcome(call) for call in CALLS]))
""".replace("CALLS", repr([call for call, _ in REFUSED]))


@pytest.fixture(scope="module")
def refusals(hub):
    """The error of each of these calls, and the requests that arrived."""
    outcomes, _ = hub.run(REFUSALS)
    return dict(zip([c for c, _ in REFUSED], outcomes, strict=True)), list(hub.server.requests)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[call for call, _ in REFUSED])
def test_invalid_calls_are_refused(refusals, call, words):
    outcome = refusals[0][call]
    assert outcome.startswith("ValueError: "), outcome
    for word in words:
        assert word in outcome


@pytest.mark.slow
def test_a_refusal_makes_no_request(refusals):
    assert refusals[1] == []


IMAGENET_12K = """
model = CoAtNet1(weights="imagenet12k", input_shape=(64, 64, 3), classifier_activation=None)
np.save(job["out"], compute(model, np.load(job["raw"])[:, 80:144, 80:144]))
print(json.dumps({"shape": model.output_shape, "classes": model.classes}))
"""


@pytest.mark.slow
def test_imagenet12k_brings_its_11821_classes(hub):
    """Without `classes`, whose default of 1000 does not fit the file."""
    theirs = timm_models.random_model(
        "coatnet_rmlp_1_rw2_224", 64, num_classes=CHECKPOINTS[NAME_12K].classes, img_size=64
    )
    path = hub.home / "file.safetensors"
    timm_models.save(theirs, path)
    hub.server.add_model(CHECKPOINTS[NAME_12K].repo, "model.safetensors", path.read_bytes())
    path.unlink()
    result, _ = hub.run(IMAGENET_12K)
    assert result == {"shape": [None, 11821], "classes": 11821}
    # An MLP computes its biases, so they are the same at every size, such as timm's 64.
    images = (hub.raw[:, 80:144, 80:144] / 255 - 0.5) / 0.5
    expected = timm_models.logits(theirs, images)
    np.testing.assert_allclose(hub.output, expected, rtol=0, atol=2e-5)
