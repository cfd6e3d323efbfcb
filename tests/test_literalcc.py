"""Cross-correlation by MPyC literally, against the packed kernels."""

import numpy as np
import pytest
from test_crosscorr import pair

from dipy_ppir.align import RemoteImage
from dipy_ppir.align.metrics import SecureCCMetric, image_half
from dipy_ppir.mpc.crosscorr import ENERGY_BITS, UNIT_BITS, LocalCrossCorrelation
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC
from dipy_ppir.mpc.literalcc import LiteralCrossCorrelation


@pytest.mark.parametrize(
    "shape, radius, stride", [((14, 16), 2, 1), ((13, 15), 1, 2), ((8, 7, 9), 1, 1)]
)
def test_the_same_forces(three, shape, radius, stride):
    static, moving = pair(shape)

    def run(session):
        found = []
        for kind in (LocalCrossCorrelation, LiteralCrossCorrelation):
            session.new_run()
            correlation = kind(session, shape, radius, reveal="force", stride=stride)
            image = {STATIC: static, MOVING: moving}.get(session.pid)
            offset, half = (1,) * len(shape) if stride > 1 else None, None
            if image is not None:
                half = image_half(image, correlation, offset or (0,) * len(shape))
            step = correlation.step(half, offset)
            found.append((*step, session.ledger.learned()))
        return found

    out = three(run)
    for pid in (MOVING, STATIC):
        (fast, energy, learned), (slow, exact, same) = out[pid]
        # Each rounds rho, and what is opened, to a unit; the fast one blurs it.
        assert np.abs(fast - slow).max() <= 4 * 2.0**-UNIT_BITS
        assert np.abs(fast).max() > 0.05
        voxels = fast.size
        assert abs(energy - exact) < voxels * (2.0**-16 + 2.0**-ENERGY_BITS * 2)
        for role in ROLES.values():
            labels = [[e["label"] for e in x[role]] for x in (learned, same)]
            assert labels[0] == labels[1]


def test_too_many_voxels_are_refused():
    with pytest.raises(FixedPointOverflowError, match="hours"):
        LiteralCrossCorrelation(None, (200, 200), 4, reveal="force")


def test_arguments():
    metric = SecureCCMetric(2, reveal="force", backend="mpyc")
    assert metric.config()["backend"] == "mpyc"
    with pytest.raises(ValueError, match="backend must be one of"):
        SecureCCMetric(2, reveal="force", backend="gpu")
    for reveal in ("map", "update", "paper"):
        with pytest.raises(ValueError, match='backend="mpyc" needs reveal="force"'):
            SecureCCMetric(2, reveal=reveal, backend="mpyc")


def test_one_step_of_the_metric(three):
    static, moving = pair((12, 13))

    def run(session):
        metrics = [
            SecureCCMetric(2, radius=2, reveal="force", session=session, backend=b)
            for b in ("packed", "mpyc")
        ]
        steps = []
        for metric in metrics:
            metric.set_static_image(
                static if session.pid == STATIC else RemoteImage(static.shape),
                *(None,) * 3,
            )
            metric.set_moving_image(
                moving if session.pid == MOVING else RemoteImage(moving.shape),
                *(None,) * 3,
            )
            metric.initialize_iteration()
            if session.pid == STATIC:
                steps.append(metric.compute_forward())
        return steps

    fast, slow = three(run)[STATIC]
    assert np.abs(fast).max() > 1e-3
    assert np.abs(fast - slow).max() < 1e-5
