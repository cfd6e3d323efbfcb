"""The metric on the way to the result, where it is opened to this party."""

#: Values that the receipt keeps of a level, evenly spaced, the last among them.
MOST = 60


class Course:
    """Passes on what a display is shown, and keeps the metric's values.

    Parameters
    ----------
    display : callable
        takes the dicts that `progress.Stage` describes.
    """

    def __init__(self, display):
        self._display, self._levels = display, {}

    def __call__(self, info):
        """Show an evaluation."""
        if "value" in info:
            key = info["step"], info["level"]
            measure = info.get("measure", "mutual information")
            level = self._levels.setdefault(key, {"measure": measure, "values": []})
            level["values"].append(float(f"{info['value']:.6g}"))
        self._display(info)

    def enter(self, receipt):
        """Add the values to a receipt: ``course``, one entry for each level."""
        if self._levels:
            receipt["course"] = [
                {
                    "step": step,
                    "level": level,
                    "measure": found["measure"],
                    "evaluations": len(found["values"]),
                    "values": _thinned(found["values"]),
                }
                for (step, level), found in self._levels.items()
            ]


def _thinned(values):
    n = len(values)
    if n <= MOST:
        return values
    return [values[round(i * (n - 1) / (MOST - 1))] for i in range(MOST)]
