"""Intensities of an owner's own image, so that few digits are enough for it.

Images are carried on shares as numbers between 0 and 1, and windows whose deviation is
far below the range of all exert hardly any force. A few voxels of metal, or bone beside
brain in a CT, would leave none to what is to be registered. Local cross-correlation
does not change with the scale of intensities inside a window, so an owner may choose
them as it likes.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

#: Part of an image's voxels on either side that is no measure of its range, and most of
#: them that may be outliers: see `winsorized`.
TAIL, MOST_OUTLIERS = 0.005, 0.002
#: Part of the range by which an object differs from the image's border.
CONTRAST = 0.1
#: Windows of a large image that are looked at.
WINDOWS = 20_000
#: Part of an object's windows that may be flat before an image is equalized; of brains
#: without skull it is below 0.09, of a head CT 0.2.
MOST_FLAT = 0.15
#: Least radius of the windows that are looked at: of smaller ones many are flat in any
#: image, and no harm done.
LEAST_RADIUS = 4
#: The slope of equalization is this power of how often an intensity occurs: of 1 all
#: would be equally frequent, and noise of the background as large as anything.
POWER = 0.75
#: Intensities that are told apart for it, and the deviation, of these, of the Gaussian
#: that smooths their frequencies.
BINS, SMOOTHING = 1024, 3.0


def span(image):
    """Range of an image without outliers, and the range with them that is kept.

    Half a percent of the voxels on either side are left out of the range. What lies
    outside of it by more than half its width is an outlier, if they are no more than
    two voxels in a thousand. Without outliers the range is that of all voxels.

    Parameters
    ----------
    image : array

    Returns
    -------
    low, high : float
    least, most : float
    """
    low, high = np.quantile(image, [TAIL, 1 - TAIL])
    reach = (high - low) / 2
    least, most = low - reach, high + reach
    outside = int(((image < least) | (image > most)).sum())
    if not 0 < outside <= MOST_OUTLIERS * image.size or not reach > 0:
        low, high = float(image.min()), float(image.max())
        return low, high, low, high
    return low, high, least, most


def winsorized(image):
    """An image without outliers, and how many voxels were changed; see `span`.

    A few voxels of metal would otherwise leave no digits to all others.
    """
    _, _, least, most = span(image)
    changed = int(((image < least) | (image > most)).sum())
    return (np.clip(image, least, most) if changed else image), changed


def flat_part(image, radius, guard):
    """Part of an object's windows whose standard deviation is below a guard.

    The object is what differs from the median of the image's border by a tenth of its
    range. Of large images some thousand windows are looked at, evenly spread.

    Parameters
    ----------
    image : array
    radius : int
        of the windows, voxels; `LEAST_RADIUS` if that is more.
    guard : float
        in units of the image's range, see `span`.

    Returns
    -------
    part : float
        0 without an object.
    """
    low, high, *_ = span(image)
    if not high > low:
        return 0.0
    ends = [
        np.take(image, at, axis=axis).ravel()
        for axis in range(image.ndim)
        for at in (0, -1)
    ]
    border = np.median(np.concatenate(ends))
    radius = min(max(radius, LEAST_RADIUS), (min(image.shape) - 1) // 2)
    windows = sliding_window_view(image, (2 * radius + 1,) * image.ndim)
    count = math.prod(windows.shape[: image.ndim])
    step = math.ceil((count / WINDOWS) ** (1 / image.ndim))
    windows = windows[(slice(None, None, step),) * image.ndim]
    # Window by window along the first axis: all would be a copy of many images.
    axes, middle = tuple(range(-image.ndim, 0)), (..., *(radius,) * image.ndim)
    inside = np.abs(windows[middle] - border) > CONTRAST * (high - low)
    flat = [plane.std(axis=axes) < guard * (high - low) for plane in windows]
    return float(np.array(flat)[inside].mean()) if inside.any() else 0.0


def equalized(image):
    """An image whose frequent intensities are further apart, between 0 and 1.

    A monotone function of the intensities, whose slope grows with how often they occur:
    histogram equalization, but for `POWER`. Soft tissue of a CT gets the digits that
    otherwise lie between bone and air.

    Parameters
    ----------
    image : array

    Returns
    -------
    image : array of float
    """
    low, high = float(image.min()), float(image.max())
    counts, edges = np.histogram(image, BINS, (low, high))
    slope = ndimage.gaussian_filter1d(counts.astype(np.float64), SMOOTHING) ** POWER
    levels = np.concatenate([[0.0], np.cumsum(slope / slope.sum())])
    return np.interp(image, edges, levels)


class Prepared(NamedTuple):
    """An image as it is carried on shares; see `prepared`.

    Attributes
    ----------
    image : array of float
    outliers : int
        voxels that were brought near to the range of the others.
    equalized : bool
    flat : float
        part of the object's windows that exert hardly any force all the same.
    """

    image: np.ndarray
    outliers: int
    equalized: bool
    flat: float


def prepared(image, radius, guard):
    """An image without outliers, equalized where many of its windows are flat.

    Parameters
    ----------
    image : array
    radius : int
        of the windows, voxels.
    guard : float
        windows of a smaller deviation are flat, in units of the image's range.

    Returns
    -------
    prepared : Prepared
    """
    image, outliers = winsorized(np.asarray(image, dtype=np.float64))
    flat = flat_part(image, radius, guard)
    if flat <= MOST_FLAT:
        return Prepared(image, outliers, False, flat)
    image = equalized(image)
    return Prepared(image, outliers, True, flat_part(image, radius, guard))
