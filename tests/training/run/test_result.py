"""The summary of a run."""

from keras_coatnet.training.run.result import summary


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
