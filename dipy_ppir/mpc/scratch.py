"""Room for packed elements that is allocated once: fresh pages cost more than sums."""

import math
import threading

import numpy as np

from dipy_ppir.mpc.fields import R128


class Scratch:
    """Arrays by name: ``scratch(name, shape, ring)``.

    What such an array contains does not outlive the next call with the same name.
    """

    def __init__(self):
        self._kept = {}

    def __call__(self, name, shape, ring=R128):
        shape = ring.storage(shape)
        size = math.prod(shape) * np.dtype(ring.dtype).itemsize
        if name not in self._kept or self._kept[name].size < size:
            self._kept[name] = np.empty(size, dtype=np.uint8)
        return self._kept[name][:size].view(ring.dtype).reshape(shape)


class _OfThread(Scratch, threading.local):
    pass


#: Of the calling thread, for what has no object of its own to keep it.
scratch = _OfThread()
