"""The schedule of the learning rate, against a plain formula."""

import math

import pytest

from keras_coatnet.training.engine.schedule import WarmUpSchedule


def plain_rate(step, peak, minimum, total, warmup, shape):
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return minimum + (peak - minimum) * left[shape]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedule_is_a_plain_formula(shape, warmup):
    schedule = WarmUpSchedule(1e-3, 1e-5, 50, warmup, shape)
    again = WarmUpSchedule.from_config(schedule.get_config())
    for step in range(51):
        expected = plain_rate(step, 1e-3, 1e-5, 50, warmup, shape)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)
        assert float(again(step)) == float(schedule(step))
        assert schedule.value(step) == pytest.approx(expected, rel=1e-12)


def test_schedule_refuses_nonsense():
    with pytest.raises(ValueError, match="shape"):
        WarmUpSchedule(1e-3, 1e-5, 50, 0, "steps")
    with pytest.raises(ValueError, match="warmup_steps"):
        WarmUpSchedule(1e-3, 1e-5, 50, 51)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak": "a"}, "`peak` must be a number.*'a'"),
        ({"peak": -1e-3}, "`peak` must be a number at least 0"),
        ({"peak": float("nan")}, "`peak`"),
        ({"minimum": -1e-5}, "`minimum`"),
        ({"minimum": None}, "`minimum`"),
        ({"minimum": 1e-2}, "`minimum` must not be above `peak`.*minimum=0.01, peak=0.001"),
        ({"total_steps": 0}, "`total_steps` must be a whole number of at least 1"),
        ({"total_steps": 50.5}, "`total_steps`"),
        ({"warmup_steps": "a"}, "`warmup_steps`"),
        ({"warmup_steps": 2.5}, "`warmup_steps`"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"shape": ["cosine"]}, "`shape` must be one of 'cosine'"),
    ],
)
def test_schedule_refuses_values_of_another_kind(changes, message):
    with pytest.raises(ValueError, match=message):
        WarmUpSchedule(**{"peak": 1e-3, "minimum": 1e-5, "total_steps": 50, **changes})


def test_a_constant_schedule_does_not_use_its_minimum():
    assert WarmUpSchedule(1e-3, 1e-2, 50, shape="constant").value(9) == pytest.approx(1e-3)
