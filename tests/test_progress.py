"""What is said of time."""

import pytest

from dipy_ppir.align.estimate import Estimate, Line
from dipy_ppir.workflows.progress import duration_text, estimate_text


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
