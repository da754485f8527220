"""The line of progress, on a terminal and in a file."""

import io

import pytest

from keras_coatnet.training.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What a terminal shows: text after a carriage return overwrites the line."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _run(progress: Progress, clock: _Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        progress.update(step, f"epoch {step / 100:.2f}  loss {7 / step:.4f}  lr 1.00e-03")


def test_a_terminal_shows_one_line_as_wide_as_it_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    clock, terminal = _Clock(), _Terminal()
    progress = Progress(20_000, 64, terminal, clock=clock)
    _run(progress, clock, range(1, 101), 0.5)
    expected = "step 100/20,000  epoch 1.00  loss 0.0700  lr 1.00e-03  128 images/s  2:45:50 left"[
        :79
    ]
    assert terminal.screen() == [expected]
    progress.close()
    progress.close()
    assert terminal.screen() == [expected, ""]


def test_a_wide_terminal_shows_all_of_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    clock, terminal = _Clock(), _Terminal()
    _run(Progress(20_000, 64, terminal, clock=clock), clock, range(1, 101), 0.5)
    assert terminal.screen()[0].endswith("128 images/s  2:45:50 left")


def test_a_terminal_is_not_rewritten_at_every_step():
    clock, terminal = _Clock(), _Terminal()
    _run(Progress(1001, 1, terminal, clock=clock), clock, range(1, 1001), 0.001)
    assert 9 <= terminal.getvalue().count("\r") <= 11


def test_a_shorter_line_leaves_nothing_of_a_longer_one():
    clock, terminal = _Clock(), _Terminal()
    progress = Progress(9, 1, terminal, clock=clock)
    progress.update(1, f"loss {123456.0:.4f}")
    clock.now += 1
    progress.update(1, f"loss {1.0:.4f}")
    assert terminal.screen() == ["step 1/9  loss 1.0000"]


def test_a_message_stands_above_the_line():
    clock, terminal = _Clock(), _Terminal()
    progress = Progress(9, 1, terminal, clock=clock)
    progress.message("first")
    progress.update(1, f"loss {1.0:.4f}")
    progress.message("top-1 50%\nsaved")
    line = "step 1/9  loss 1.0000"
    assert terminal.screen() == ["first", "top-1 50%", "saved", line]


def test_elsewhere_a_line_every_ten_seconds_and_the_last():
    clock, file = _Clock(), io.StringIO()
    progress = Progress(95, 8, file, clock=clock)
    _run(progress, clock, range(1, 96), 0.5)
    progress.close()
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/95", "21/95", "41/95", "61/95", "81/95"] + [
        "95/95"
    ]
    assert "images/s" not in lines[0]
    assert lines[1].endswith("16 images/s  00:37 left") and lines[-1].endswith("00:00 left")


def test_the_speed_is_that_of_the_last_half_minute():
    clock = _Clock()
    progress = Progress(10_000, 10, io.StringIO(), clock=clock)
    assert progress.images_per_second is None
    _run(progress, clock, range(501, 511), 20.0)
    assert progress.images_per_second == pytest.approx(0.5)
    _run(progress, clock, range(511, 611), 1.0)
    assert progress.images_per_second == pytest.approx(10.0)


def test_going_back_measures_anew():
    clock = _Clock()
    progress = Progress(10_000, 10, io.StringIO(), clock=clock)
    _run(progress, clock, range(501, 551), 1.0)
    progress.restart()
    _run(progress, clock, range(401, 402), 1.0)
    assert progress.images_per_second is None
    _run(progress, clock, range(402, 404), 2.0)
    assert progress.images_per_second == pytest.approx(5.0)


def test_a_pause_does_not_count():
    clock = _Clock()
    progress = Progress(10_000, 10, io.StringIO(), clock=clock)
    _run(progress, clock, range(1, 11), 1.0)
    with progress.paused():
        clock.now += 500
    _run(progress, clock, range(11, 21), 1.0)
    assert progress.images_per_second == pytest.approx(10.0)
