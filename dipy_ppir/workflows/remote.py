"""A command as one party of a session between sites."""

from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
import inspect
import json
import logging
from pathlib import Path

from dipy.align.imaffine import AffineMap
from dipy.io.image import save_nifti, save_qa_metric
import numpy as np

from dipy_ppir.align import plausibility
from dipy_ppir.align._public import planned_bits, registration_of
from dipy_ppir.align.alone import told
from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.align.estimate import USUAL, estimate
from dipy_ppir.align.facts import OwnFiles
from dipy_ppir.align.memory import check_memory, check_voxels
from dipy_ppir.align.remote import WORD
from dipy_ppir.align.validation import check_slices
from dipy_ppir.mpc.dealt import deal_for, open_deal
from dipy_ppir.mpc.errors import MPCError
from dipy_ppir.mpc.identity import Identity, home
from dipy_ppir.mpc.ledger import MOVING, ROLES
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.receipt import receipt_text
from dipy_ppir.mpc.session import Session
from dipy_ppir.mpc.sessionfile import parse_address
from dipy_ppir.workflows import figures, inputs, report
from dipy_ppir.workflows.course import Course
from dipy_ppir.workflows.flow import short_name
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.openings import LIMIT, Openings
from dipy_ppir.workflows.operations import OPERATIONS, check_described, read
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.progress import (
    Countdown,
    deformation_callback,
    display,
    estimate_text,
)
from dipy_ppir.workflows.results import (
    grids_in,
    save_inverse,
    save_itk,
    save_transform,
)
from dipy_ppir.workflows.streams import say

logger = logging.getLogger("dipy_ppir")


class _Declined(Exception):
    """This party cannot take part."""


class Site:
    """This party as a session file describes it, before it connects.

    Parameters
    ----------
    path : str or Path
        the session file.
    identity : str or Path, optional
        folder of this party's key.
    listen : str, optional
        ``host:port`` to listen on; by default all addresses of this machine, at the
        port that others dial.
    agreed : tuple, optional
        what `operations.read` returned, if the file was read already.

    Attributes
    ----------
    plan : SessionFile
    party : Party
        this party.
    operation : Operation
    parameters : AffineParameters or SynParameters
        of the registration.
    """

    def __init__(self, path, identity=None, listen=None, agreed=None):
        self.path = Path(path)
        self.plan, self.operation, self.parameters = agreed or read(path)
        self.identity = identity or None
        self._identity = Identity.load(self.identity)
        self.party = self.plan.party_of(self._identity.fingerprint)
        self._listen, self._opened = None, False
        if listen:
            self._listen = parse_address(listen)
            if self._listen is None:
                raise InputError(
                    f"--listen {listen} must be host:port, for example 0.0.0.0:7433"
                )

    @property
    def gets_result(self):
        """Whether this owner gets the transform."""
        return self.plan.result_to in ("both", self.image)

    @property
    def image(self):
        """Name of the image that this owner has."""
        return "moving" if self.party.pid == MOVING else "static"

    def check_owner(self, operation, files):
        """Refuse a command that does not fit this party's part in the session.

        Where the helper dealt ahead, also a deal that cannot be used.

        Parameters
        ----------
        operation : str
            of the command.
        files : dict
            maps "static" and "moving" to what was given for them.
        """
        if self.plan.operation != operation:
            raise InputError(
                f"the session file is for operation {self.plan.operation!r}; run "
                f"{OPERATIONS[self.plan.operation].command}"
            )
        if self.party.pid not in (0, 1):
            raise InputError(
                "this party's certificate is the helper's, which has no "
                f"{self.operation.data}; run dipy_ppir_helper {self.path}"
            )
        other = "static" if self.image == "moving" else "moving"
        if files[other] != WORD or files[self.image] == WORD:
            order = {self.image: self.operation.example, other: WORD}
            raise InputError(
                f"this party's certificate is the {ROLES[self.party.pid]}'s; run "
                f"{self.operation.command} {order['static']} {order['moving']} "
                f"--session {self.path}, or give the folder of another key with "
                "--identity"
            )
        if self.plan.helper == "ahead":
            self._open_deal().close()

    def open(self):
        """Wait for the other parties; returns the session."""
        logger.info(
            "This is %s of %r; hash of the session file %s",
            self.party.title,
            self.plan.title,
            self.plan.digest,
        )
        self._opened = True
        meeting = Meeting(self.plan, self._identity, listen=self._listen)
        with ExitStack() as stack:
            dealt = {}
            if self.plan.helper == "ahead":
                dealt["deal"] = stack.enter_context(closing(self._open_deal()))
            with Countdown() as meeting.on_wait:
                meeting.hold()
            session = Session.of_meeting(meeting, **dealt)
            stack.pop_all()
        return session

    def _open_deal(self):
        """What the helper dealt for this owner; see `open_deal`."""
        return open_deal(self.plan, self._identity, self.path, self.identity)

    def deal(self, paths):
        """The session in which this helper deals ahead; see `deal_for`."""
        said = told(self.plan, self.parameters)
        return deal_for(self.plan, self._identity, paths, said)

    @contextmanager
    def declining(self):
        """Tell the others of an error before the meeting, in a row of sessions.

        They have come, or will come, and would wait in vain. Alone a session needs
        nobody to wait: it can be started again meanwhile.
        """
        try:
            yield
        except Exception as exc:
            if self.plan.place is not None and not self._opened:
                logger.info("Telling the others that this party cannot take part")
                with suppress(MPCError, _Declined), self.open():
                    raise _Declined from exc
            raise

    @inputs.explained()
    def run(self, checkpoint, write, met=lambda: None, **arguments):
        """Meet the others, register, and write what is this party's.

        The session ends when all have written: see `Session`.

        Parameters
        ----------
        checkpoint : Checkpoint or None
            None for an operation that keeps no state and tells of no progress.
        write : callable
            takes what the function returns, the receipt last, and writes it under
            temporary names.
        met : callable, optional
            called when the parties have met.
        **arguments
            of the operation.

        Returns
        -------
        receipt : dict
        """
        own = getattr(arguments.get(self.image), "shape", None)
        if own is not None:
            place = arguments.get(f"{self.image}_affine")
            check_described(self.plan, (self.party.pid,), own, place)
        if checkpoint is None:
            with self.open() as session:
                met()
                session.on_shapes = self._ahead
                *result, receipt = self.operation.function(
                    session=session, ret_receipt=True, **arguments
                )
                write(*result, receipt=receipt)
            return receipt
        needs = ", with a new deal" if self.plan.helper == "ahead" else ""
        steps, count = ["deformation"], len(self.parameters.level_iters)
        if self.plan.operation == "affine":
            steps = [s for s in self.parameters.pipeline if s != "center_of_mass"]
        with (
            checkpoint.hint(needs),
            self.open() as session,
            display(steps, count) as progress,
        ):
            met()
            session.on_shapes = partial(self._ahead, progress=progress)
            callback = course = Course(progress)
            if self.plan.operation != "affine":
                callback = deformation_callback(course)
            *result, receipt = self.operation.function(
                session=session,
                callback=callback,
                checkpoint=checkpoint,
                ret_receipt=True,
                **arguments,
            )
            course.enter(receipt)
            write(*result, receipt=receipt)
        return receipt

    def _ahead(self, static_shape, moving_shape, static_grid2world, progress=None):
        """Say what it will take, now that both shapes are known."""
        ahead = estimate(
            self.parameters,
            static_shape,
            moving_shape,
            static_grid2world=static_grid2world,
            alone=self.plan.alone,
        )
        logger.info("%s", estimate_text(ahead, USUAL))
        if progress is not None:
            progress.expect(ahead, line=True)

    def checkpoint(self, folder, resume):
        """Where this party keeps its state; None where there is none to keep."""
        if self.plan.operation == "points":
            if resume:
                raise InputError(
                    "points are registered in a moment, and nothing is kept that could "
                    "be resumed; leave out --resume, at all parties"
                )
            return None
        folder = Path(folder) / f"{self.path.stem}.{self.party.pid}.checkpoint"
        if not resume and folder.is_dir():
            logger.warning(
                "There is a checkpoint %s of an interrupted run; without --resume it "
                "is set aside as %s.old, for what this run's receipt does not count",
                folder,
                folder.name,
            )
        if resume and not folder.is_dir():
            logger.warning(
                "There is no checkpoint %s, as if the interrupted run had not begun; "
                "otherwise name its output folder",
                folder,
            )
        return Checkpoint(
            folder, resume=resume, interval=self.plan.timeouts["checkpoint"]
        )


def check_words(files, session, data="image", **others):
    """Refuse the word "remote" without a session file, and the reverse.

    `data` is what the files hold, for messages; `others` are flags that mean something
    in sessions only.
    """
    for flag, value in others.items():
        if value and not session:
            raise InputError(
                f"--{flag} is for a site of a session: leave it out, or give the "
                "session file with --session"
            )
    words = [name for name, file in files.items() if str(file) == WORD]
    if words and not session:
        raise InputError(
            f'the word "{WORD}" stands for the {data} of another site: give the '
            f"session file with --session, or the name of a file"
        )
    if session and len(words) != 1:
        raise InputError(
            f"with --session one file is this site's {data} and the other is "
            f'"{WORD}"; a helper, where there is one, runs dipy_ppir_helper'
        )


def check_flags(given, run):
    """Refuse flags that the session file settles.

    Parameters
    ----------
    given : dict
        flags to their values.
    run : callable
        whose defaults they have when left out.
    """
    defaults = inspect.signature(run).parameters
    for flag, value in given.items():
        default = defaults[flag].default
        same = value == default
        if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
            same = list(value) == list(default)
        if not same:
            raise InputError(
                f"--{flag} is settled by the session file; leave it out, or change the "
                "session file at all parties"
            )


def check_others(site, flags):
    """Refuse flags about the image of the other owner.

    Parameters
    ----------
    site : Site
    flags : dict
        maps flags to the image they are about and what was given.
    """
    for flag, (image, value) in flags.items():
        if value not in (None, "", False) and image != site.image:
            raise InputError(
                f"--{flag} belongs to the owner of the {image} image; leave it out"
            )


class _Count:
    """Counts what is opened about this owner's image, where that is limited."""

    def __init__(self, site, image, limit):
        self.count, self.planned = None, 0
        plan = site.plan
        on_shares = plan.operation == "affine" and plan.reveal == "transform"
        if site.image == "static" and on_shares:
            self.count = Openings(home(site.identity), image, limit)
            self.planned = planned_bits(site.parameters, image.ndim)
            self.count.check(self.planned)

    def begin(self):
        """The parties have met."""
        if self.count is not None:
            self.count.begin(self.planned)

    def end(self, receipt):
        """The session has come to its end."""
        if self.count is not None:
            self.count.end(self.planned, receipt, ROLES[MOVING])
            logger.info(
                "%s bits were opened about this image, or may have been, in all "
                "sessions so far",
                f"{self.count.bits:,.0f}",
            )


def register(
    site,
    path,
    volume,
    files,
    *,
    mask=None,
    start=None,
    resume=False,
    strict=False,
    force=False,
    limit_bits=LIMIT,
    pictures=(),
):
    """Register this owner's image with the other's, and write what is this owner's.

    Parameters
    ----------
    site : Site
    path : str or Path
        this owner's image.
    volume : str or None
        which volumes of a series.
    files : dict
        paths of "image" (at the moving owner), "transform", "receipt" and, if wanted,
        "inverse" and "itk"; of "quality", for where the session file asks for it; and,
        if wanted, of "report" and of each of `pictures`.
    mask, start : str or Path, optional
        this owner's mask; the prealign file.
    resume, strict, force : bool, optional
    limit_bits : float, optional
        most bits opened about the static image in all sessions; 0 for no limit.
    pictures : dict, optional
        names of pictures to their kinds, see `figures.save_map`.

    Returns
    -------
    receipt : dict
    """
    name, function = site.image, site.operation.function
    own = OwnFiles({f"{name} image": path, f"{name} mask": mask, "prealign": start})
    image, grid2world = inputs.load_volume(
        path, name, volume, function=function.__name__
    )
    concerns = inputs.of_header(path, name)
    plausibility.tell(concerns, strict=strict)
    _check_image(site, image)
    options = _own_arguments(site, image, grid2world, mask, start)
    if strict and _starts_at_mass(site):
        # What can be known before anything is shown to anybody.
        known = plausibility.of_center(image, name)
        known += plausibility.of_mask(
            image, options.get(name + "_mask"), grid2world, name
        )
        plausibility.tell(known, strict=True)
    files = {kind: files[kind] for kind in _wanted(site, files, pictures)}
    images = {"static": WORD, "moving": WORD, name: image}
    read = [path, *(f for f in (mask, start) if f)]
    with (
        new_folders(files.values()),
        OutputFiles(files.values(), read, force=force) as out,
    ):
        checkpoint = site.checkpoint(files["receipt"].parent, resume)

        found = {}

        def write(resampled, transform, *optimum, receipt):
            found.update(moved=resampled, transform=transform)
            receipt["warnings"] = [*concerns, *receipt["warnings"]]
            if "image" in files:
                place = np.array(receipt["static_grid2world"])
                save_nifti(out.temporary(files["image"]), resampled, place)
            if "transform" in files:
                save_transform(out.temporary(files["transform"]), transform)
            if "itk" in files:
                save_itk(out.temporary(files["itk"]), transform)
            if "inverse" in files:
                inverse = out.temporary(files["inverse"])
                save_inverse(inverse, transform, image, grids_in(receipt))
            if "quality" in files:
                save_qa_metric(out.temporary(files["quality"]), *optimum)
            own.enter(receipt)
            write_receipt(out, files["receipt"], receipt)

        count = _Count(site, image, limit_bits)
        receipt = site.run(
            checkpoint,
            write,
            count.begin,
            **images,
            **{name + "_affine": grid2world},
            **options,
        )
        count.end(receipt)
        checkpoint.discard()
        if strict and receipt["warnings"]:
            # What was learned stays on record; the others have their results.
            out.commit(files["receipt"])
            plausibility.tell(receipt["warnings"], strict=True)
        # The others are gone: what took hours does not wait for pictures.
        out.commit()
        start = options.get("prealign")
        own_image = _OwnImage(name, image, grid2world, start, **found)
        _draw(out, files, pictures, own_image, receipt, short_name(path))
        finish(out, receipt, files)
    return receipt


def _check_image(site, image):
    """Refuse an owner's image that the session cannot be for."""
    name, parameters = site.image, site.parameters
    inputs.explain(check_voxels, site.plan.limits, image.shape, name)
    # Of the other image nothing is known yet.
    shapes = {"static": None, "moving": None, name: image.shape}
    given = site.plan.limits, parameters, *shapes.values(), site.plan.alone
    inputs.explain(check_memory, *given)
    if _starts_at_mass(site):
        inputs.check_center(image, name)
    if site.plan.operation == "affine":
        if name == "moving":
            inputs.explain(check_slices, image)
    elif parameters.dim != image.ndim:
        raise InputError(
            f"the {name} image has {image.ndim} dimensions; put dim = {image.ndim} "
            "into [parameters] of the session file everywhere, or choose another image"
        )


def _starts_at_mass(site):
    """Whether the centres of mass are aligned."""
    parameters = site.parameters
    return site.plan.operation == "affine" and (
        parameters.starting_affine == "mass" or "center_of_mass" in parameters.pipeline
    )


def _own_arguments(site, image, grid2world, mask, start):
    """Keyword arguments of the operation: what was agreed on, and what is its owner's.

    `mask` and `start` are files, or None.
    """
    name, options = site.image, site.plan.arguments
    if mask:
        if site.parameters.sampling_proportion not in (None, 1):
            raise InputError(
                "masks need all voxels; leave the mask out, or sampling_proportion out "
                "of the session file at all parties"
            )
        inputs.explain(registration_of(site.parameters).metric.check_masks, mask)
        options[name + "_mask"] = inputs.load_mask(mask, image, grid2world, name)
    if start:
        if name != "moving":
            raise InputError("--prealign_file belongs to the owner of the moving image")
        options["prealign"] = inputs.load_matrix(start, "the prealign file")
    return options


def _wanted(site, files, pictures):
    """What of `files` this owner gets, see `register`."""
    wanted, moving = ["receipt"], site.image == "moving"
    if site.gets_result:
        wanted += ["transform"]
        wanted += ["image"] if moving else []
        wanted += [kind for kind in ("inverse", "itk") if kind in files]
        wanted += pictures
    wanted += ["report"] if "report" in files else []
    if site.plan.operation == "affine" and site.parameters.ret_metric and moving:
        wanted += ["quality"]
    return wanted


def _draw(out, files, pictures, own_image, receipt, title):
    """Draw what is wanted; what cannot be drawn is taken out of `files`."""
    for kind in [*pictures, "report"]:
        if kind not in files:
            continue
        if kind == "report":
            save = partial(own_image.report, receipt, {own_image.name: title})
        else:
            save = partial(own_image.draw, pictures[kind], receipt, title)
        if not out.attempt(files[kind], save):
            del files[kind]


@dataclass(frozen=True)
class _OwnImage:
    """What an owner in a session can draw: its image, and the result if it gets it."""

    name: str
    image: np.ndarray
    grid2world: np.ndarray
    prealign: np.ndarray | None
    moved: np.ndarray | None
    transform: object

    def draw(self, kind, receipt, title, path):
        """Draw what the transform does on its own image, see `figures.save_map`."""
        static_grid = np.array(receipt["static_grid2world"])
        image = self.moved if self.name == "moving" else self.image
        figures.save_map(path, kind, image, self.transform, static_grid, title=title)

    def report(self, receipt, names, path):
        """Write the report, see `report.save_report`."""
        shown = None
        if self.transform is not None:
            shown = report.pictures_of(self._pictures, receipt)
        report.save_report(path, receipt, names=names, pictures=shown)

    def _pictures(self, receipt):
        static_grid = np.array(receipt["static_grid2world"])
        if self.name == "static":
            return report.of_static_image(self.image, static_grid, self.transform)
        before = AffineMap(
            np.eye(4) if self.prealign is None else self.prealign,
            domain_grid_shape=receipt["images"]["static"]["shape"],
            domain_grid2world=static_grid,
            codomain_grid_shape=self.image.shape,
            codomain_grid2world=self.grid2world,
        ).transform(self.image)
        return report.of_moving_image(before, self.moved, static_grid, self.transform)


def write_receipt(out, file, receipt):
    """Write the receipt under a temporary name."""
    out.temporary(file).write_text(json.dumps(receipt, indent=2) + "\n")


def finish(out, receipt, files):
    """Give all files their names, and print the receipt."""
    out.commit()
    say("\n" + receipt_text(receipt) + "\n")
    for file in files.values():
        logger.info("Saved %s", file)
