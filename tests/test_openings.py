"""What was opened about an image in all sessions, as its owner counts it."""

from concurrent.futures import ThreadPoolExecutor
import json
import stat

import numpy as np
import pytest

from dipy_ppir.align._public import planned_bits
from dipy_ppir.align.parameters import AFFINE, AffineParameters
from dipy_ppir.align.quasinewton import opened_bits
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.openings import FILE, Openings

IMAGE = np.arange(24.0).reshape(2, 3, 4)


def receipt(bits, resumed=0):
    return {"bits": {"moving owner": bits}, "resumed": resumed}


def session(count, bits=None, resumed=0):
    """One that comes to its end with so many bits, or breaks off."""
    count.check(1600)
    count.begin(1600)
    if bits is not None:
        count.end(1600, receipt(bits, resumed), "moving owner")


def test_sessions_add_up(tmp_path):
    count = Openings(tmp_path, IMAGE, 5000)
    assert count.bits == 0
    session(count, 1500.5)
    assert Openings(tmp_path, IMAGE.copy()).bits == 1500.5
    session(count, 1500)
    assert count.bits == 3000.5
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_session_that_breaks_off_counts_as_a_whole_one_until_it_has_ended(tmp_path):
    count = Openings(tmp_path, IMAGE)
    session(count)
    session(count)
    assert count.bits == 3200
    session(count, 1900, resumed=2)
    assert count.bits == 1900


def test_a_count_is_never_less_than_what_was_opened(tmp_path):
    """Where the file was moved away between an interruption and the end, say."""
    count = Openings(tmp_path, IMAGE)
    session(count)
    (tmp_path / FILE).unlink()
    session(count, 1900, resumed=1)
    assert count.bits == 1900


def test_resuming_what_never_began_is_a_session_of_its_own(tmp_path):
    count = Openings(tmp_path, IMAGE)
    session(count, 1500)
    session(count, 1500, resumed=0)
    assert count.bits == 3000


def test_the_limit(tmp_path):
    count = Openings(tmp_path, IMAGE, 3000)
    session(count, 1600)
    with pytest.raises(InputError, match="1,600 bits were opened.* 1,600 more"):
        count.check(1600)
    assert count.bits == 1600
    session(Openings(tmp_path, IMAGE, 0))
    session(Openings(tmp_path, IMAGE + 1, 3000))
    assert len(json.loads((tmp_path / FILE).read_text())) == 2


def test_sessions_at_the_same_time(tmp_path):
    """None is forgotten, and they do not pass the limit together."""
    counts = [Openings(tmp_path, IMAGE, 0) for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda count: count.begin(1000), counts))
        assert counts[0].bits == 24_000
        list(pool.map(lambda c: c.end(1000, receipt(10), "moving owner"), counts))
    assert counts[0].bits == 240
    for count in (limited := [Openings(tmp_path, IMAGE, 1240) for _ in range(2)]):
        count.check(1000)
    limited[0].begin(1000)
    with pytest.raises(InputError, match="1,240 bits were opened"):
        limited[1].begin(1000)


@pytest.mark.parametrize("limit", [-5, float("nan"), float("inf")])
def test_limits_that_are_none(tmp_path, limit):
    with pytest.raises(InputError, match="must be a number of bits"):
        Openings(tmp_path, IMAGE, limit)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "b"}'])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match="mend it, or move it away"):
        Openings(tmp_path, IMAGE).check(10)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        Openings(tmp_path / "none", IMAGE).begin(10)


def test_what_a_session_will_open():
    """By the plan, before anybody is met."""
    steps = 3 * opened_bits(3) + 17 * opened_bits(6) + 18 * opened_bits(12)
    assert planned_bits(AFFINE, 3) == pytest.approx(steps + 3 * 52 + 1)
    two = {"level_iters": [5, 4], "sigmas": [1, 0], "factors": [2, 1]}
    rigid = AffineParameters(pipeline=["rigid"], **two)
    assert planned_bits(rigid, 2) == pytest.approx(7 * opened_bits(3) + 1)
    # What is asked for besides: the value at the end, and where to start.
    more = {"starting_affine": "mass", "ret_metric": True}
    rigid = AffineParameters(pipeline=["rigid"], **two, **more)
    assert planned_bits(rigid, 2) == pytest.approx(7 * opened_bits(3) + 3 * 52 + 14 + 1)
    alone = AffineParameters(pipeline=["center_of_mass"])
    assert planned_bits(alone, 3) == 3 * 52
