"""The commands as nipype interfaces, for nodes of nipype's workflows.

::

    AlignAffine, AlignSyn, AlignFreeForm    two images, here or at a site of a session
    AlignPoints                             two sets of points
    ApplyTransform                          what a registration found, on an image
    ConvertTransform                        the same, as other programs read it

An interface runs the command of the same name, and its inputs are called as the flags
of the command. Needs nipype: ``pip install 'dipy-ppir[nipype]'``.
"""

from dipy_ppir.interfaces.base import nipype_that_calls_nobody

with nipype_that_calls_nobody():
    try:
        import nipype  # noqa: F401
    except ImportError as exc:
        raise ImportError(
            "the interfaces need nipype; install it with pip install "
            "'dipy-ppir[nipype]'"
        ) from exc

    from dipy_ppir.interfaces.align import (
        AlignAffine,
        AlignFreeForm,
        AlignPoints,
        AlignSyn,
    )
    from dipy_ppir.interfaces.transform import ApplyTransform, ConvertTransform

__all__ = [
    "AlignAffine",
    "AlignFreeForm",
    "AlignPoints",
    "AlignSyn",
    "ApplyTransform",
    "ConvertTransform",
]
