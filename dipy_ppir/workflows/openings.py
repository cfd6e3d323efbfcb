"""How much has been opened about an image in all sessions: its owner's own count.

A registration opens some 1,500 bits about the static image. Whoever registers to the
same image again and again, each time with other questions, learns as much again each
time; no session knows of the others. So the owner's command keeps count in a file
beside its key, by a digest of the image's voxels, and refuses where a limit would be
passed. Sessions at the same time count one after the other, behind a lock.
"""

import math
from pathlib import Path

from dipy_ppir.align.checkpoint import digest
from dipy_ppir.workflows.counts import CountFile
from dipy_ppir.workflows.inputs import InputError

FILE = "opened.json"
#: About a dozen registrations; an image of 2 mm has some million voxels.
LIMIT = 20_000
#: About a dozen registrations of points, of which there are fewer.
POINT_LIMIT = 2_000


class Openings:
    """The count about one image.

    Parameters
    ----------
    folder : str or Path
        of the owner's key.
    image : array
    limit : float, optional
        most bits in all sessions together; 0 for no limit.
    what : str, optional
        what the array is called in messages.

    Raises
    ------
    InputError
        if the limit is no number from 0 on.
    """

    def __init__(self, folder, image, limit=LIMIT, what="this image"):
        if not 0 <= limit < math.inf:
            raise InputError(
                f"--limit_bits {limit} must be a number of bits, or 0 for no limit"
            )
        self._counts = CountFile(
            Path(folder) / FILE, {}, _is_count, "what was opened about your images"
        )
        self.key = digest(image)
        self.limit, self.what = limit, what

    @property
    def bits(self):
        """Bits opened so far."""
        return self._counts.read().get(self.key, 0)

    def check(self, planned):
        """Refuse a session that may open so many bits.

        Raises
        ------
        InputError
            if the limit would be passed.
        """
        before = self.bits
        if self.limit and before + planned > self.limit:
            raise InputError(
                f"{before:,.0f} bits were opened about {self.what}, or may have been, "
                f"in earlier sessions, and this one may open {planned:,.0f} more: over "
                f"the limit of {self.limit:,.0f}. Ask yourself why so many "
                "registrations are wanted, then raise the limit with --limit_bits"
            )

    def begin(self, planned):
        """Count what a session will open, when the parties have met.

        Raises
        ------
        InputError
            if the limit would be passed, because of other sessions at the same time.
        """
        with self._counts.alone():
            self.check(planned)
            self._add(planned)

    def end(self, planned, receipt, role):
        """Replace what was planned, at each of its attempts, by what was opened."""
        attempts, opened = 1 + receipt["resumed"], receipt["bits"][role]
        with self._counts.alone():
            self._add(opened - attempts * planned, least=opened)

    def _add(self, bits, least=0.0):
        counts = self._counts.read()
        counts[self.key] = round(max(counts.get(self.key, 0) + bits, least), 1)
        self._counts.write(counts)


def _is_count(counts):
    return all(isinstance(n, (int, float)) for n in counts.values())
