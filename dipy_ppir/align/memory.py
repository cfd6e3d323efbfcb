"""How much memory a registration takes at each party, roughly and ahead of time.

What others say of their images decides how much this party will need. The estimate
follows from public numbers, so that all parties come to the same one. It was fitted to
peaks of resident memory in runs of 64 x 64 x 64 to 192 x 160 x 192 voxels and 1000 x
1000 pixels, of which it is 1.0 to 1.4 times.
"""

from math import prod

from dipy_ppir.align.parameters import (
    AffineParameters,
    FreeFormParameters,
    PointParameters,
    SynParameters,
)
from dipy_ppir.align.plan import COARSE_BINS, EVERY_VOXEL
from dipy_ppir.mpc import worlds
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC

#: Of the program itself, bytes.
_PROGRAM = 200e6
#: Bytes for each voxel of an owner's image: as it was read, and as it is blurred.
_IMAGE = 64
#: For each sample of an affine registration at an owner, on shares and with the
#: evaluations of DIPY's optimizer, and at the helper.
_SAMPLE, _EVALUATED, _HELD = 64, 192, 96
#: For each sample and bin, at an owner and at the helper.
_BIN, _HELD_BIN = 4, 8
#: The same where two owners are alone, at the moving owner, who holds those of all
#: levels encrypted, and at the static one.
_ENCRYPTED_BIN, _CLEAR_BIN = 95, 16
#: For each cell of the joint histogram, anywhere.
_CELL = 3000
#: For each sample of a sum of squared differences at an owner and at the helper, and
#: for each voxel of the static image.
_SQUARED, _SHARED = (160, 24), 16
#: For each voxel of the static image with local cross-correlation, likewise.
_CORRELATED = 170, 90
#: For each voxel of the static image in SyN, at an owner and at the helper.
_VOXEL = {
    "update": (380, 280),
    "force": (320, 220),
    "paper": (380, 280),
}
#: The same with "map", by metric and dimension; a quarter less where the map is
#: computed on the usual grid in 3D.
_CARRIED = {
    ("CC", 2): (720, 480),
    ("CC", 3): (720, 480),
    ("SSD", 2): (560, 380),
    ("SSD", 3): (560, 380),
    ("MIND", 2): (1140, 740),
    ("MIND", 3): (800, 440),
}
#: The same of a free-form registration for each dimension, at the moving owner, the
#: static one and the helper: along each there are a gradient and a displacement.
_SPLINE = (75, 20, 30)
#: Of two owners alone, at the moving owner besides, who holds the static image
#: encrypted: for each of its voxels with squared differences, and with splines, of
#: which the last level's and that of the final comparison are there together.
_ENCRYPTED, _ENCRYPTED_TWICE = 64, 150
#: For each coordinate of points at an owner, the largest peak that was measured; and
#: where two owners are alone.
_COORDINATE, _COORDINATE_ALONE = 64, 210
#: How many times as much SyN takes at an owner where two are alone.
_SYN_ALONE = 1.25


def coordinate(alone):
    """Bytes for each coordinate of points, at an owner."""
    return _COORDINATE_ALONE if alone else _COORDINATE


def peaks(parameters, static_shape, moving_shape, alone=False):
    """Bytes of memory that each party needs at most, about.

    Parameters
    ----------
    parameters : AffineParameters, SynParameters, FreeFormParameters or PointParameters
    static_shape, moving_shape : sequence of int
        of images, or of arrays of points; None where it is not known yet.
    alone : bool, optional
        whether two owners are alone, without a helper.

    Returns
    -------
    peaks : dict
        by number of the party.
    """
    static, moving = (
        0.0 if shape is None else float(prod(shape))
        for shape in (static_shape, moving_shape)
    )
    if isinstance(parameters, PointParameters):
        points = {MOVING: moving, STATIC: static, HELPER: 0.0}
        return {pid: _PROGRAM + coordinate(alone) * n for pid, n in points.items()}
    common, samples, other = _PROGRAM, static, None
    if isinstance(parameters, AffineParameters):
        samples *= parameters.sampling_proportion or 1
    if isinstance(parameters, SynParameters):
        each, part = _VOXEL.get(parameters.reveal), 1.0
        if parameters.reveal == "map":
            each = _CARRIED[parameters.metric, parameters.dim]
            part = 0.75 if parameters.dim == 3 and parameters.map_spacing > 2 else 1.0
            part *= _SYN_ALONE if alone else 1.0
        owner, helper = (part * n * static for n in each)
    elif isinstance(parameters, FreeFormParameters):
        owner, other, helper = (parameters.dim * n * static for n in _SPLINE)
        owner += _ENCRYPTED_TWICE * static * alone
    elif parameters.metric == "SSD":
        owner, helper = (n * samples + _SHARED * static for n in _SQUARED)
        other = owner
        owner += _ENCRYPTED * static * alone
    elif parameters.metric == "CC":
        owner, helper = (n * static for n in _CORRELATED)
    else:
        common += _CELL * parameters.nbins**2
        sample = _SAMPLE if parameters.reveal == "transform" else _EVALUATED
        owner = (sample + _BIN * parameters.nbins) * samples
        helper = (_HELD + _HELD_BIN * parameters.nbins) * samples
        if alone:
            finest, coarse = _sampled_bins(parameters, static)
            # Of the finest level and two others; of one at a time.
            owner = _ENCRYPTED_BIN * (finest + 2 * coarse)
            other = _CLEAR_BIN * max(finest, coarse)
    return {
        MOVING: common + owner + _IMAGE * moving,
        STATIC: common + (owner if other is None else other) + _IMAGE * static,
        HELPER: common + helper,
    }


def _sampled_bins(parameters, voxels):
    """Samples times bins of the finest level, and of another at most, on shares."""
    part = parameters.sampling_proportion or 1
    finest = voxels if voxels <= EVERY_VOXEL else part * voxels
    # Every voxel of a level of so few.
    coarse = min(voxels, EVERY_VOXEL) * min(parameters.nbins, COARSE_BINS)
    return finest * parameters.nbins, coarse


def check_memory(limits, parameters, static_shape, moving_shape, alone=False):
    """Raise ValueError if a party would need more memory than was agreed.

    Parameters
    ----------
    limits : dict
        of the session file: "memory", GB.
    parameters, static_shape, moving_shape, alone
        see `peaks`.
    """
    found = peaks(parameters, static_shape, moving_shape, alone)
    pid = max(found, key=found.get)
    gigabytes = found[pid] / 1e9
    if gigabytes > limits["memory"]:
        affine = isinstance(parameters, AffineParameters)
        fewer = "a smaller sampling_proportion, " if affine else ""
        sizes = [_size(s) for s in (static_shape, moving_shape) if s is not None]
        raise ValueError(
            f"registering {' and '.join(sizes)} voxels needs about {gigabytes:.3g} GB "
            f"of memory at the {ROLES[pid]}, more than the {limits['memory']:g} GB "
            f"of [limits] in the session file; use {fewer}images of fewer "
            "voxels, or raise memory there at all parties"
        )


def check_session(session, parameters, static, moving):
    """Raise ValueError if a session's registration would need more than was agreed.

    Parameters
    ----------
    session : Session
        without a session file nothing was agreed.
    parameters
        see `peaks`.
    static, moving : array or RemoteImage
    """
    if session.plan is not None:
        shapes = static.shape, moving.shape
        check_memory(session.plan.limits, parameters, *shapes, worlds.alone(session))


def check_voxels(limits, shape, name):
    """Raise ValueError if an image is larger than was agreed."""
    if prod(shape) > limits["voxels"]:
        raise ValueError(
            f"the {name} image has {_size(shape)} voxels, more than the "
            f"{limits['voxels']:,} of [limits] in the session file; use a smaller one, "
            "or raise voxels there at all parties"
        )


def _size(shape):
    return " x ".join(map(str, shape))
