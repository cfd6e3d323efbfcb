"""Stands where the other site's image would be."""

import numpy as np

from dipy_ppir.align.memory import check_voxels
from dipy_ppir.mpc.errors import ProtocolError

#: What to write where the image of another party would be.
WORD = "remote"
#: Images to the number of the party that owns them.
OWNERS = {"moving": 0, "static": 1}


class RemoteImage:
    """An image that another party holds: its grid is public, its voxels are not.

    Parameters
    ----------
    shape : sequence of int
        shape of the image, (S, R, C) or (R, C).
    grid2world : array, shape (dim + 1, dim + 1), optional
        the voxel-to-space transformation of the image, mm. Identity by default.

    Raises
    ------
    ValueError
        if shape and matrix do not belong together.

    Examples
    --------
    >>> from dipy_ppir.align import RemoteImage
    >>> RemoteImage((91, 109, 91)).dim
    3
    """

    def __init__(self, shape, grid2world=None):
        self.shape = tuple(int(n) for n in shape)
        self.dim = self.ndim = len(self.shape)
        if self.dim not in (2, 3) or min(self.shape) < 1:
            raise ValueError(
                f"a remote image has two or three positive dimensions, got {shape}"
            )
        if grid2world is None:
            grid2world = np.eye(self.dim + 1)
        self.grid2world = np.array(grid2world, dtype=np.float64)
        if self.grid2world.shape != (self.dim + 1, self.dim + 1):
            raise ValueError(
                f"grid2world of a {self.dim}D image has shape "
                f"({self.dim + 1}, {self.dim + 1}), got {self.grid2world.shape}"
            )

    def __repr__(self):
        return f"RemoteImage(shape={self.shape})"

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "this image belongs to another party: its voxels are not available here"
        )


def is_word(image):
    """Whether an argument is the word that stands for another party's image."""
    return isinstance(image, str) and image == WORD


def exchange_grids(session, images):
    """Tell the other parties this party's grid, and learn those of the others.

    Shapes and positions are public metadata. Rounds: 1. The session's ``on_shapes`` is
    called with both shapes and the static image's matrix.

    Parameters
    ----------
    session : Session
    images : dict
        maps "static" and "moving" to pairs of image and grid2world; the image that
        is elsewhere is a `RemoteImage` or the word "remote".

    Returns
    -------
    images : dict
        the same, with a `RemoteImage` for the word.

    Raises
    ------
    ValueError
        if an image is not where the session has it, or larger than was agreed.
    ProtocolError
        if a party describes an impossible image.
    """
    mine = {}
    for name, owner in OWNERS.items():
        image, grid2world = images[name]
        elsewhere = is_word(image) or is_remote(image)
        if elsewhere == (session.pid == owner):
            raise ValueError(
                f"this party is the {session.role}, so the {name} image must be "
                + ("an image" if elsewhere else f'the word "{WORD}"')
            )
        if not elsewhere:
            if np.ndim(image) not in (2, 3):
                raise ValueError(
                    f"the {name} image has {np.ndim(image)} dimensions; give one "
                    "volume with 2 or 3"
                )
            check_voxels(session.limits, np.shape(image), name)
            mine[name] = {
                "shape": list(np.shape(image)),
                "grid2world": np.asarray(grid2world).tolist(),
            }
    with session.phase("agreement"):
        views = session.exchange("images", mine)
    found = dict(images)
    for name, owner in OWNERS.items():
        if is_word(images[name][0]):
            most = session.limits["voxels"]
            image = _described(views[owner], name, owner, session.name_of(owner), most)
            found[name] = image, image.grid2world
    if session.on_shapes is not None:
        static, grid2world = found["static"]
        moving, _ = found["moving"]
        session.on_shapes(static.shape, moving.shape, grid2world)
    return found


def _described(view, name, owner, title, most):
    """The image that a peer describes; a peer may send anything."""
    try:
        view = view[name]
        shape, matrix = view["shape"], np.array(view["grid2world"], dtype=np.float64)
        if not all(type(n) is int and n > 0 for n in shape):
            raise ValueError
        if np.prod([float(n) for n in shape]) > most:
            raise ValueError
        image = RemoteImage(shape, matrix)
        volume = abs(np.linalg.det(matrix[:-1, :-1]))
        if not np.isfinite(matrix).all() or not volume > 1e-12:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ProtocolError(
            f"{title} does not describe its image as it should: "
            f"it must have 2 or 3 dimensions, at most {most:,} voxels and an "
            "invertible affine",
            owner,
        ) from None
    return image


def check_roles(pid, static, moving):
    """Raise ValueError unless each image is at its owner and nowhere else.

    Parameters
    ----------
    pid : int
        this party's number: 0 owns the moving image, 1 the static one.
    static, moving : array or RemoteImage
    """
    for name, image, owner in (("moving", moving, 0), ("static", static, 1)):
        if is_remote(image) == (pid == owner):
            wanted = "needs" if pid == owner else "must not have"
            instead = "" if pid == owner else "; pass a RemoteImage in its place"
            raise ValueError(f"party {pid} {wanted} the {name} image{instead}")


def is_remote(image):
    """Whether `image` is held by another party."""
    return isinstance(image, RemoteImage)


def grid2world_of(image, given):
    """Voxel-to-space transformation of an image: its own, `given`, or the identity."""
    if is_remote(image):
        return image.grid2world
    if given is None:
        return np.eye(len(image.shape) + 1)
    return np.asarray(given, dtype=np.float64)


def split(arguments):
    """The arguments of a two-image call as each of the three parties has them.

    Parameters
    ----------
    arguments : dict
        with ``static``, ``moving``, their ``_grid2world`` and ``_mask``.

    Returns
    -------
    moving, static, helper : dict
        at the moving owner the missing image is a `RemoteImage`; the other two
        cross a pipe and describe it by its shape.
    """
    grids = {
        name + "_grid2world": grid2world_of(
            arguments[name], arguments[name + "_grid2world"]
        )
        for name in ("static", "moving")
    }
    shapes = {
        name + "_shape": list(arguments[name].shape) for name in ("static", "moving")
    }
    here = {
        **arguments,
        **grids,
        "static": RemoteImage(shapes["static_shape"], grids["static_grid2world"]),
        "static_mask": None,
    }
    there = {
        **shapes,
        **grids,
        "static": np.asarray(arguments["static"]),
        "static_mask": arguments["static_mask"],
    }
    return here, there, {**shapes, **grids}


def unite(static_shape, moving_shape, **arguments):
    """Inverse of `split` at the static owner and the helper."""
    for name, shape in (("static", static_shape), ("moving", moving_shape)):
        arguments.setdefault(name + "_mask", None)
        if arguments.get(name) is None:
            grid2world = arguments[name + "_grid2world"]
            arguments[name] = RemoteImage(shape, grid2world)
    return arguments
