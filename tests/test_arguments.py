"""What callers pass by mistake is refused, by name, before anything is started."""

from pathlib import Path

from dipy.align.imaffine import AffineMap
from dipy.align.transforms import AffineTransform3D, regtransforms
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dipy_ppir.align import RemoteImage, affine_registration, syn_registration
from dipy_ppir.align.arguments import image_array, mask_array, read_image
from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.align.imaffine import (
    SecureAffineRegistration,
    SecureMutualInformationMetric,
)
from dipy_ppir.align.imwarp import SecureSymmetricDiffeomorphicRegistration
from dipy_ppir.align.metrics import SecureCCMetric
from dipy_ppir.mpc import local
from dipy_ppir.mpc.session import Session

IMAGE = ndimage.gaussian_filter(np.random.default_rng(0).random((20,) * 3), 1)
EYE = np.eye(4)
MAP = AffineMap(EYE)
MASKED = np.ma.masked_less(IMAGE, np.median(IMAGE))
NIFTI = nib.Nifti1Image(IMAGE, EYE)
RUN = {
    "path as session": ({"session": "s.toml"}, "session must be.*Session.load"),
    "Path as session": ({"session": Path("s")}, "session must be.*Session.load"),
    "class as session": ({"session": Session}, "the class Session itself"),
    "path as checkpoint": ({"checkpoint": "a"}, "checkpoint must be.*Checkpoint\\("),
    "class as checkpoint": ({"checkpoint": Checkpoint}, "the class Checkpoint itself"),
    "callback": ({"callback": 7}, "callback must be a function, got .* int"),
}
IMAGES = {
    "masked": ({"static": MASKED}, "static image has masked.*filled\\(0\\)"),
    "objects": ({"moving": np.array([[None, 1]])}, "moving image must hold numbers"),
    "nothing": ({"moving": None}, "moving image must hold numbers, got .*NoneType"),
    "class": ({"static": nib.Nifti1Image}, "static image must hold.*the class Nifti1"),
    "large": ({"static": RemoteImage((1000,) * 3)}, "1,000,000,000 voxels.*resample"),
}
DROP_IN = {
    **RUN,
    **IMAGES,
    "no affine": ({"static_affine": None}, "static_affine is missing.*pass the image"),
    "name as affine": ({"moving_affine": "a.txt"}, "moving_affine must.*numpy.loadtxt"),
    "map as affine": ({"moving_affine": MAP}, "moving_affine must.*take its affine"),
    "complex affine": ({"static_affine": EYE * 1j}, "static_affine must hold real"),
}
AFFINE = {
    **DROP_IN,
    "early checkpoint": (
        {"checkpoint": Checkpoint("no")},
        "checkpoint needs a session",
    ),
    "name as mask": ({"static_mask": "m.nii"}, "static_mask must.*nibabel"),
    "image as mask": ({"moving_mask": NIFTI}, "moving_mask must.*get_fdata"),
    "NaN in mask": (
        {"moving_mask": np.full((20,) * 3, np.nan)},
        "moving_mask contains",
    ),
    "name as start": ({"starting_affine": "a.txt"}, "starting_affine.*numpy.loadtxt"),
    "map as start": ({"starting_affine": MAP}, "starting_affine.*take its affine"),
    "step as pipeline": ({"pipeline": "affine"}, "pipeline must be a list"),
    "number as pipeline": ({"pipeline": 3}, "pipeline must be a list"),
}
SYN = {
    **DROP_IN,
    "name as prealign": ({"prealign": "a.txt"}, "prealign must.*numpy.loadtxt"),
    "map as prealign": ({"prealign": MAP}, "prealign must.*take its affine"),
    "too large": ({"static": IMAGE * 1e300}, "static image.*single precision"),
    "too small": ({"moving": IMAGE * 1e-300}, "moving image.*single precision"),
}
GRIDS = {"static_grid2world": EYE, "moving_grid2world": EYE}


@pytest.fixture(autouse=True)
def no_parties(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a party was started")

    monkeypatch.setattr(local, "run_locally", refuse)


def refused(words, function, *args, **options):
    with pytest.raises(ValueError, match=words) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", AFFINE)
def test_affine_registration(name):
    change, words = AFFINE[name]
    good = {"static": IMAGE, "moving": IMAGE, "static_affine": EYE}
    refused(words, affine_registration, **{**good, "moving_affine": EYE, **change})


@pytest.mark.parametrize("name", SYN)
def test_syn_registration(name):
    change, words = SYN[name]
    good = {"static": IMAGE, "moving": IMAGE, "static_affine": EYE}
    refused(words, syn_registration, **{**good, "moving_affine": EYE, **change})


@pytest.mark.parametrize("name", RUN)
def test_classes_made_of_what_they_cannot_use(name):
    change, words = RUN[name]
    refused(words, SecureAffineRegistration, **change)
    refused(
        words, SecureSymmetricDiffeomorphicRegistration, SecureCCMetric(3), **change
    )


@pytest.mark.parametrize("metric", [SecureMutualInformationMetric, "MI"])
def test_metrics_that_are_none(metric):
    words = "metric must be a SecureMutualInformationMetric or .*, got .*make one"
    refused(words, SecureAffineRegistration, metric=metric)


@pytest.mark.parametrize("metric", [SecureCCMetric, "CC"])
def test_local_metrics_that_are_none(metric):
    words = "metric must be a SecureCCMetric or .*, got .*make one"
    refused(words, SecureSymmetricDiffeomorphicRegistration, metric)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transform": AffineTransform3D}, "transform must.*class Affine.*Transform3D"),
        ({"transform": "affine"}, "transform must be a Transform, got the text"),
        ({"transform": regtransforms["AFFINE", 2]}, "images of 2 dimensions.*have 3"),
        ({"params0": [1, 2]}, "params0 must be 12 finite numbers"),
        ({"params0": "identity"}, "params0 must hold numbers"),
        ({"static": "s.nii"}, "static image must hold numbers, got the text.*nibabel"),
        ({"moving": NIFTI}, "moving image must hold numbers.*Nifti1Image.*get_fdata"),
        ({"static_mask": "m.nii"}, "static_mask must.*nibabel"),
        ({"moving_grid2world": "a.txt"}, "moving_grid2world must.*numpy.loadtxt"),
        *IMAGES.values(),
    ],
)
def test_the_affine_class(change, words):
    registration = SecureAffineRegistration()
    good = {"transform": AffineTransform3D(), "params0": None, **GRIDS}
    good.update(static=IMAGE, moving=IMAGE)
    refused(words, registration.optimize, **{**good, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"static": "s.nii"}, "static image must hold numbers, got the text.*nibabel"),
        ({"prealign": "a.txt"}, "prealign must.*numpy.loadtxt"),
        *IMAGES.values(),
    ],
)
def test_the_diffeomorphic_class(change, words):
    registration = SecureSymmetricDiffeomorphicRegistration(SecureCCMetric(3))
    good = {"static": IMAGE, "moving": IMAGE, **GRIDS}
    refused(words, registration.optimize, **{**good, **change})


# -- what is taken -----------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (IMAGE.astype(np.float16), "f4"),
        (IMAGE.astype(np.longdouble), "f8"),
        (IMAGE.astype(">f4"), "f4"),
        (IMAGE.astype(">i2"), "i2"),
        (IMAGE > 0.5, "u1"),
        (IMAGE.astype(np.uint64), "u8"),
        (np.ma.MaskedArray(IMAGE), "f8"),
        (IMAGE[0].view(np.matrix), "f8"),
        (IMAGE.tolist(), "f8"),
    ],
)
def test_kinds_of_numbers(given, kind):
    """Of any kind and order; half of single precision would overflow in sums."""
    taken = image_array(given, "static")
    assert type(taken) is np.ndarray
    assert taken.dtype == np.dtype(kind) and taken.dtype.isnative
    assert (taken == np.asarray(given)).all()
    assert (mask_array(given, "static") == taken).all()


def test_images_of_nibabel_and_files(tmp_path):
    for kind, ending in ((nib.Nifti1Image, "nii"), (nib.Nifti2Image, "nii.gz")):
        path = tmp_path / f"image [1].{ending}"
        nib.save(kind(IMAGE.astype(np.float32), 2 * EYE - np.diag([0, 0, 0, 1])), path)
        for given in (str(path), path, nib.load(path)):
            image, affine = read_image(given, None, "static")
            assert (image == IMAGE.astype(np.float32)).all()
            assert (affine == np.diag([2, 2, 2, 1])).all()
        assert (read_image(path, EYE, "static")[1] == EYE).all()
    other = nib.MGHImage(IMAGE.astype(np.float32), EYE)
    assert read_image(other, None, "moving")[0].shape == IMAGE.shape


def test_files_that_are_no_images(tmp_path):
    path = tmp_path / "x.dcm"
    path.write_bytes(bytes(300))
    refused("static image .*x.dcm.*dcm2niix", read_image, path, None, "static")
    kind = [("R", "u1"), ("G", "u1"), ("B", "u1")]
    series = nib.Nifti1Image(np.zeros((4, 4, 4, 2)), EYE)
    refused("4 dimensions.*choose one volume", read_image, series, None, "static")
    colours = nib.Nifti1Image(np.zeros((8, 8, 8), dtype=kind), EYE)
    refused("moving image must hold real", read_image, colours, None, "moving")
