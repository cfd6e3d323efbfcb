"""The command ``dipy_ppir_template``: a template of images at three or more sites."""

import argparse
from contextlib import contextmanager
from datetime import datetime, timezone
import glob
import logging
from pathlib import Path

from dipy.io.image import save_nifti
import numpy as np

from dipy_ppir.align.checkpoint import digest
from dipy_ppir.align.facts import OwnFiles
from dipy_ppir.align.parameters import ParameterError
from dipy_ppir.align.template import (
    FARTHEST,
    MOST_IMAGES,
    TemplateParameters,
    build_template,
    check_thickness,
    maps_to_template,
)
from dipy_ppir.align.validation import check_image
from dipy_ppir.mpc.errors import (
    PeerAbortedError,
    PeerLostError,
    PeerTimeoutError,
    SessionFileError,
)
from dipy_ppir.mpc.identity import DEFAULT_HOME, Identity, home
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.planfile import PlanFile
from dipy_ppir.mpc.sessionfile import parse_address
from dipy_ppir.mpc.sums import SumSession
from dipy_ppir.workflows.counts import CountFile
from dipy_ppir.workflows.inputs import InputError, explain, read_nifti
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.progress import Countdown
from dipy_ppir.workflows.remote import finish, write_receipt
from dipy_ppir.workflows.results import save_transform
from dipy_ppir.workflows.sites import log_to_stderr
from dipy_ppir.workflows.streams import QUIET, be_quiet, say

logger = logging.getLogger("dipy_ppir")

#: Beside the key: which images were in which templates.
FILE = "templates.json"
TEMPLATE, RECEIPT = "template.nii.gz", "receipt.json"
#: What is written of each image, in files whose names begin with the image's.
IMAGE_FILES = {
    "affine.txt": "the affine transform that the map begins with",
    "displacement_field.nii.gz": "the map to the template",
}
#: What is there while a template is being built, to go on from after an interruption.
UNFINISHED = "template_unfinished.nii.gz"
PLAN = """\
# Plan of dipy_ppir_template: the same at all sites, of which there are three or more.
title = "T1 template, study 1"
operation = "template"

# One table for each site. The fingerprint comes from dipy_ppir_keygen there; compare it
# by telephone. One site may have no address: it dials all others.
[[sites]]
name = "Hospital A"
fingerprint = "..."
address = "template.hospital-a.example:7433"

[[sites]]
name = "Hospital B"
fingerprint = "..."
address = "template.hospital-b.example:7433"

[[sites]]
name = "University C"
fingerprint = "..."

[parameters]
iterations = 4                # sums of all images, and of displacements to them
shape = [96, 114, 96]         # of the template; leave out both with --initial
voxel_size = 2.0              # mm
intensity_bits = 10           # of each voxel of an image
spacing = 3                   # displacements are added up at every 3rd voxel,
precision = 0.0625            # to a 16th of a voxel
level_iters = [10, 10, 5]     # of SyN, at each site by itself

[timeouts]                    # seconds
connect = 900                 # to wait for the others
silence = 86_400              # while they register their images; who ends is noticed
"""


def template_parser():
    """The arguments of ``dipy_ppir_template``."""
    parser = argparse.ArgumentParser(
        prog="dipy_ppir_template",
        description="Build a template of images that lie at three or more sites, of "
        "which nothing but sums over all of them is shown. Every site runs this with "
        "its own images. "
        "'dipy_ppir_template new' prints a plan to fill in, 'dipy_ppir_template check "
        "PLAN' says in plain words who takes part and who will learn what.",
    )
    parser.add_argument(
        "plan", metavar="PLAN", help="the plan (TOML), alike at all sites"
    )
    parser.add_argument("file", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="this site's images (NIfTI), or patterns in quotes: 'sub-*_T1w.nii.gz'",
    )
    parser.add_argument(
        "--initial",
        type=Path,
        metavar="FILE",
        help="a template to start from (NIfTI), the same file at all sites",
    )
    parser.add_argument(
        "--out_dir", type=Path, default=Path("."), help="folder for the results"
    )
    parser.add_argument(
        "--identity", help=f"folder of this site's key ({DEFAULT_HOME})", default=None
    )
    parser.add_argument(
        "--listen",
        help="host:port to listen on (by default all addresses of this machine, at "
        "the port in the plan)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="images registered at the same time (1)"
    )
    parser.add_argument(
        "--no_maps",
        action="store_true",
        help="do not register the images to the finished template, nor write the maps",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace files that are there already"
    )
    parser.add_argument(
        "--log_level", default="INFO", help="least important messages shown (INFO)"
    )
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    parser.add_argument(
        "--debug", action="store_true", help="on an error show where it occurred"
    )
    return parser


def template(arguments=None):
    """``dipy_ppir_template``: build a template, or write or explain a plan of one."""
    parser = template_parser()
    given = parser.parse_args(arguments)
    be_quiet(given.quiet)
    if given.plan == "new" and given.file is None:
        print(PLAN, end="")
    elif given.plan == "check" and given.file is None:
        parser.error(
            "check lacks the plan that it is to explain: dipy_ppir_template check PLAN"
        )
    elif given.plan == "check":
        say(explained(*read(given.file)))
    elif given.file is not None:
        raise InputError(
            f"{given.file} is one file too many; images follow --images, and the words "
            "before a plan are new or check"
        )
    else:
        _build(given)


def read(path):
    """A plan of a template, and the parameters that it asks for.

    Returns
    -------
    plan : PlanFile
    parameters : TemplateParameters

    Raises
    ------
    SessionFileError
        if it asks for something impossible.
    """
    plan = PlanFile.read(path)
    if plan.operation != "template":
        raise SessionFileError(
            f"operation = {plan.operation!r} is not known to dipy_ppir_template; sites "
            'that add up build a "template"'
        )
    try:
        parameters = TemplateParameters(**plan.arguments)
    except ParameterError as exc:
        raise SessionFileError(f"the parameters cannot be used: {exc}") from None
    if parameters.dim != 3:
        raise SessionFileError(
            "dim = 2 is for dipy_ppir.align.build_template from Python; the command "
            "reads NIfTI images of 3 dimensions"
        )
    return plan, parameters


# -- in plain words ----------------------------------------------------------


def explained(plan, parameters):
    """What a plan says, for people who answer for the data."""
    lines = ["Who takes part", "--------------"]
    for pid, party in plan.parties.items():
        dialled = [plan.parties[p].name for p in plan.dials(pid)]
        by = "is dialled by the others"
        if dialled:
            by = f"dials {', '.join(dialled)}"
        lines += [
            f"T{party.title[1:]}, at {party.endpoint}, {by}.",
            f"    certificate SHA-256 {party.fingerprint}",
        ]
    shape = parameters.shape
    begins = "a template that all sites have (--initial)"
    if shape is not None:
        begins = (
            "the mean of all images with their centres of mass in the middle of "
            f"{' x '.join(map(str, shape))} voxels of {parameters.voxel_size:g} mm"
        )
    lines += [
        "",
        "What is computed",
        "----------------",
        f"A template, in {parameters.iterations} iterations, from {begins}. In each, "
        "every site registers its own images to the template, by itself.",
    ]
    lines += [f"    {name} = {value}" for name, value in parameters.plain().items()]
    sums = parameters.iterations + (shape is not None)
    lines += [
        "",
        "What each site learns",
        "---------------------",
        "How many images all sites have together, once.",
        f"The sum of all sites' images over the template, {sums} times, with "
        f"{parameters.intensity_bits} bits for each voxel of an image.",
        "The sum of the displacements from the template to all sites' images, "
        f"{parameters.iterations} times, at every {parameters.spacing} voxels, to "
        f"{parameters.precision:g} voxel, up to {FARTHEST} voxels.",
        "How long each site takes from one sum to the next, which shows about how many "
        "images it has.",
        "Nothing else: no site's own image or displacement.",
        "",
        "That is so while all sites follow the program. One that does not can choose "
        "part of the template of the next iteration, and steer the rest: so choose how "
        "the others' images lie in the next sum, though not whose are added. Look at "
        "the initial template, if there is one, and at the finished one.",
        "",
        f"With {len(plan.parties)} sites, {len(plan.parties) - 1} that pool what they "
        "hold know what the last one added. Each site knows the sum of the others, and "
        "where they have one image together, knows that image.",
        "CAUTION: a site or an image that is in one run and not in the next is what "
        "the two sums differ by. Decide before the first run who takes part.",
        "",
        f"Each site waits {plan.timeouts['connect']:g} s for the others to come, and "
        f"gives up on one that is silent for {plan.timeouts['silence']:g} s.",
        f"Hash of this plan: {plan.digest}; the same everywhere.",
    ]
    return "\n".join(lines)


# -- the images --------------------------------------------------------------


def files_of(patterns):
    """Files that a user named, sorted, each once.

    Raises
    ------
    InputError
        if there are none, too many, or two of one name.
    """
    found = {}
    for pattern in patterns:
        named = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not named:
            raise InputError(f"--images {pattern} names no file; check the pattern")
        for file in map(Path, named):
            stem = file.name.removesuffix(".gz").removesuffix(".nii")
            if found.setdefault(stem, file).resolve() != file.resolve():
                raise InputError(
                    f"{found[stem]} and {file} would be written to the same files; "
                    "rename one"
                )
    if not found:
        raise InputError("give this site's images with --images, one or more")
    if len(found) > MOST_IMAGES:
        raise InputError(f"{len(found)} images are too many, at most {MOST_IMAGES}")
    return dict(sorted(found.items()))


def load(path, what="image"):
    """One image and its affine."""
    data, grid2world = read_nifti(path, f"the {what}")
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(
            f"the {what} {path} has {data.ndim} dimensions, 3 are needed; choose a "
            "volume first"
        )
    explain(check_thickness, data, f"the {what} {path}")
    explain(check_image, data, grid2world, Path(path).name)
    return data.astype(np.float32), grid2world


class Runs:
    """Which of this site's images were in which templates: its own count.

    Parameters
    ----------
    folder : str or Path
        of the site's key.
    images : dict
        names to arrays.

    Raises
    ------
    InputError
        if the file cannot be read, or an image is there twice.
    """

    def __init__(self, folder, images):
        self._counts = CountFile(
            Path(folder) / FILE, [], _is_runs, "the templates that your images are in"
        )
        self._now = {}
        for name, image in images.items():
            key = digest(image)
            if key in self._now:
                raise InputError(
                    f"{self._now[key]} and {name} are the same image; give it once"
                )
            self._now[key] = name

    def warnings(self):
        """What is to be said of earlier runs with some of these images."""
        return self._said(self._counts.read())

    def _said(self, runs):
        said, now = [], set(self._now)
        for run in runs:
            before = set(run["images"])
            if not before & now or before == now:
                continue
            said.append(
                f"On {run.get('date')} a template was built with some of these images, "
                "but not with the same: whoever has both templates can subtract the "
                "sums, and what is left is of the images by which they differ "
                "(doc/security.md)."
            )
        again = sum(set(run["images"]) == now for run in runs)
        if again:
            built = "A template was" if again == 1 else f"{again} templates were"
            said.append(
                f"{built} built with the same images before: if another site's have "
                "changed since, the sums show by how much."
            )
        return said

    def enter(self, plan):
        """Count a run that begins.

        Returns
        -------
        warnings : list of str
            as `warnings`, of what is counted by now.
        """
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        with self._counts.alone():
            runs = self._counts.read()
            run = {"date": date, "plan": plan, "images": [*self._now]}
            self._counts.write([*runs, run])
        return self._said(runs)


def _is_runs(runs):
    return all(
        isinstance(run, dict)
        and isinstance(run.get("images"), list)
        and all(isinstance(key, str) for key in run["images"])
        for run in runs
    )


# -- building ----------------------------------------------------------------


def _build(given):
    log_to_stderr(given.log_level)
    plan, parameters = read(given.plan)
    identity = Identity.load(given.identity)
    party = plan.party_of(identity.fingerprint)
    if given.jobs < 1:
        raise InputError(f"--jobs {given.jobs} must be 1 or more")
    listen = None
    if given.listen:
        listen = parse_address(given.listen)
        if listen is None:
            raise InputError(
                f"--listen {given.listen} must be host:port, for example 0.0.0.0:7433"
            )
    if (given.initial is None) == (parameters.shape is None):
        raise InputError(
            "give --initial, or shape and voxel_size in [parameters] of the plan, and "
            "not both"
        )
    sources = files_of(given.images)
    images = {name: load(file) for name, file in sources.items()}
    initial = (None, None)
    if given.initial is not None:
        initial = load(given.initial, "initial template")
    runs = Runs(home(given.identity), {n: data for n, (data, _) in images.items()})
    concerns = runs.warnings()
    for concern in concerns:
        logger.warning("%s", concern)
    files = {
        "template": given.out_dir / TEMPLATE,
        "receipt": given.out_dir / RECEIPT,
    }
    maps = {}
    if not given.no_maps:
        for name in images:
            affine, field = (given.out_dir / f"{name}_{file}" for file in IMAGE_FILES)
            files[f"{name} affine"], files[f"{name} map"] = affine, field
            maps[name] = field
    read_files = [given.plan, *sources.values()]
    read_files += [given.initial] if given.initial else []
    # By number: names of files may be names of people.
    own = {f"image {n}": file for n, file in enumerate(sources.values(), 1)}
    for name, file in own.items():
        logger.info("%s is %s", name.capitalize(), file)
    own = OwnFiles({**own, "initial template": given.initial})
    unfinished = given.out_dir / UNFINISHED
    data, affines = zip(*images.values(), strict=True)
    with (
        new_folders(files.values()),
        OutputFiles(
            [*files.values(), unfinished], read_files, force=given.force
        ) as out,
    ):
        logger.info("This is %s; hash of the plan %s", party.title, plan.digest)
        meeting = Meeting(plan, identity, listen=listen)
        with Countdown() as meeting.on_wait:
            meeting.hold()
        with SumSession.of_meeting(meeting) as session:
            # Other runs at this site may have begun while this one waited.
            concerns, early = runs.enter(plan.digest), concerns
            for concern in concerns:
                if concern not in early:
                    logger.warning("%s", concern)
            tell = _Teller(parameters, out, unfinished)
            with tell.saying_how_to_go_on():
                found, receipt = build_template(
                    data,
                    affines,
                    session=session,
                    initial=initial[0],
                    initial_affine=initial[1],
                    jobs=given.jobs,
                    callback=tell,
                    ret_receipt=True,
                    **session.parameters,
                )
            receipt["warnings"] = [*concerns, *receipt["warnings"]]
            own.enter(receipt)
            _save(out.temporary(files["template"]), found)
            write_receipt(out, files["receipt"], receipt)
        # The maps are this site's own business, and the others need not wait.
        out.commit()
        unfinished.unlink(missing_ok=True)
        made = maps_to_template(
            data, affines, found, jobs=given.jobs, **parameters.plain()
        )
        for name, (affine, mapping) in zip(maps, made, strict=False):
            save_transform(out.temporary(files[f"{name} affine"]), affine)
            save_transform(out.temporary(maps[name]), mapping)
            logger.info("Map of %s to the template found", name)
        finish(out, receipt, files)


class _Teller:
    """Tells how far a site has come, and keeps the template of the moment."""

    def __init__(self, parameters, out, unfinished):
        self._iterations = parameters.iterations
        self._out, self._unfinished = out, unfinished
        #: Iterations whose template is kept.
        self._done = 0

    def __call__(self, info):
        number = f"Iteration {info['iteration'] + 1} of {self._iterations}"
        if "template" in info:
            _save(self._out.temporary(self._unfinished), info["template"])
            self._out.commit(self._unfinished)
            self._done = info["iteration"] + 1
            logger.info("%s: template made", number)
        else:
            logger.info("%s: %d of %d images", number, info["images"], info["of"])

    @contextmanager
    def saying_how_to_go_on(self):
        """Add to the error of a lost site what there is to go on from."""
        try:
            yield
        except (PeerLostError, PeerTimeoutError, PeerAbortedError) as exc:
            if self._done:
                exc.args = (
                    f"{exc}; to go on from iteration {self._done} of "
                    f"{self._iterations}, move {self._unfinished} away, send one "
                    "site's to all, take shape and voxel_size out of the plan, lower "
                    "iterations, and start with --initial and its new name",
                )
            raise


def _save(path, found):
    save_nifti(path, found.image.astype(np.float32), found.grid2world)
