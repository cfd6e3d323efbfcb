"""Slices of images as a page of HTML shows them: pictures inside the page, and lines.

Pictures are ``data:`` addresses, in WebP where Pillow knows it; lines are paths of SVG
in mm, from the upper left corner of the picture that they lie over. What a function
is given is all that it draws, so that one who has a single image passes that.
"""

import base64
from io import BytesIO

import numpy as np
from scipy import ndimage

from dipy_ppir.workflows.figures import (
    GRID_LINES,
    JACOBIAN_TICKS,
    PLANES,
    center_of,
    displacements,
    grid_lines,
    limits,
    outline_level,
    scaled,
    slice_of,
    upright,
    upright_determinant,
    windowed,
)

#: Slices of each plane; fewer where they take more than so many bytes.
COUNTS, BUDGET = (9, 5, 1), 1_800_000
#: Larger slices are scaled down to so many pixels.
_MOST_PIXELS = 320
#: Parts of what an image shows that lie before the first and behind the last slice.
_MARGIN = 0.06
#: Points of a line of the grid.
_MOST_POINTS = 80


def viewer(images, grid2world, *, outlined=()):
    """Slices of several images on one grid.

    Parameters
    ----------
    images : dict
        maps names to arrays of shape (S, R, C); the first decides where to look.
        All but the first have the same scale of greys.
    grid2world : array, shape (4, 4)
    outlined : sequence of str
        images whose outlines are drawn over the first.

    Returns
    -------
    viewer : dict or None
        ``planes``, each with its ``name``, ``width`` and ``height`` in mm, the letters
        of its ends and its ``slices``: dicts with ``pictures`` and ``outlines`` by
        name; ``count``, the most slices of a plane. None where no plane has an area.
    """
    volumes, zooms = {}, None
    for name, image in images.items():
        volumes[name], zooms = upright(image, grid2world)
    first, *others = volumes
    greys = {first: limits(volumes[first])}
    # By the last, the result: before, half of it may lie outside.
    greys |= dict.fromkeys(others, limits(volumes[others[-1]]) if others else None)
    levels = {name: outline_level(volumes[name]) for name in outlined}
    weights = _weights(volumes[first])
    for count in COUNTS:
        planes = []
        for name, axis, across, along in _planes(volumes[first].shape):
            sizes = np.delete(np.multiply(volumes[first].shape, zooms), axis)
            slices = [
                {
                    "pictures": {
                        n: _grey(slice_of(volume, axis, at), greys[n])
                        for n, volume in volumes.items()
                    },
                    "outlines": {
                        n: _outline(slice_of(volumes[n], axis, at), level, sizes)
                        for n, level in levels.items()
                    },
                }
                for at in _positions(weights[axis], count)
            ]
            planes.append(_plane(name, sizes, across, along, slices=slices))
        if _size(planes) <= BUDGET:
            break
    if not planes:
        return None
    return {"planes": planes, "count": max(len(p["slices"]) for p in planes)}


def deformation(image, grid2world, transform):
    """What a transform does to a regular grid, and for a map to volumes.

    Parameters
    ----------
    image : array, shape (S, R, C)
        the static image, or the moving one on its grid.
    grid2world : array, shape (4, 4)
    transform : DiffeomorphicMap or array, shape (4, 4)
        see `figures.save_map`.

    Returns
    -------
    planes : list of dict
        as in `viewer`, each with a ``picture`` and the path ``grid``; of a map also
        ``jacobian``, a picture, and the path ``folds``.
    """
    displacement = displacements(transform, np.shape(image), grid2world)
    of_map = not isinstance(transform, np.ndarray)
    determinant = upright_determinant(transform) if of_map else None
    image, zooms = upright(image, grid2world)
    center = center_of(image)
    longest = max(np.multiply(image.shape, zooms))
    image, planes = windowed(image), []
    for name, axis, across, along in _planes(image.shape):
        sizes = np.delete(np.multiply(image.shape, zooms), axis)
        fixed = slice_of(image, axis, center[axis])
        plane = _plane(name, sizes, across, along, picture=_grey(fixed, (0, 1)))
        found = displacement(axis, center[axis])
        lines = grid_lines(*found, sizes, longest / GRID_LINES)
        plane["grid"] = "".join(
            _path(np.stack(line, axis=1)[:: 1 + len(line[0]) // _MOST_POINTS], sizes)
            for line in lines
        )
        if of_map:
            change = slice_of(determinant, axis, center[axis])
            plane["jacobian"] = data_uri(_tinted(fixed, change))
            plane["folds"] = _contour(change, 0.0, sizes)
        planes.append(plane)
    return planes


def jacobian_scale():
    """Colours of the Jacobian determinant from its lowest to its highest tick."""
    from matplotlib.colors import to_hex

    return [to_hex(color) for color in _colors(np.geomspace(*_ends(), 9))]


def data_uri(pixels):
    """A picture inside a page.

    Parameters
    ----------
    pixels : array of uint8, shape (rows, columns) or (rows, columns, 3)
        rows from above.
    """
    from PIL import Image, features

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    kind = "webp" if features.check("webp") else "png"
    stream = BytesIO()
    picture.save(stream, kind, quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _planes(shape):
    """Planes of an upright image that are more than a line."""
    return [p for p in PLANES if min(np.delete(shape, p[1])) > 1]


def _plane(name, sizes, across, along, **more):
    width, height = (round(float(size), 1) for size in sizes)
    ends = {"left": across[0], "right": across[1], "low": along[0], "high": along[1]}
    return {"name": name, "width": width, "height": height, **ends, **more}


def _weights(image):
    """How much each slice along each axis shows of an image."""
    window = windowed(image)
    weights = [
        window.sum(axis=tuple(i for i in range(3) if i != axis), dtype=np.float64)
        for axis in range(3)
    ]
    return [weight if weight.any() else weight + 1 for weight in weights]


def _positions(weight, count):
    """Indices of `count` slices through what an image shows."""
    parts = np.cumsum(weight) / weight.sum()
    wanted = np.linspace(_MARGIN, 1 - _MARGIN, count) if count > 1 else [0.5]
    return sorted({int(i) for i in np.searchsorted(parts, wanted)})


def _size(planes):
    """Bytes that pictures and lines take in the page."""
    return sum(
        len(text)
        for plane in planes
        for one in plane["slices"]
        for texts in one.values()
        for text in texts.values()
    )


def _grey(plane, low_high):
    return data_uri(_bytes(scaled(plane, low_high)))


def _bytes(plane):
    """Numbers from 0 to 1 as pixels, rows from above."""
    return np.rint(plane[::-1] * 255).astype(np.uint8)


def _tinted(grey, determinant):
    """A picture with the Jacobian determinant in colours over it."""
    colors = _colors(determinant)
    return _bytes(0.75 * colors + 0.25 * grey[..., None])


def _ends():
    return JACOBIAN_TICKS[0], JACOBIAN_TICKS[-1]


def _colors(determinant):
    from matplotlib import colormaps

    low, high = np.log(_ends())
    place = (np.log(np.maximum(determinant, 1e-3)) - low) / (high - low)
    return colormaps["RdBu_r"](np.clip(place, 0, 1))[..., :3]


def _outline(plane, level, sizes):
    if not plane.min() < level < plane.max():
        return ""
    return _contour(ndimage.gaussian_filter(plane, 0.7), level, sizes)


def _contour(plane, level, sizes):
    """The path where a plane has a level."""
    from contourpy import contour_generator

    rows, columns = plane.shape
    lines = contour_generator(z=plane).lines(level)
    voxel = np.array(sizes) / (columns, rows)
    return "".join(_path((line + 0.5) * voxel, sizes) for line in lines)


def _path(points, sizes):
    """A line of an SVG path through points from the lower left corner, in 0.1 mm."""
    at = np.rint(10 * np.array(points)).astype(int)
    at[:, 1] = round(10 * float(sizes[1])) - at[:, 1]
    steps = np.diff(at, axis=0)
    steps = steps[steps.any(axis=1)]
    if not len(steps):
        return ""
    text = " ".join(f"{x} {y}" for x, y in steps.tolist()).replace(" -", "-")
    return f"M{at[0, 0]} {at[0, 1]}l{text}"
