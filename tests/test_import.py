"""What importing the package and loading MPyC leave alone."""

import asyncio
import json
import subprocess
import sys
import threading

import pytest

from dipy_ppir.mpc import mpyc_bridge
from dipy_ppir.mpc.fields import P61
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.protocols import share

PROBE = """
import asyncio, json, logging, os, sys, threading, warnings

def state():
    root = logging.getLogger()
    return {
        "argv": list(sys.argv),
        "handlers": [type(h).__name__ for h in root.handlers],
        "level": root.level,
        "disabled": logging.root.manager.disable,
        "policy": type(asyncio.events._event_loop_policy).__name__,
        "environ": dict(os.environ),
        "mpyc": sorted(m for m in sys.modules if m.split(".")[0] == "mpyc"),
        "path": list(sys.path),
        "filters": len(warnings.filters),
        "threads": threading.active_count(),
        "excepthook": sys.excepthook is sys.__excepthook__,
        "stdout": sys.stdout is sys.__stdout__,
    }

PREPARE
import dipy, dipy.align.imaffine, scipy, numpy, cryptography
before = state()
import dipy_ppir, dipy_ppir.align, dipy_ppir.align.imaffine
from dipy_ppir.mpc import contingency, local, logarithm, mpyc_bridge, party, session
imported = state()
mpyc_bridge.load()
mpyc_bridge.load()
loaded = state()
print(json.dumps([before, imported, loaded]))
"""

ARGUMENTS = [
    ["--help"],
    ["-h", "--version", "-M3", "-I0"],
    ["-M", "99", "--ssl", "-T", "7", "--no-such-option"],
    ["-P", "nowhere:1", "-C", "missing.ini"],
    ["\u00e4 \n", "", "--mix32-64bit", "-H"],
]
# The first that MPyC would not like shows that it has read any.
ARGUMENTS = [
    [x for arguments in ARGUMENTS[::-1] for x in arguments],
    *(pytest.param(x, marks=pytest.mark.heavy) for x in ARGUMENTS),
]


def run(code, *arguments, flags=("-W", "error"), **options):
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,  # what hangs, not what is slow
        **options,
    )


def probe(*arguments, prepare="", flags=("-W", "error")):
    result = run(PROBE.replace("PREPARE", prepare), *arguments, flags=flags)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: a[0].strip() or "blank")
def test_importing_changes_nothing(arguments):
    (before, imported, loaded), result = probe(*arguments)
    assert before["argv"][1:] == arguments
    assert imported == before
    assert loaded == before
    assert before["mpyc"] == []
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1


def test_a_configured_program_keeps_its_configuration():
    prepare = (
        "logging.basicConfig(level=logging.ERROR)\n"
        "class Policy(asyncio.DefaultEventLoopPolicy): pass\n"
        "asyncio.set_event_loop_policy(Policy())\n"
        "os.environ['READTHEDOCS'] = 'mine'\n"
    )
    (before, imported, loaded), _ = probe(prepare=prepare)
    assert before["handlers"] == ["StreamHandler"]
    assert before["policy"] == "Policy"
    assert before["environ"]["READTHEDOCS"] == "mine"
    assert imported == loaded == before


def test_the_callers_own_mpyc_is_left_alone():
    prepare = (
        "sys.argv = ['x']\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('ignore')\n"
        "    import mpyc.runtime\n"
        "theirs = mpyc.runtime\n"
    )
    code = PROBE.replace("PREPARE", prepare) + (
        "assert sys.modules['mpyc.runtime'] is theirs\n"
        "assert mpyc_bridge.load().runtime is not theirs\n"
        "import pickle\n"
        "assert theirs.pickle is pickle\n"
        "assert theirs.mpc is not None\n"
        "print('fine')\n"
    )
    result = run(code)
    assert result.stdout.splitlines()[-1:] == ["fine"], result.stderr


def test_optimized_python_still_refuses_threshold_zero():
    """MPyC's own guard is an assert, gone under -O; ours must not be."""
    code = (
        "from dipy_ppir.mpc.session import check_setup\n"
        "for m, t in ((3, 0), (2, 0), (2, 1), (4, 1), (3, 2)):\n"
        "    try:\n"
        "        check_setup(m, t)\n"
        "    except ValueError:\n"
        "        print('refused')\n"
    )
    assert run(code, flags=("-O",)).stdout == "refused\n" * 5


def compute(session):
    a = share(session, MOVING, [1.0, 2.0, 3.0], (3,), bound=4)

    async def square(mpc):
        x = mpyc_bridge.to_mpyc(a)
        return await mpyc_bridge.from_mpyc(mpc, x * x, P61, bound=16)

    return session.open(mpyc_bridge.run(session, square), "test-any", (MOVING,))


def test_inside_a_running_event_loop(three):
    """As in a notebook, where the caller's loop is running."""

    async def cell():
        loop = asyncio.get_running_loop()
        result = three(compute)[MOVING]
        assert asyncio.get_running_loop() is loop
        await asyncio.sleep(0)
        return result

    assert asyncio.run(cell()).tolist() == [1, 4, 9]


def test_in_a_thread(three):
    box = []
    thread = threading.Thread(target=lambda: box.append(three(compute)[MOVING]))
    thread.start()
    thread.join()
    assert box[0].tolist() == [1, 4, 9]


def test_two_at_once(three):
    """Each session has a runtime of its own."""
    box = []
    threads = [
        threading.Thread(target=lambda: box.append(three(compute)[MOVING].tolist()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert box == [[1, 4, 9]] * 4


NOTEBOOK = """
import asyncio, sys
import numpy as np

async def cell():
    from scipy.ndimage import gaussian_filter
    from dipy.align.transforms import regtransforms
    from dipy_ppir.align.imaffine import SecureMutualInformationMetric
    rng = np.random.default_rng(0)
    image = gaussian_filter(rng.random((12, 13)), 1)
    metric = SecureMutualInformationMetric(nbins=8, reveal="gradient")
    metric.setup(regtransforms["TRANSLATION", 2], image, image)
    value, gradient = metric.distance_and_gradient(np.zeros(2))
    assert value < -0.1, value
    print("fine", len(gradient))

asyncio.run(cell())
"""


def test_loopback_parties_inside_an_event_loop_under_warnings_as_errors():
    """Started from a process with strange arguments; nothing printed but ours."""
    result = run(NOTEBOOK, "--help", "-M7")
    assert result.stdout == "fine 2\n", result.stderr
    assert result.stderr == ""
    assert result.returncode == 0
