"""Inference on Keras's OpenVINO backend: build, load weights, fuse, predict; no more than that."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.architectures import ARCHITECTURES
from tests import helpers, timm_models

pytestmark = [pytest.mark.tensorflow_only, pytest.mark.slow]

# Both kinds of relative position and of norms. All 24 architectures passed when this was written,
# in seven minutes: OpenVINO compiles each network for each shape.
NAMES = ("coatnet0", "coatnet_rmlp_nano_rw_224")
DEPTHS = (1, 1, 1, 1)

PREDICT = """
import json, sys
import numpy as np
import keras, keras_coatnet
folder, names = sys.argv[1], sys.argv[2:]
x = np.load(folder + "/images.npy")

def scores(model, images=x):
    return np.asarray(model.predict(images, verbose=0)).tolist()

answers = {}
for name in names:
    file = f"{folder}/{name}.weights.h5"
    whole = keras.saving.load_model(f"{folder}/{name}.keras")
    model = keras_coatnet.CoAtNet(
        whole.architecture, weights=file, input_shape=(64, 64, 3), classes=5
    )
    free = keras_coatnet.CoAtNet(
        whole.architecture, weights=file, input_shape=(None, None, 3), include_top=False
    )
    fused = keras_coatnet.fuse(model)
    answers[name] = {
        "whole": scores(whole),
        "weights": scores(model),
        "fused": scores(fused),
        "free": scores(free, x[:, :64, :32]),
    }
try:
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((len(x), 5)), verbose=0)
    trained = None
except Exception as error:
    trained = f"{type(error).__name__}: {error}"
print(json.dumps({"backend": keras.backend.backend(), "answers": answers, "fit": trained}))
"""


def test_it_predicts_what_tensorflow_predicts(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype("float32")
    np.save(tmp_path / "images.npy", images)
    expected = {}
    for name in NAMES:
        if name in timm_models.NAMES:
            config = timm_models.reduced_config(name, DEPTHS, 64)
        else:
            widths = {"widths": timm_models.WIDTHS, "depths": DEPTHS, "stem_width": 8}
            config = ARCHITECTURES[name].replace(**widths)
        model = keras_coatnet.CoAtNet(config, input_shape=(64, 64, 3), classes=5)
        helpers.randomize(model)
        model.save(tmp_path / f"{name}.keras")
        model.save_weights(tmp_path / f"{name}.weights.h5")
        free = keras_coatnet.CoAtNet(
            config,
            weights=tmp_path / f"{name}.weights.h5",
            input_shape=(None, None, 3),
            include_top=False,
        )
        whole = model.predict(images, verbose=0)
        oblong = free.predict(images[:, :64, :32], verbose=0)
        expected[name] = {"whole": whole, "weights": whole, "fused": whole, "free": oblong}
        keras.utils.clear_session()
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(tmp_path), *NAMES],
        # With CI, OpenVINO reports to nobody: Keras has imported it before the package can say so.
        env={**os.environ, "KERAS_BACKEND": "openvino", "CI": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["backend"] == "openvino"
    for name, answers in expected.items():
        for way, scores in answers.items():
            helpers.assert_matches(found["answers"][name][way], scores, 1e-4)
    assert found["fit"].startswith("NotImplementedError")
