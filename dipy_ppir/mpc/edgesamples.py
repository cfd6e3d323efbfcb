"""Samples that one owner chooses, told to the other and to nobody else."""

import os

import numpy as np

from dipy_ppir.mpc.arrays import OwnedArray
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import MOVING, STATIC, declare

declare(
    "edge_samples",
    receivers=(STATIC,),
    shape="1 for each sample, each iteration",
    meaning='with sampling = "GMS", which voxels are samples: most of them where the '
    "moving image has edges",
    bits=32,
)


def secret_draws(n):
    """Uniform numbers between 0 and 1 that nobody else can work out.

    Parameters
    ----------
    n : int

    Returns
    -------
    draws : array, shape (n,)
    """
    return (np.frombuffer(os.urandom(4 * n), dtype=np.uint32) + 0.5) / 2.0**32


def show_samples(session, index, count, voxels):
    """Tell the static owner which voxels are samples.

    Rounds: 1. Bytes: 4 for each, from the moving owner. The helper learns how many.

    Parameters
    ----------
    session : Session
    index : array of int, shape (count,), at the moving owner only
    count, voxels : int
        of how many.

    Returns
    -------
    index : array of int64, shape (count,), or None
        at the static owner.

    Raises
    ------
    ProtocolError
        if there is no such voxel, or one is there twice.
    """
    own = OwnedArray(MOVING, index, (count,), np.uint32)
    index = session.open(own, "edge_samples", (STATIC,))
    if index is None:
        return None
    index = index.astype(np.int64)
    if index.max(initial=0) >= voxels or len(np.unique(index)) < count:
        raise ProtocolError(
            "the moving owner samples voxels that there are not, or twice", MOVING
        )
    return index
