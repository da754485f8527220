"""Figures of an evaluation, compared with scikit-learn's."""

from __future__ import annotations

import csv
import json
import warnings

import numpy as np
import pytest
from sklearn import metrics

from keras_coatnet.training.evaluation.metrics import (
    CONFUSION_CLASSES,
    Evaluation,
    EvaluationCounter,
    format_figures,
)


def evaluate_counts(labels, top, losses, weights, classes, positive=None) -> Evaluation:
    """The figures of answers that are all there."""
    counter = EvaluationCounter(classes, positive)
    counter.update(labels, top, losses, weights)
    return counter.result()


def _answers(classes: int, count: int = 500, seed: int = 0) -> dict[str, np.ndarray]:
    """Random labels and the five best answers, that are right more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    values = rng.normal(size=(count, classes))
    values[np.arange(count), labels] += 1.5
    top = np.argsort(-values, axis=1)[:, :5]
    return {"labels": labels, "top": top, "losses": rng.exponential(size=count)}


def _names(number: int) -> list[str]:
    return [f"class {index}" for index in range(number)]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("classes", [3, 6, 50])
def test_figures_are_scikit_learns(classes):
    answers = _answers(classes)
    found = evaluate_counts(**answers, weights=None, classes=_names(classes))
    labels, best = answers["labels"], answers["top"][:, 0]
    assert found.count == 500
    assert found.loss == pytest.approx(answers["losses"].mean())
    assert found.top1 == pytest.approx(metrics.accuracy_score(labels, best))
    every = list(range(classes))
    np.testing.assert_array_equal(
        found.confusion, metrics.confusion_matrix(labels, best, labels=every)
    )
    assert found.confusion.dtype == np.int64
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, best, labels=every, zero_division=np.nan
    )
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.f1, f1)
    np.testing.assert_array_equal(found.truths, support)
    macro = metrics.precision_recall_fscore_support(
        labels, best, labels=every, average="macro", zero_division=np.nan
    )
    figures = found.figures()
    names = ("macro_precision", "macro_recall", "macro_f1")
    assert [figures[name] for name in names] == pytest.approx(macro[:3])


def test_top5_is_scikit_learns_and_needs_six_classes():
    answers = _answers(30)
    ranks = np.zeros((500, 30))
    for place in range(5):
        ranks[np.arange(500), answers["top"][:, place]] = 5 - place
    expected = metrics.top_k_accuracy_score(answers["labels"], ranks, k=5, labels=range(30))
    assert evaluate_counts(**answers, weights=None, classes=_names(30)).top5 == expected
    five = evaluate_counts(**_answers(5), weights=None, classes=_names(5))
    assert five.top5 is None and "top5" not in five.figures()


@pytest.mark.parametrize("positive, index", [(None, 1), ("Abnormal", 0), (0, 0), ("Normal", 1)])
def test_two_classes_have_a_positive_one(positive, index):
    answers = _answers(2)
    found = evaluate_counts(
        **answers, weights=None, classes=["Abnormal", "Normal"], positive=positive
    )
    labels, best = answers["labels"] == index, answers["top"][:, 0] == index
    figures = found.figures()
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(labels, best))
    assert figures["f1"] == pytest.approx(metrics.f1_score(labels, best))
    assert figures["precision"] == pytest.approx(metrics.precision_score(labels, best))
    assert figures["recall"] == pytest.approx(metrics.recall_score(labels, best))
    assert ["Abnormal", "Normal"][index] in found.summary_table()


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_batches_add_up_and_padding_does_not_count(batch):
    answers = _answers(8)
    whole = evaluate_counts(**answers, weights=None, classes=_names(8))
    counter = EvaluationCounter(_names(8))
    for start in range(0, 500, batch):
        part = {name: array[start : start + batch] for name, array in answers.items()}
        size = len(part["labels"])
        padded = {
            name: np.concatenate([array, np.zeros((3, *array.shape[1:]), array.dtype)])
            for name, array in part.items()
        }
        counter.update(**padded, weights=[1] * size + [0] * 3)
    found = counter.result()
    assert found.figures() == pytest.approx(whole.figures())
    np.testing.assert_array_equal(found.confusion, whole.confusion)
    # What was given out does not change when more is counted.
    counter.update(**answers)
    assert found.confusion.sum() == found.count == 500 and counter.result().count == 1000


def test_ids_of_padding_are_not_looked_at():
    counter = EvaluationCounter(["a", "b"])
    counter.update(labels=[0, -1], top=[[0], [9]], losses=[0.5, np.nan], weights=[1, 0])
    assert counter.result().figures()["loss"] == 0.5


def test_what_is_divided_by_nothing_is_nan():
    # No sample of c, which is answered once; b is never answered.
    found = evaluate_counts([0, 0, 1], [[0], [2], [0]], [1, 1, 1], None, ["a", "b", "c"])
    np.testing.assert_array_equal(found.recall, [0.5, 0.0, np.nan])
    np.testing.assert_array_equal(found.precision, [0.5, np.nan, 0.0])
    np.testing.assert_array_equal(found.f1, [0.5, 0.0, 0.0])
    assert found.figures()["macro_recall"] == 0.25
    empty = EvaluationCounter(["a", "b"]).result()
    assert empty.count == 0
    assert all(np.isnan(value) for name, value in empty.figures().items() if name != "count")
    assert json.loads(json.dumps(empty.to_dict(), allow_nan=False))["top1"] is None
    assert "nan" not in empty.summary_table() + empty.per_class_table()


def test_an_infinite_loss_is_written_as_json(tmp_path):
    counter = EvaluationCounter(["a", "b"])
    counter.update([0, 1], [[0], [0]], [np.inf, 0.5])
    assert counter.result().to_dict()["loss"] is None
    counter.result().save(tmp_path)
    assert "Infinity" not in (tmp_path / "evaluation.json").read_text()


def test_top1_is_known_while_counting():
    counter = EvaluationCounter(["a", "b"])
    assert np.isnan(counter.top1)
    counter.update([0, 1, 1], [[0], [0], [1]], [1, 1, 1])
    assert counter.top1 == counter.result().top1 == 2 / 3


def test_tables_are_sorted_and_whole_unless_asked():
    # Recalls: pear 0, fig 1, apple 1/2, and nothing of kiwi.
    found = evaluate_counts(
        [0, 1, 2, 2], [[1], [1], [2], [0]], [1] * 4, None, ["pear", "fig", "apple", "kiwi"]
    )
    lines = found.per_class_table().splitlines()
    assert [line.split()[0] for line in lines] == ["class", "pear", "apple", "fig", "kiwi"]
    assert len({len(line) for line in lines}) == 1
    assert lines[4].split() == ["kiwi", "0", "-", "-", "-"]
    first = found.per_class_table(limit=2).splitlines()
    assert first == [*lines[:3], "... and 2 more classes"]
    assert "top1             0.5000" in found.summary_table().splitlines()
    with pytest.raises(ValueError, match="limit=0"):
        found.per_class_table(limit=0)


def test_figures_are_aligned_and_written_for_readers(tmp_path):
    path = tmp_path / "best.weights.h5"
    rows = {"parameters": 24_000_000, "top-1": 0.812345, "saved": path, "resumed": False}
    assert format_figures({**rows, "f1": None, "recall": float("nan")}).splitlines() == [
        "parameters  24,000,000",
        "top-1       0.8123",
        f"saved       {path}",
        "resumed     False",
        "f1          -",
        "recall      -",
    ]
    assert format_figures({}) == ""


def test_saves_files_that_others_read(tmp_path):
    answers = _answers(7, count=60)
    names = [*_names(5), 'a "quoted", name', "größer"]
    found = evaluate_counts(**answers, weights=None, classes=names)
    found.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "confusion.csv",
        "confusion.png",
        "evaluation.json",
        "per_class.csv",
    ]
    assert json.loads((folder / "evaluation.json").read_text()) == found.to_dict()
    with (folder / "confusion.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["truth", *names] and [row[0] for row in rows] == names
    np.testing.assert_array_equal([list(map(int, row[1:])) for row in rows], found.confusion)
    with (folder / "per_class.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == names
    assert [float(row["recall"]) for row in table] == pytest.approx(list(found.recall))


def test_very_many_classes_have_no_matrix(tmp_path):
    number = 21843
    answers = _answers(number, count=20)
    found = evaluate_counts(**answers, weights=None, classes=_names(number))
    assert found.confusion is None and found.top5 >= found.top1 > -1
    assert np.isnan(found.recall).sum() == number - len(set(answers["labels"].tolist()))
    found.save(tmp_path)
    assert not list(tmp_path.glob("confusion*")) and (tmp_path / "per_class.csv").exists()
    assert CONFUSION_CLASSES < number


_GOOD = {"labels": [0, 1], "top": [[0], [1]], "losses": [0.1, 0.2]}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"labels": [0]}, r"Received: \(1,\), \(2,\), \(1,\) and \(2, 1\)"),
        ({"top": [0, 1]}, r"Received: .* and \(2,\)"),
        ({"losses": [[0.1], [0.2]]}, "Expected labels"),
        ({"labels": [0, 3]}, "Received a label from 0 to 3"),
        ({"labels": [-1, 0]}, "Received a label from -1"),
        ({"top": [[0], [7]]}, "Received an answer from 0 to 7"),
        ({"weights": [0.5, 1]}, "must be 0 or 1"),
    ],
)
def test_wrong_batches_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EvaluationCounter(["a", "b", "c"]).update(**{**_GOOD, **wrong})


def test_five_answers_are_wanted_of_six_classes():
    with pytest.raises(ValueError, match="the 5 or more best answers"):
        EvaluationCounter(_names(6)).update(**_GOOD)


@pytest.mark.parametrize(
    "classes, positive, message",
    [
        (["one"], None, "at least two classes"),
        (["a", "b", "c"], "a", "Only one of two classes"),
        (["a", "b"], "c", "one of 'a', 'b', or 0 or 1. Received: positive='c'"),
        (["a", "b"], 2, "Received: positive=2"),
    ],
)
def test_wrong_classes_are_refused(classes, positive, message):
    with pytest.raises(ValueError, match=message):
        EvaluationCounter(classes, positive)


def test_the_positive_class_by_its_number_on_the_command_line():
    """The error names "0 or 1", which there is text."""
    for positive, expected in (("0", 0), ("1", 1), ("dog", 1), (0, 0)):
        assert EvaluationCounter(["cat", "dog"], positive).result().positive == expected
    assert EvaluationCounter(["1", "0"], "1").result().positive == 0  # a name goes first
