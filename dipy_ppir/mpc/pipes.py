"""Typed messages between this process and the ones it starts itself.

A message is a JSON object in which arrays are replaced by references, followed
by the arrays' bytes. It travels over the pipes of a child process, never over
the network between parties; all the same nothing is ever unpickled.
"""

import json
import struct

import numpy as np

_LENGTH = struct.Struct("<Q")
_KINDS = "biuf"


def write_message(stream, obj):
    """Write one message: dicts, lists, strings, numbers, None and arrays."""
    arrays = []

    def replace(value):
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value)
            if value.dtype.kind not in _KINDS:
                raise TypeError(f"cannot send an array of {value.dtype}")
            arrays.append(value)
            return {"__array__": [value.dtype.str, list(value.shape)]}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, dict):
            return {str(k): replace(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [replace(v) for v in value]
        return value

    text = json.dumps(replace(obj)).encode()
    stream.write(_LENGTH.pack(len(text)))
    stream.write(text)
    for array in arrays:
        if array.size:
            stream.write(memoryview(array).cast("B"))
    stream.flush()


def _read_exactly(stream, buffer):
    view = memoryview(buffer)
    while len(view):
        n = stream.readinto(view)
        if not n:
            raise EOFError("the other end of the pipe is gone")
        view = view[n:]
    return buffer


def read_message(stream):
    """Read one message; raises EOFError if the other end is gone."""
    head = _read_exactly(stream, bytearray(_LENGTH.size))
    text = _read_exactly(stream, bytearray(_LENGTH.unpack(head)[0]))

    def restore(value):
        if isinstance(value, dict):
            if set(value) == {"__array__"}:
                dtype, shape = value["__array__"]
                array = np.empty(shape, dtype=np.dtype(dtype))
                if array.size:
                    _read_exactly(stream, memoryview(array).cast("B"))
                return array
            return {k: restore(v) for k, v in value.items()}
        if isinstance(value, list):
            return [restore(v) for v in value]
        return value

    return restore(json.loads(bytes(text)))
