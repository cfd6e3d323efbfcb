"""Frames: what a message between two parties looks like on the wire.

A frame is a 24-byte header and a payload::

    magic "PP" | version | kind | operation (4) | sequence (8) | length (8)

`kind` says what the payload is; nothing a peer sends is ever unpickled or
evaluated. `operation` is a checksum of the name of the protocol step, so that
parties that have fallen out of step notice at the first frame. `sequence`
counts the frames of one direction. `length` is the payload's, which is capped.
"""

import json
import math
import struct
import zlib

from dipy_ppir.mpc.ledger import MOST_PARTIES

HEADER = struct.Struct("<2sBBIQQ")
MAGIC, VERSION = b"PP", 1
DATA, JSON, MPYC, ABORT, BYE, WAITING = 1, 2, 3, 4, 5, 6

#: Largest payload of one frame, by kind; larger arrays travel in several.
MAX_PAYLOAD = {
    DATA: 1 << 24,
    JSON: 1 << 20,
    MPYC: 1 << 24,
    ABORT: 1 << 10,
    BYE: 0,
    WAITING: MOST_PARTIES // 8,
}
#: Metadata with deeper nesting is refused: code that walks it calls itself.
MAX_NESTING = 16

# Reasons of an `ABORT`. They cross the network as numbers, and never with text made
# from data. `REPLACED` ends a meeting: another program with the same key came.
ERROR, LOST, INTERRUPTED, ENDED, VIOLATION, REPLACED, MISMATCH = 1, 2, 3, 4, 5, 6, 7
REASONS = {
    ERROR: "it stopped because of an error on its side",
    LOST: "it lost another party",
    INTERRUPTED: "it was interrupted",
    ENDED: "another party ended it",
    VIOLATION: "another party did not follow the protocol",
    MISMATCH: "what the parties compute differs",
}


def operation_code(name):
    """Checksum of the name of a protocol step."""
    return zlib.crc32(name.encode())


def parse_metadata(raw):
    """Public metadata from JSON; ValueError for what no party of ours sends."""
    parsed = json.loads(raw)
    level = [parsed]
    for _ in range(MAX_NESTING):
        below = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError
        if not below:
            return parsed
        level = below
    raise ValueError


class Frame:
    """A frame being received, or received and not yet asked for."""

    __slots__ = ("kind", "op", "body", "filled", "posted")

    def __init__(self, kind, op, body, posted):
        self.kind, self.op, self.body, self.posted = kind, op, body, posted
        self.filled = 0

    @property
    def complete(self):
        return self.filled == len(self.body)
