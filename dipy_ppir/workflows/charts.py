"""Where the marks of a page's charts go; the template draws them."""

import math

import numpy as np

#: Phases of a run that have a colour of their own, the others share one.
_PHASES = 6
#: Bits of a voxel against which what was opened is held.
VOXEL_BITS = 8
#: Points of a set that are drawn.
_MOST_POINTS = 1500
_PLANES = (("x", "y", 0, 1), ("x", "z", 0, 2), ("y", "z", 1, 2))


def of_traffic(bytes_sent):
    """Bars of what each role sent, by phase.

    Parameters
    ----------
    bytes_sent : dict
        of a receipt.

    Returns
    -------
    chart : dict
        ``rows``: role, total and parts, each with its phase, bytes, colour, and place
        and width in percent; ``legend``: phases in the order of their colours.
    """
    total = {}
    for phases in bytes_sent.values():
        for phase, n in phases.items():
            total[phase] = total.get(phase, 0) + n
    order = sorted((p for p, n in total.items() if n), key=total.get, reverse=True)
    shown = order if len(order) <= _PHASES + 1 else order[:_PHASES]
    legend = [*shown, *(["everything else"] if len(shown) < len(order) else [])]
    most = max([sum(phases.values()) for phases in bytes_sent.values()] + [1])
    rows = []
    for role, phases in bytes_sent.items():
        amounts = [phases.get(phase, 0) for phase in shown]
        amounts.append(sum(phases.values()) - sum(amounts))
        parts, place = [], 0.0
        for color, (phase, n) in enumerate(zip(legend, amounts, strict=False)):
            width = 100 * n / most
            part = {"phase": phase, "bytes": n, "color": color}
            parts.append({**part, "x": round(place, 3), "width": round(width, 3)})
            place += width
        rows.append({"role": role, "total": sum(phases.values()), "parts": parts})
    return {"rows": rows, "legend": legend}


def of_bits(receipt):
    """What was opened to each owner beside the image that it is about, in bits.

    Parameters
    ----------
    receipt : dict

    Returns
    -------
    chart : dict or None
        ``rows``: role, its bits and those of the image, and both places in percent of
        a scale of logarithms; ``ticks`` of the scale, powers of ten. None where
        nothing is about an image.
    """
    voxels = {role: n for role, n in receipt["voxels"].items() if n > 1}
    if not voxels:
        return None
    most = math.ceil(math.log10(VOXEL_BITS * max(voxels.values())))

    def place(bits):
        return round(100 * math.log10(max(bits, 1)) / most, 2)

    rows = []
    for role, n in voxels.items():
        bits, image = receipt["bits"][role], VOXEL_BITS * n
        row = {"role": role, "bits": bits, "voxels": n, "image": image}
        places = {"at": min(place(bits), 100.0), "image_at": place(image)}
        rows.append({**row, **places, "each": bits / n})
    step = 1 if most < 8 else 2
    ticks = [{"power": p, "at": 100 * p / most} for p in range(0, most + 1, step)]
    return {"rows": rows, "ticks": ticks}


def of_course(course, width=720, height=200):
    """The metric's values on the way, a line for each level.

    Parameters
    ----------
    course : list of dict
        of a receipt, see `course.Course`.
    width, height : float, optional
        of the chart.

    Returns
    -------
    chart : dict
        ``width``, ``height``; ``levels``: name, colour, first and last value, and the
        points of the line; ``low`` and ``high``, the ends of the scale; ``measure``.
    """
    values = [v for level in course for v in level["values"]]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    total = sum(max(level["evaluations"], 1) for level in course)
    most, levels, begin = {}, [], 0
    for level in course:
        most[level["step"]] = max(most.get(level["step"], 0), level["level"])
    for color, level in enumerate(course):
        count = max(level["evaluations"], 1)
        at = np.linspace(begin, begin + count, len(level["values"])) * width / total
        up = [height * (high - v) / span for v in level["values"]]
        pairs = zip(at.tolist(), up, strict=True)
        number = most[level["step"]] - level["level"] + 1
        levels.append(
            {
                "name": f"{level['step'].replace('_', ' ')}, level {number}",
                "color": color % _PHASES,
                "x": round(begin * width / total, 1),
                "evaluations": level["evaluations"],
                "first": level["values"][0],
                "last": level["values"][-1],
                "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs),
            }
        )
        begin += count
    ends = {"low": low, "high": high, "measure": course[0]["measure"]}
    return {"width": width, "height": height, "levels": levels, **ends}


def of_points(sets, size=300):
    """Sets of points, seen along each axis.

    Parameters
    ----------
    sets : dict
        maps names to arrays of shape (n, dim).
    size : float, optional
        of the longest side.

    Returns
    -------
    chart : dict
        ``planes``: names of both axes, width, height, and by set a path that has a
        line of no length at each point; ``left_out``, points that are not drawn.
    """
    sets = {name: np.asarray(points, dtype=float) for name, points in sets.items()}
    left_out = 0
    for name, points in sets.items():
        if len(points) > _MOST_POINTS:
            keep = np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int)
            left_out = max(left_out, len(points) - _MOST_POINTS)
            sets[name] = points[keep]
    everything = np.concatenate([*sets.values()])
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = size / ((high - low).max() or 1.0)
    planes = []
    for across, along, i, j in _PLANES[: 1 if everything.shape[1] == 2 else 3]:
        width, height = (high - low)[[i, j]] * scale
        marks = {}
        for name, points in sets.items():
            x = (points[:, i] - low[i]) * scale
            y = (high[j] - points[:, j]) * scale
            pairs = zip(x.tolist(), y.tolist(), strict=True)
            marks[name] = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in pairs)
        plane = {"across": across, "along": along, "marks": marks}
        planes.append({**plane, "width": round(width, 1), "height": round(height, 1)})
    return {"planes": planes, "left_out": left_out}
