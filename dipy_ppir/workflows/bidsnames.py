"""Names of files of a BIDS dataset, and of those that are derived from them."""

import re

#: Entities that follow ``space`` in names; the others come before it.
_AFTER_SPACE = (
    "split",
    "recording",
    "chunk",
    "atlas",
    "seg",
    "scale",
    "res",
    "den",
    "label",
    "desc",
)


def parts(name):
    """The entities, the suffix and the ending of a file's name.

    Parameters
    ----------
    name : str
        as ``sub-01_run-2_T1w.nii.gz``.

    Returns
    -------
    entities : dict
        in the order of the name.
    suffix, ending : str
    """
    stem, dot, ending = name.partition(".")
    *pairs, suffix = stem.split("_")
    return dict(pair.split("-", 1) for pair in pairs), suffix, dot + ending


def derived(name, suffix=None, ending=None, **added):
    """Name of a file that is made from another one.

    Parameters
    ----------
    name : str
        of the other one.
    suffix, ending : str, optional
        in place of those.
    **added
        entities; ``from``, ``to`` and ``mode``, which transforms have, come last.

    Returns
    -------
    name : str
    """
    entities, old_suffix, old_ending = parts(name)
    after = {k: v for k, v in entities.items() if k in _AFTER_SPACE}
    entities = {k: v for k, v in entities.items() if k not in after}
    if "space" in added:
        entities["space"] = added.pop("space")
    entities |= after | added
    words = [f"{key}-{value}" for key, value in entities.items()]
    ending = old_ending if ending is None else ending
    return "_".join([*words, suffix or old_suffix]) + ending


def label(text):
    """A label that BIDS allows, letters and digits only, out of any text."""
    return re.sub(r"[^0-9a-zA-Z]", "", text)
