"""Room that is allocated once for each name."""

from pins import together
import pytest

from dipy_ppir.mpc.fields import P61, R32, R64, R128
from dipy_ppir.mpc.scratch import Scratch, scratch


@pytest.mark.parametrize("field", [P61, R32, R64, R128], ids=repr)
def test_it_is_what_the_field_stores(field):
    room, made = Scratch()("a", (3, 2), field), field.empty((3, 2))
    assert (room.shape, room.dtype) == (made.shape, made.dtype)
    assert room.flags.c_contiguous
    assert room.flags.aligned


def test_a_name_has_its_room_once():
    room = Scratch()
    large, other = room("a", (5,)), room("b", (5,))
    large[...], other[...] = 1, 2
    assert (large == 1).all(), "another name took its place"
    again = room("a", (2, 2), R64)
    again[...] = 3
    assert (large[:2] == 3).all(), "it was allocated anew"
    assert room("a", (6,)).shape == (6, 2)
    assert room("none", (0,)).size == 0


def test_each_thread_has_its_own():
    mine = scratch("test", (4,))
    mine[...] = 1

    def elsewhere():
        theirs = scratch("test", (4,))
        theirs[...] = 2
        return theirs

    (theirs,) = together(elsewhere)
    assert (theirs == 2).all()
    assert (mine == 1).all()
    assert (scratch("test", (4,)) == 1).all()
