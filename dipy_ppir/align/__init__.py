"""Secure counterparts of ``dipy.align``: same names of modules, same arguments.

::

    affine_registration ─> SecureAffineRegistration ─> SecureMutualInformationMetric
                                                        └> SecureParzenJointHistogram
                                   SecureCrossCorrelationMetric,
                                   SecureSquaredDifferencesMetric
    syn_registration ─> SecureSymmetricDiffeomorphicRegistration ─> SecureCCMetric,
                                   SecureSSDMetric, SecureMINDMetric
    freeform_registration ─> SecureFreeFormRegistration
    point_registration
    build_template
    read_mapping, write_mapping: maps as DIPY's files
    read_transform, write_transform: transforms as those of other programs

Nothing in this package touches a socket or a field element; what has to be
computed on both images goes through the protocols of `dipy_ppir.mpc`.
"""

from dipy_ppir.align.remote import RemoteImage, is_remote  # noqa: F401, I001
from dipy_ppir.align._public import (
    affine,
    affine_registration,
    center_of_mass,
    freeform_registration,
    rigid,
    rigid_isoscaling,
    rigid_scaling,
    syn_registration,
    translation,
)
from dipy_ppir.align.mappings import read_mapping, write_mapping
from dipy_ppir.align.points import RemotePoints, point_registration
from dipy_ppir.align.template import build_template
from dipy_ppir.align.transformfiles import read_transform, write_transform

__all__ = [
    "RemoteImage",
    "RemotePoints",
    "affine",
    "affine_registration",
    "build_template",
    "center_of_mass",
    "point_registration",
    "freeform_registration",
    "read_mapping",
    "read_transform",
    "rigid",
    "rigid_isoscaling",
    "rigid_scaling",
    "syn_registration",
    "translation",
    "write_mapping",
    "write_transform",
]
