"""The figures of a run, as JSON."""

import json

from keras_coatnet.training.run.result import as_json


def test_infinity_is_no_part_of_the_json():
    for value in (float("inf"), float("-inf")):
        assert "Infinity" not in as_json({"steps": 12, "loss": value})


def test_what_is_not_known_is_no_part_of_the_json():
    text = as_json({"steps": 12, "macro_f1": float("nan"), "images/s": None, "top1": 0.5})
    found = json.loads(text, parse_constant=lambda name: name)
    assert found == {"steps": 12, "top1": 0.5}
