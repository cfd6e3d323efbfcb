"""Overlay pictures of two images before and after registration.

Needs matplotlib, which is imported only when a picture is made.
"""

import nibabel as nib
import numpy as np
from scipy import ndimage

from dipy_ppir.align.quality import jacobian_determinant

#: Pictures of a registration: name of the file to what it shows.
PICTURES = {"checkerboard.png": "checkerboard", "contours.png": "contours"}
SYN_PICTURES = {**PICTURES, "warped_grid.png": "grid", "jacobian.png": "jacobian"}

_TILES = 9
_MOVING_COLOR = "#ff5a36"
# Plane, axis across it, ends of the horizontal and of the vertical axis.
_PLANES = (
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

    static, zooms = _upright(static, grid2world)
    movings = [_upright(image, grid2world)[0] for image in (before, after)]
    center = _center(static)
    static = _window(static)
    low_high = _limits(movings[1])
    threshold = _outline_level(movings[1])
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
    for row, (plane, axis, across, along) in enumerate(_PLANES):
        fixed = _slice(static, axis, center[axis])
        extent = [s for i, s in enumerate(sizes) if i != axis]
        for column, (when, moving) in enumerate(
            zip(("before", "after"), movings, strict=True)
        ):
            ax = axes[row, column]
            place = {"origin": "lower", "extent": (0, extent[0], 0, extent[1])}
            raw = _slice(moving, axis, center[axis])
            if kind == "checkerboard":
                tile = max(sizes) / _TILES
                rgb = _checkerboard(fixed, _scale(raw, low_high), extent, tile)
                ax.imshow(rgb, interpolation="nearest", **place)
            else:
                ax.imshow(fixed, cmap="gray", vmin=0, vmax=1, **place)
                if raw.min() < threshold < raw.max():
                    ax.contour(
                        ndimage.gaussian_filter(raw, 0.7),
                        levels=[threshold],
                        colors=_MOVING_COLOR,
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


def save_map(path, kind, static, mapping, *, title=""):
    """Draw a diffeomorphic map on the static image.

    Parameters
    ----------
    path : str or Path
        PNG file to write.
    kind : {"grid", "jacobian"}
        a regular grid and where the map takes it, or the Jacobian determinant.
    static : array, shape (S, R, C)
    mapping : DiffeomorphicMap
        on the grid of the static image.
    title : str, optional
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid2world = mapping.disp_grid2world
    field = np.asarray(mapping.get_forward_field())
    image, zooms = _upright(static, grid2world)
    center = _center(image)
    image = _window(image)
    sizes = [n * z for n, z in zip(image.shape, zooms, strict=True)]
    determinant = None
    if kind == "jacobian":
        determinant = _upright(jacobian_determinant(field, grid2world), grid2world)[0]
    # Displacements in mm along the axes right, anterior, superior of the array.
    codes = _upright_axes(grid2world)
    along = field @ codes
    components = [_upright(along[..., i], grid2world)[0] for i in range(3)]
    widths = [sizes[1], sizes[0], sizes[0]]
    figure = Figure(
        figsize=(12.5, 12.5 * max(sizes) / sum(widths) + 1.2),
        facecolor="black",
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, gridspec_kw={"width_ratios": widths})
    shown = None
    for ax, (plane, axis, across, up) in zip(axes, _PLANES, strict=True):
        extent = [s for i, s in enumerate(sizes) if i != axis]
        place = {"origin": "lower", "extent": (0, extent[0], 0, extent[1])}
        fixed = _slice(image, axis, center[axis])
        ax.imshow(fixed, cmap="gray", vmin=0, vmax=1, **place)
        if kind == "jacobian":
            shown = _draw_jacobian(ax, _slice(determinant, axis, center[axis]), place)
        else:
            u, v = (
                _slice(components[i], axis, center[axis]) for i in range(3) if i != axis
            )
            _draw_grid(ax, u, v, extent)
        ax.set_xlim(0, extent[0])
        ax.set_ylim(0, extent[1])
        _label(ax, across, up)
        ax.set_title(plane, color="white", fontsize=12)
    if kind == "jacobian":
        bar = figure.colorbar(shown, ax=axes, shrink=0.8, extend="both")
        ticks = (0.4, 0.6, 1.0, 1.6, 2.5)
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
        bar.ax.minorticks_off()
        bar.ax.tick_params(colors="white")
        bar.set_label("change of volume, static to moving image", color="white")
        words = "Jacobian determinant: blue shrinks, red grows, black lines fold"
    else:
        words = "where the deformation takes a regular grid on the static image"
    figure.supxlabel(words, color="white", fontsize=11)
    if title:
        figure.suptitle(title, color="white", fontsize=13)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _draw_jacobian(ax, determinant, place):
    from matplotlib.colors import LogNorm

    shown = ax.imshow(
        np.maximum(determinant, 1e-3),
        cmap="RdBu_r",
        norm=LogNorm(0.4, 2.5),
        alpha=0.75,
        **place,
    )
    if determinant.min() <= 0 < determinant.max():
        ax.contour(determinant, levels=[0], colors="black", linewidths=1.2, **place)
    return shown


def _draw_grid(ax, u, v, extent, lines=26):
    rows, columns = u.shape
    x, y = np.meshgrid(
        (np.arange(columns) + 0.5) * extent[0] / columns,
        (np.arange(rows) + 0.5) * extent[1] / rows,
    )
    step = max(max(rows, columns) // lines, 1)
    style = {"color": "#ffd23f", "linewidth": 0.7, "alpha": 0.9}
    for r in range(step // 2, rows, step):
        ax.plot((x + u)[r], (y + v)[r], **style)
    for c in range(step // 2, columns, step):
        ax.plot((x + u)[:, c], (y + v)[:, c], **style)


def _upright_axes(grid2world):
    """Unit vectors, as columns, of the axes of an array made upright."""
    matrix = nib.as_closest_canonical(
        nib.Nifti1Image(np.zeros((1, 1, 1), dtype=np.uint8), grid2world)
    ).affine[:3, :3]
    return matrix / np.linalg.norm(matrix, axis=0)


def _upright(image, grid2world):
    """The image with axes towards right, anterior, superior, and its voxel size."""
    image = nib.Nifti1Image(np.asarray(image, dtype=np.float32), grid2world)
    image = nib.as_closest_canonical(image)
    return np.asarray(image.dataobj), nib.affines.voxel_sizes(image.affine)


def _limits(image):
    """Darkest and brightest intensity to tell apart, background left out."""
    inside = image[image != image.flat[0]]
    if not inside.size:
        return 0.0, 1.0
    low, high = np.percentile(inside, (2, 99))
    return (low, high) if high > low else (low, low + 1.0)


def _scale(image, limits):
    low, high = limits
    return np.clip((image - low) / (high - low), 0, 1)


def _window(image):
    return _scale(image, _limits(image))


def _center(image):
    weights = _window(image)
    if not weights.any():
        return [n // 2 for n in image.shape]
    return [int(round(c)) for c in ndimage.center_of_mass(weights)]


def _slice(image, axis, index):
    return np.take(image, index, axis=axis).T


def _outline_level(image):
    """A level between the two commonest kinds of voxels (Otsu's)."""
    from dipy.segment.threshold import otsu

    return float(otsu(image))


def _checkerboard(static, moving, extent, tile):
    """Grey squares of one image, orange ones of the other."""
    from matplotlib.colors import to_rgb

    rows, columns = static.shape
    x = (np.arange(columns) + 0.5) * extent[0] / columns
    y = (np.arange(rows) + 0.5) * extent[1] / rows
    odd = (x[None, :] // tile + y[:, None] // tile) % 2 == 1
    tint = np.array(to_rgb(_MOVING_COLOR)) * 0.75 + 0.25
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
