"""The summary of a run."""

import json

from keras_coatnet.training.run.result import as_json, summary


def test_summary_aligns_and_writes_numbers_for_readers(tmp_path):
    path = tmp_path / "best.weights.h5"
    rows = [("parameters", 24_000_000), ("top-1", 0.812345), ("saved", path), ("resumed", False)]
    assert summary([*rows, ("f1", None)]).splitlines() == [
        "parameters  24,000,000",
        "top-1       0.8123",
        f"saved       {path}",
        "resumed     False",
        "f1          -",
    ]
    assert summary({}) == ""


def test_infinity_is_no_part_of_the_json():
    for value in (float("inf"), float("-inf")):
        assert "Infinity" not in as_json({"steps": 12, "loss": value})


def test_what_is_not_known_is_no_part_of_the_json():
    text = as_json({"steps": 12, "macro_f1": float("nan"), "images/s": None, "top1": 0.5})
    found = json.loads(text, parse_constant=lambda name: name)
    assert found == {"steps": 12, "top1": 0.5}
