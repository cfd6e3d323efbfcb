"""What is said of time: ahead, and how much is left while a registration runs."""

import numpy as np
import pytest

from dipy_ppir.align.estimate import Estimate, Line, Stage
from dipy_ppir.workflows.progress import (
    LogProgress,
    Remaining,
    duration_text,
    estimate_text,
)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.01, "0.1 s"),
        (0.84, "0.8 s"),
        (7.4, "7 s"),
        (9.7, "10 s"),
        (23, "25 s"),
        (57, "55 s"),
        (58, "1 min"),
        (200, "3 min"),
        (3600, "60 min"),
        (9000, "2.5 h"),
    ],
)
def test_times_in_words(seconds, text):
    assert duration_text(seconds) == text


def test_in_words(monkeypatch):
    monkeypatch.setattr("dipy_ppir.align.estimate.speed", lambda: 1.0)
    found = Estimate((), 2.4e9, 500, 7.0, 0.8 * 2**30, False)
    assert estimate_text(found) == (
        "About 8 s, 2.4 GB of traffic in all, up to 0.8 GiB of memory at the largest "
        "party"
    )
    assert estimate_text(found._replace(at_most=True), Line(0.02, 1e9)) == (
        "At most about 30 s over lines of 20 ms and 1000 Mbit/s (7 s of it computing), "
        "2.4 GB of traffic in all, up to 0.8 GiB of memory at the largest party"
    )


# -- while it runs ---------------------------------------------------------------

PLAN = Estimate(
    (
        Stage("rigid", 2, 10, 0, 300, 1.0),
        Stage("rigid", 1, 10, 0, 300, 3.0),
        Stage("rigid", 0, 10, 0, 300, 12.0),
        Stage("result", 2, 0, 0, 30, 0.2),
    ),
    0,
    930,
    16.2,
    0,
    False,
)


def each(s):
    """Seconds of an iteration, or of what comes after all."""
    return s.work / max(s.iterations, 1)


def go(seconds_of, *, line=False, plan=PLAN, skip=()):
    """Seconds that were said to be left, and those that there were, as a run goes on.

    Parameters
    ----------
    seconds_of : callable
        of a stage: how long an iteration takes.
    skip : tuple of (level, iterations)
        levels that end early.
    """
    now, said, times = [100.0], [], []
    remaining = Remaining(plan, line=line, clock=lambda: now[0])
    for stage in plan.stages:
        for k in range(dict(skip).get(stage.level, stage.iterations)):
            now[0] += seconds_of(stage)
            info = {"step": stage.step, "level": stage.level, "iteration": k + 1}
            remaining.update(info)
            said.append(remaining.left)
            times.append(now[0])
    end = now[0] + seconds_of(plan.stages[-1])
    return said, [end - t for t in times]


@pytest.fixture
def usual_speed(monkeypatch):
    monkeypatch.setattr("dipy_ppir.workflows.progress.speed", lambda: 1.0)


@pytest.mark.parametrize("slower", [0.2, 1.0, 5.0])
def test_time_left_here(usual_speed, slower):
    """On one machine it is as many times longer as it has been."""
    said, left = go(lambda s: slower * each(s))
    told = [(s, t) for s, t in zip(said, left, strict=True) if s is not None]
    assert len(told) > {0.2: 4, 1.0: 15, 5.0: 24}[slower]
    for s, t in told:
        assert s == pytest.approx(t, rel=0.01, abs=0.1)


def test_time_left_over_a_line(usual_speed):
    """On a slow line each iteration waits as long, whatever there is to compute."""
    said, left = go(
        lambda s: each(s) + s.waits / max(s.iterations, 1) * 0.05, line=True
    )
    for s, t in zip(said[5:], left[5:], strict=True):
        assert s == pytest.approx(t, rel=0.3)
    assert max(np.diff(said[5:])) < 0.1 * said[5]


def test_time_left_of_slow_machines_over_a_line(usual_speed):
    """As soon as there are two kinds of iterations they are told apart."""
    wait = 0.01
    said, left = go(
        lambda s: 4 * each(s) + s.waits / max(s.iterations, 1) * wait, line=True
    )
    for s, t in zip(said[14:], left[14:], strict=True):
        assert s == pytest.approx(t, rel=0.25)
    assert min(s for s in said if s is not None) >= 0


def test_a_level_that_ends_early(usual_speed):
    said, left = go(lambda s: 10 * each(s), skip=((1, 4),))
    # What was not needed is not said to be left any more.
    assert said[8] > left[8] + 1
    assert said[-3] == pytest.approx(left[-3], rel=0.05)


def test_nothing_is_said_before_anything_is_known(usual_speed):
    said, _ = go(lambda s: 0.001)
    assert said == [None] * 30
    said, _ = go(lambda s: 1.0)
    assert said[:4] == [None] * 4 and None not in said[4:]


def test_steps_that_nobody_planned_change_nothing(usual_speed):
    now = [0.0]
    remaining = Remaining(PLAN, clock=lambda: now[0])
    for k in range(20):
        now[0] += 1
        remaining.update({"step": "affine", "level": 0, "iteration": k + 1})
    assert remaining.left is None and remaining.text == ""


def test_words_while_it_runs(usual_speed, caplog):
    now = [0.0]
    with (
        caplog.at_level("INFO", "dipy_ppir"),
        LogProgress(["rigid"], 3, clock=lambda: now[0], interval=3.0) as display,
    ):
        display.expect(PLAN._replace(at_most=True))
        for stage in PLAN.stages[:3]:
            for k in range(10):
                now[0] += stage.work / 10
                info = {"step": "rigid", "level": stage.level, "iteration": k + 1}
                display({**info, "bytes_sent": 10**6})
    lines = [r.getMessage() for r in caplog.records]
    assert "rigid, level 2 of 3: evaluation 7, 1.0 MB sent ..." not in lines
    assert any(line.endswith("1.0 MB sent, at most 7 s left ...") for line in lines)
    assert lines[1].startswith("rigid, level 2 of 3 done") and "s left" in lines[1]
    assert lines[-1] == "rigid, level 3 of 3 done: evaluation 10, 1.0 MB sent"
