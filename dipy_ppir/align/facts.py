"""What the receipt of a registration says of images, of their files, and of the result.

Shapes and voxel sizes are public. All else here is for the receipt of the party that
has it, and is not sent to anybody.
"""

import os
from pathlib import Path

from nibabel.affines import voxel_sizes
import numpy as np

from dipy_ppir.align.decomposition import about_center
from dipy_ppir.align.quality import map_quality
from dipy_ppir.align.remote import grid2world_of, is_word
from dipy_ppir.mpc.record import array_hash, file_hash


def grid_facts(images):
    """Facts about both images' grids, which are public.

    Parameters
    ----------
    images : dict
        with ``static``, ``moving`` and their ``_grid2world``, mm.

    Returns
    -------
    facts : dict
        for the receipt: ``images`` and both ``_grid2world``.
    """
    facts = {"images": {}}
    for name in ("static", "moving"):
        image = images[name]
        matrix = grid2world_of(image, images[name + "_grid2world"])
        facts["images"][name] = {
            "shape": [int(n) for n in image.shape],
            "voxel_size": voxel_sizes(matrix).tolist(),
        }
        facts[name + "_grid2world"] = matrix.tolist()
    return facts


def own_arrays(session, **arrays):
    """Hashes of this party's own arrays; names to hashes, see `array_hash`.

    Parameters
    ----------
    session : Session
    **arrays : array, or anything else for what is not here
    """
    here = {n: a for n, a in arrays.items() if isinstance(a, np.ndarray)}
    run = session.ledger.run.number
    return {"arrays": {n: array_hash(run, array) for n, array in here.items()}}


def transform_facts(affine, static):
    """An affine transform in words that people judge.

    Parameters
    ----------
    affine : array, shape (dim + 1, dim + 1)
    static : dict
        of the static image: ``shape`` and ``grid2world``.

    Returns
    -------
    facts : dict
    """
    found = about_center(affine, static["shape"], static["grid2world"])
    return {
        "shift": found.shift.tolist(),
        "turn": found.angle,
        "axis": None if found.axis is None else found.axis.tolist(),
        "scales": found.scales.tolist(),
        "mirrored": found.mirrored,
    }


def map_facts(mapping):
    """How far a diffeomorphic map moves points, and how regular it is.

    Parameters
    ----------
    mapping : DiffeomorphicMap

    Returns
    -------
    facts : dict
        ``displacement`` in mm over the static image's grid, without that of the affine
        transform from which the map starts; ``quality``, see `map_quality`.
    """
    field = np.asarray(mapping.get_forward_field())
    lengths = np.sqrt(np.einsum("...i,...i->...", field, field))
    displacement = {
        "mean": float(lengths.mean(dtype=np.float64)),
        "percentile_95": float(np.percentile(lengths, 95)),
        "largest": float(lengths.max()),
    }
    return {"displacement": displacement, "quality": map_quality(mapping)}


class OwnFiles:
    """This party's own files, whose hashes its receipt keeps.

    Parameters
    ----------
    files : dict
        maps what they hold to their names; what is no name of a file is left out.
    """

    def __init__(self, files):
        self._files = {
            name: (Path(file), _state(file))
            for name, file in files.items()
            if isinstance(file, (str, Path)) and str(file) and not is_word(file)
        }

    def enter(self, receipt):
        """Add the hashes to a receipt, see `file_hash`."""
        hashes = receipt.setdefault("files", {})
        for name, (file, state) in self._files.items():
            if _state(file) == state and state is not None:
                hashes[name] = file_hash(receipt["run"], file)
            else:
                receipt["warnings"].append(
                    f"The file of the {name} was changed while the registration ran, "
                    "so that its hash is not kept: do not overwrite what is in use."
                )


def _state(file):
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
