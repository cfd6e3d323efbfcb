"""Pictures of a registration: two images over each other, and what a transform does.

Needs matplotlib, which is imported only when a picture is made.
"""

import nibabel as nib
import numpy as np
from scipy import ndimage

from dipy_ppir.align.quality import jacobian_determinant

#: Pictures of a registration: name of the file to what it shows.
PICTURES = {"checkerboard.png": "checkerboard", "contours.png": "contours"}
MAP_PICTURES = {"warped_grid.png": "grid", "jacobian.png": "jacobian"}
SYN_PICTURES = {**PICTURES, **MAP_PICTURES}
#: The same for one who has one of the images only.
OWN_PICTURES = {"warped_grid.png": "grid"}

_TILES = 9
MOVING_COLOR = "#ff5a36"
GRID_COLOR = "#ffd23f"
#: Lines of a grid along the longest side of an image.
GRID_LINES = 28
#: Jacobian determinants on the scale of colours, which ends with them.
JACOBIAN_TICKS = (0.4, 0.6, 1.0, 1.6, 2.5)
# Plane, axis across it, ends of the horizontal and of the vertical axis.
PLANES = (
    ("sagittal", 0, "PA", "IS"),
    ("coronal", 1, "LR", "IS"),
    ("axial", 2, "LR", "PA"),
)


def save_overlay(path, kind, static, before, after, grid2world, *, title=""):
    """Draw an overlay of the moving on the static image, before and after.

    Parameters
    ----------
    path : str or Path
        PNG file to write.
    kind : {"checkerboard", "contours"}
    static : array, shape (S, R, C)
    before, after : array, shape (S, R, C)
        the moving image on the static image's grid, before and after.
    grid2world : array, shape (4, 4)
        voxel-to-space transformation of that grid, mm.
    title : str, optional
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    static, zooms = upright(static, grid2world)
    movings = [upright(image, grid2world)[0] for image in (before, after)]
    center = center_of(static)
    static = windowed(static)
    low_high = limits(movings[1])
    threshold = outline_level(movings[1])
    sizes = [n * z for n, z in zip(static.shape, zooms, strict=True)]
    heights = [sizes[2], sizes[2], sizes[1]]
    width = max(sizes[:2])
    inches = 3.6
    figure = Figure(
        figsize=(2 * inches + 0.7, inches * sum(heights) / width + 1.3),
        facecolor="black",
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2, gridspec_kw={"height_ratios": heights})
    for row, (plane, axis, across, along) in enumerate(PLANES):
        fixed = slice_of(static, axis, center[axis])
        extent = [s for i, s in enumerate(sizes) if i != axis]
        for column, (when, moving) in enumerate(
            zip(("before", "after"), movings, strict=True)
        ):
            ax = axes[row, column]
            place = {"origin": "lower", "extent": (0, extent[0], 0, extent[1])}
            raw = slice_of(moving, axis, center[axis])
            if kind == "checkerboard":
                tile = max(sizes) / _TILES
                rgb = _checkerboard(fixed, scaled(raw, low_high), extent, tile)
                ax.imshow(rgb, interpolation="nearest", **place)
            else:
                ax.imshow(fixed, cmap="gray", vmin=0, vmax=1, **place)
                if raw.min() < threshold < raw.max():
                    ax.contour(
                        ndimage.gaussian_filter(raw, 0.7),
                        levels=[threshold],
                        colors=MOVING_COLOR,
                        linewidths=1.1,
                        **place,
                    )
            _label(ax, across, along)
            if row == 0:
                ax.set_title(when, color="white", fontsize=15, fontweight="bold")
            if column == 0:
                ax.set_ylabel(plane, color="white", fontsize=12)
    moving_words = "moving image: " + (
        "orange squares" if kind == "checkerboard" else "orange outline"
    )
    figure.supxlabel(
        f"static image: grey      {moving_words}", color="white", fontsize=11
    )
    if title:
        figure.suptitle(title, color="white", fontsize=13)
    # Without the date and version, so that the same pictures are the same files.
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def save_map(path, kind, image, transform, grid2world=None, *, title=""):
    """Draw what a transform does, on one image.

    Parameters
    ----------
    path : str or Path
        PNG file to write.
    kind : {"grid", "jacobian"}
        a regular grid and where the transform takes it, or the Jacobian determinant,
        of a map only.
    image : array, shape (S, R, C)
        the static image, or the moving one on its grid.
    transform : DiffeomorphicMap or array, shape (4, 4)
        on this grid; or an affine transform from static to moving space, mm.
    grid2world : array, shape (4, 4), optional
        voxel-to-space transformation of the grid, which a map knows.
    title : str, optional
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if grid2world is None:
        grid2world = transform.disp_grid2world
    displacement = displacements(transform, np.shape(image), grid2world)
    image, zooms = upright(image, grid2world)
    center = center_of(image)
    image = windowed(image)
    sizes = [n * z for n, z in zip(image.shape, zooms, strict=True)]
    determinant = upright_determinant(transform) if kind == "jacobian" else None
    widths = [sizes[1], sizes[0], sizes[0]]
    figure = Figure(
        figsize=(12.5, 12.5 * max(sizes) / sum(widths) + 1.2),
        facecolor="black",
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, gridspec_kw={"width_ratios": widths})
    shown = None
    for ax, (plane, axis, across, up) in zip(axes, PLANES, strict=True):
        extent = [s for i, s in enumerate(sizes) if i != axis]
        place = {"origin": "lower", "extent": (0, extent[0], 0, extent[1])}
        fixed = slice_of(image, axis, center[axis])
        ax.imshow(fixed, cmap="gray", vmin=0, vmax=1, **place)
        if kind == "jacobian":
            shown = _draw_jacobian(ax, slice_of(determinant, axis, center[axis]), place)
        else:
            found = displacement(axis, center[axis])
            for x, y in grid_lines(*found, extent, max(sizes) / GRID_LINES):
                ax.plot(x, y, color=GRID_COLOR, linewidth=0.7, alpha=0.9)
        ax.set_xlim(0, extent[0])
        ax.set_ylim(0, extent[1])
        _label(ax, across, up)
        ax.set_title(plane, color="white", fontsize=12)
    if kind == "jacobian":
        bar = figure.colorbar(shown, ax=axes, shrink=0.8, extend="both")
        bar.set_ticks(JACOBIAN_TICKS, labels=[f"{t:g}" for t in JACOBIAN_TICKS])
        bar.ax.minorticks_off()
        bar.ax.tick_params(colors="white")
        bar.set_label("change of volume, static to moving image", color="white")
        words = "Jacobian determinant: blue shrinks, red grows, black lines fold"
    else:
        words = "where the transform takes a regular grid"
    figure.supxlabel(words, color="white", fontsize=11)
    if title:
        figure.suptitle(title, color="white", fontsize=13)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def displacements(transform, shape, grid2world):
    """Displacements by a transform in the planes of an upright image.

    Parameters
    ----------
    transform : DiffeomorphicMap or array, shape (4, 4)
        see `save_map`.
    shape : tuple of int
    grid2world : array, shape (4, 4)

    Returns
    -------
    displacement : callable
        takes the axis across a plane and an index along it, and returns the two
        components in the plane, mm, at its voxels: each an array (rows, columns).
    """
    axes = upright_axes(grid2world)
    if isinstance(transform, np.ndarray):
        canonical = nib.as_closest_canonical(
            nib.Nifti1Image(np.broadcast_to(np.uint8(0), shape), grid2world)
        )
        voxels, to_world = canonical.shape, canonical.affine
        matrix = (transform - np.eye(4))[:3] @ to_world

        def components(axis, index):
            at = np.indices([1 if i == axis else n for i, n in enumerate(voxels)])
            at[axis] = index
            moved = np.moveaxis(at, 0, -1) @ matrix[:, :3].T + matrix[:, 3]
            return np.moveaxis((moved @ axes).take(0, axis=axis), -1, 0)

    else:
        # Along the axes right, anterior, superior of the array.
        along = np.asarray(transform.get_forward_field()) @ axes
        volumes = [upright(along[..., i], grid2world)[0] for i in range(3)]

        def components(axis, index):
            return [volume.take(index, axis=axis) for volume in volumes]

    def displacement(axis, index):
        found = components(axis, index)
        return tuple(found[i].T for i in range(3) if i != axis)

    return displacement


def grid_lines(u, v, extent, spacing):
    """Where displacements take the lines of a regular grid.

    Parameters
    ----------
    u, v : array, shape (rows, columns)
        mm.
    extent : sequence of float
        width and height, mm.
    spacing : float
        mm from one line to the next, about.

    Returns
    -------
    lines : list of (array, array)
        coordinates of each, mm, from the lower left corner.
    """
    rows, columns = u.shape
    x, y = np.meshgrid(
        (np.arange(columns) + 0.5) * extent[0] / columns,
        (np.arange(rows) + 0.5) * extent[1] / rows,
    )
    down, right = (
        max(round(spacing * n / size), 1)
        for n, size in ((rows, extent[1]), (columns, extent[0]))
    )
    x, y = x + u, y + v
    return [(x[r], y[r]) for r in range(down // 2, rows, down)] + [
        (x[:, c], y[:, c]) for c in range(right // 2, columns, right)
    ]


def upright_determinant(mapping):
    """The Jacobian determinant of a map, made upright."""
    place = mapping.disp_grid2world
    return upright(jacobian_determinant(mapping.get_forward_field(), place), place)[0]


def _draw_jacobian(ax, determinant, place):
    from matplotlib.colors import LogNorm

    shown = ax.imshow(
        np.maximum(determinant, 1e-3),
        cmap="RdBu_r",
        norm=LogNorm(JACOBIAN_TICKS[0], JACOBIAN_TICKS[-1]),
        alpha=0.75,
        **place,
    )
    if determinant.min() <= 0 < determinant.max():
        ax.contour(determinant, levels=[0], colors="black", linewidths=1.2, **place)
    return shown


def upright_axes(grid2world):
    """Unit vectors, as columns, of the axes of an array made upright."""
    matrix = nib.as_closest_canonical(
        nib.Nifti1Image(np.zeros((1, 1, 1), dtype=np.uint8), grid2world)
    ).affine[:3, :3]
    return matrix / np.linalg.norm(matrix, axis=0)


def upright(image, grid2world):
    """The image with axes towards right, anterior, superior, and its voxel size."""
    image = nib.Nifti1Image(np.asarray(image, dtype=np.float32), grid2world)
    image = nib.as_closest_canonical(image)
    return np.asarray(image.dataobj), nib.affines.voxel_sizes(image.affine)


def limits(image):
    """Darkest and brightest intensity to tell apart, background left out."""
    inside = image[image != image.flat[0]]
    if not inside.size:
        return 0.0, 1.0
    low, high = np.percentile(inside, (2, 99))
    return (low, high) if high > low else (low, low + 1.0)


def scaled(image, low_high):
    """The image with the darkest and brightest intensity as 0 and 1."""
    low, high = low_high
    return np.clip((image - low) / (high - low), 0, 1)


def windowed(image):
    """The image between 0 and 1, for the eye."""
    return scaled(image, limits(image))


def center_of(image):
    """Voxel in the middle of what an image shows."""
    weights = windowed(image)
    if not weights.any():
        return [n // 2 for n in image.shape]
    return [int(round(c)) for c in ndimage.center_of_mass(weights)]


def slice_of(image, axis, index):
    """A plane of an upright image, its rows from below."""
    # np.take copies the array where it is not in C's order.
    return image[(slice(None),) * axis + (index,)].T


def outline_level(image):
    """A level between the two commonest kinds of voxels (Otsu's)."""
    from dipy.segment.threshold import otsu

    low = float(image.min())
    above = image[image > low]
    if not above.size:
        return low
    level = float(otsu(image))
    # Of an image with an empty background it may be that.
    return level if level > low else (low + float(above.mean())) / 2


def _checkerboard(static, moving, extent, tile):
    """Grey squares of one image, orange ones of the other."""
    from matplotlib.colors import to_rgb

    rows, columns = static.shape
    x = (np.arange(columns) + 0.5) * extent[0] / columns
    y = (np.arange(rows) + 0.5) * extent[1] / rows
    odd = (x[None, :] // tile + y[:, None] // tile) % 2 == 1
    tint = np.array(to_rgb(MOVING_COLOR)) * 0.75 + 0.25
    grey = static[..., None].repeat(3, axis=-1)
    # A faint floor marks the squares where the moving image is empty.
    orange = (0.12 + 0.88 * moving[..., None]) * tint
    return np.where(odd[..., None], orange, grey)


def _label(ax, across, along):
    ax.set_facecolor("black")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    for x, y, letter in (
        (0.01, 0.5, across[0]),
        (0.99, 0.5, across[1]),
        (0.5, 0.01, along[0]),
        (0.5, 0.99, along[1]),
    ):
        ax.text(
            x,
            y,
            letter,
            color="#8fd3ff",
            fontsize=10,
            transform=ax.transAxes,
            ha="left" if x < 0.1 else "right" if x > 0.9 else "center",
            va="bottom" if y < 0.1 else "top" if y > 0.9 else "center",
        )
