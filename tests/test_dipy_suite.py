"""DIPY's own tests of the mirrored classes, run on the secure ones.

The sources are those of the installed DIPY. Each module is loaded anew under
another name, and the names of DIPY's classes in it are bound to ours, so that
not a line of a test is changed.
"""

from functools import partial
from importlib.util import find_spec, module_from_spec
import inspect
import types

from dipy.align import imaffine as dipy_imaffine
import numpy as np
import pytest

from dipy_ppir.align import imaffine
from dipy_ppir.align.parzenhist import SecureParzenJointHistogram

SECURE = {
    "MutualInformationMetric": imaffine.SecureMutualInformationMetric,
    "AffineRegistration": imaffine.SecureAffineRegistration,
    "ParzenJointHistogram": SecureParzenJointHistogram,
    "transform_centers_of_mass": imaffine.transform_centers_of_mass,
}

#: Tests that do not apply, and why.
NOT_APPLICABLE = {
    "test_joint_pdf_gradients_dense": "reads joint_grad, a table of nbins^2 numbers "
    "per parameter that is never made, by design; the gradient itself is compared "
    "with DIPY's in test_imaffine.py and by finite differences in test_mi_gradient",
    "test_joint_pdf_gradients_sparse": "as test_joint_pdf_gradients_dense",
}

#: Minutes rather than seconds: registrations of whole volumes.
HEAVY = {"test_affreg_all_transforms", "test_mi_gradient"}

#: Tests whose last digits are withheld on purpose: the comparison of arrays in
#: them is replaced by one with this absolute tolerance.
TOLERANCE = {
    # The shift between two images is opened to 2**-CENTER_BITS mm: its exact digits
    # would tell the static image's total intensity.
    "test_transform_centers_of_mass_3d": 2.0**-imaffine.CENTER_BITS,
}


class HistogramMetric(imaffine.SecureMutualInformationMetric):
    """The metric with the histogram opened."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, reveal="histogram")


#: Tests of the value's tenth digit (finite differences with a step of 1e-5): with
#: reveal="gradient", the default, the value is opened to nine digits, on purpose.
EXACT = {"test_mi_gradient"}

#: Names bound to the secure classes, by module. All other tests run as well: they
#: notice if something of DIPY's is no longer passed on.
USES = {
    "test_imaffine": ("MutualInformationMetric", "AffineRegistration", "transform_centers_of_mass"),
    "test_parzenhist": ("ParzenJointHistogram",),
}


def load(name, **others):
    """DIPY's test module `name` with the secure classes in place."""
    secure = {**SECURE, **others}
    spec = find_spec(f"dipy.align.tests.{name}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "imaffine"):
        # Only this module's view of dipy.align.imaffine changes.
        view = types.ModuleType("imaffine")
        vars(view).update(vars(dipy_imaffine))
        vars(view).update({k: secure[k] for k in USES[name]})
        module.imaffine = view
    for key in USES[name]:
        if hasattr(module, key):
            setattr(module, key, secure[key])
    return module


def plain(function):
    """The test without the `pytestconfig` that DIPY's decorator asks for."""
    if "pytestconfig" in inspect.signature(function).parameters:
        return partial(function, None)
    return function


def rounded(name, key):
    """The test with its comparison of arrays made coarser."""
    module = load(name)
    module.assert_array_almost_equal = partial(
        np.testing.assert_allclose, rtol=0, atol=TOLERANCE[key]
    )
    return getattr(module, key)


def cases():
    for name in USES:
        module = load(name)
        for key, function in vars(module).items():
            if key in TOLERANCE:
                function = rounded(name, key)
            if key in EXACT:
                function = getattr(load(name, MutualInformationMetric=HistogramMetric), key)
            if key.startswith("test_") and inspect.isfunction(function):
                marks = [pytest.mark.heavy] if key in HEAVY else []
                if key in NOT_APPLICABLE:
                    marks.append(pytest.mark.skip(reason=NOT_APPLICABLE[key]))
                yield pytest.param(function, id=f"{name}-{key}", marks=marks)


@pytest.mark.parametrize("function", list(cases()))
@pytest.mark.filterwarnings("default")
def test_dipy(function):
    plain(function)()


def test_the_secure_classes_are_in_place():
    module = load("test_imaffine")
    assert module.imaffine.AffineRegistration is imaffine.SecureAffineRegistration
    assert dipy_imaffine.AffineRegistration is not imaffine.SecureAffineRegistration
    assert load("test_parzenhist").ParzenJointHistogram is SecureParzenJointHistogram


# The heavy ones for a few transforms, one for each kind of sampling.
SOME = [("TRANSLATION", 2), ("ROTATION", 2), ("RIGID", 2)]


METRICS = [HistogramMetric, imaffine.SecureMutualInformationMetric]


@pytest.mark.parametrize("metric", METRICS, ids=["histogram", "gradient"])
@pytest.mark.parametrize("ttype", SOME, ids=lambda t: f"{t[0]}{t[1]}")
@pytest.mark.filterwarnings("default")
def test_dipy_gradient_in_part(ttype, metric, monkeypatch):
    module = load("test_imaffine", MutualInformationMetric=metric)
    monkeypatch.setattr(module, "factors", {ttype: module.factors[ttype]})
    plain(module.test_mi_gradient)()


@pytest.mark.parametrize("metric", METRICS, ids=["histogram", "gradient"])
@pytest.mark.parametrize("ttype", SOME[:2], ids=lambda t: f"{t[0]}{t[1]}")
@pytest.mark.filterwarnings("default")
def test_dipy_registration_in_part(ttype, metric, monkeypatch):
    module = load("test_imaffine", MutualInformationMetric=metric)
    monkeypatch.setattr(module, "factors", {ttype: module.factors[ttype]})
    plain(module.test_affreg_all_transforms)()
