"""Commands for sessions between sites: keys, session files, and the helper."""

import argparse
from contextlib import suppress
import logging
import math
from pathlib import Path
import shutil
import sys

from dipy_ppir.align.alone import NUMBERS
from dipy_ppir.align.estimate import USUAL, Line, dealt_bytes
from dipy_ppir.align.parameters import PointParameters
from dipy_ppir.align.remote import WORD
from dipy_ppir.mpc.dealfile import deal_path, remove_unfinished
from dipy_ppir.mpc.dealt import OWNERS
from dipy_ppir.mpc.identity import (
    DEFAULT_HOME,
    VALIDITY_DAYS,
    Identity,
    create_identity,
)
from dipy_ppir.mpc.ledger import HELPER, ROLES
from dipy_ppir.workflows import inputs
from dipy_ppir.workflows.flow import check_name
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.operations import (
    OPERATIONS,
    check_described,
    described_pair,
    explain,
    read,
    template,
)
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.points import load_points
from dipy_ppir.workflows.progress import size_text
from dipy_ppir.workflows.remote import Site, finish, write_receipt
from dipy_ppir.workflows.streams import QUIET, be_quiet, is_quiet, say

logger = logging.getLogger("dipy_ppir")


def keygen(arguments=None):
    """``dipy_ppir_keygen``: make this site's key and certificate."""
    parser = site_parser(
        "dipy_ppir_keygen",
        "Make this site's key and self-signed certificate, and print the fingerprint "
        "that the other sites pin in the session file.",
    )
    parser.add_argument(
        "name", nargs="?", help='name of this site, for people: "St. Anne Hospital"'
    )
    parser.add_argument(
        "--days",
        type=int,
        default=VALIDITY_DAYS,
        help=f"days that the certificate is valid ({VALIDITY_DAYS})",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a key that is there already, which is kept as key.pem.old",
    )
    parser.add_argument(
        "--show", action="store_true", help="only print the fingerprint of the key"
    )
    given = parser.parse_args(arguments)
    if given.show and given.quiet:
        raise InputError("--show prints a fingerprint, which --quiet forbids; give one")
    be_quiet(given.quiet)
    if given.show:
        identity = Identity.load(given.identity)
    else:
        if not given.name:
            raise InputError(
                'give the name of this site, for example dipy_ppir_keygen "St. Anne '
                'Hospital"; --show prints the fingerprint of the key that is there'
            )
        identity = create_identity(_utf8(given.name), days=given.days)
        folder = identity.save(given.identity, force=given.force)
        say(f"Key and certificate written to {folder}")
        say("Keep key.pem secret; nobody but this account can read it.\n")
    until = identity.certificate.not_valid_after_utc
    say(f"{identity.name}, valid until {until:%Y-%m-%d}")
    say(f"SHA-256 fingerprint: {identity.fingerprint}")
    say(f"sealing key: {identity.sealing}")
    say("\nGive the fingerprint to the other sites by telephone or mail.")
    say("Where a helper deals before the owners meet it needs the sealing key as well.")


def session(arguments=None):
    """``dipy_ppir_session``: write a session file, or explain one."""
    parser = argparse.ArgumentParser(
        prog="dipy_ppir_session",
        description="Write a session file to start from, or explain and check one.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="print a session file to fill in")
    new.add_argument("operation", choices=sorted(OPERATIONS), nargs="?")
    new.add_argument(
        "--parties",
        type=int,
        choices=NUMBERS,
        default=NUMBERS[0],
        help="3 for two owners and a helper (by default), or 2 for two owners alone",
    )
    new.add_argument(
        "--ahead",
        action="store_true",
        help="for a helper that deals before the owners meet, and does not meet them",
    )
    check = commands.add_parser(
        "check", help="say in plain words who takes part and who will learn what"
    )
    check.add_argument("file", type=Path)
    check.add_argument(
        "data",
        type=Path,
        nargs="?",
        metavar="IMAGE",
        help="this site's image, or points: say what one like it will take; by default "
        "what usual ones do",
    )
    for name in ("static", "moving"):
        check.add_argument(
            f"--{name}_shape",
            type=int,
            nargs="+",
            metavar="N",
            help=f"voxels of the {name} image along each axis, or number of points and "
            "of coordinates, in place of IMAGE; by default that of the other",
        )
    check.add_argument(
        "--rtt",
        type=_positive,
        default=1000 * USUAL.rtt,
        help=f"round trip between sites, ms ({1000 * USUAL.rtt:g})",
    )
    check.add_argument(
        "--bandwidth",
        type=_positive,
        default=USUAL.bandwidth / 1e6,
        help=f"of the lines between them, Mbit/s ({USUAL.bandwidth / 1e6:g})",
    )
    check.add_argument("--quiet", action="store_true", help=QUIET)
    describe = commands.add_parser(
        "describe",
        help="print what a helper that deals before the owners meet has to know of "
        "this owner, for the session file",
    )
    describe.add_argument("role", choices=("moving", "static"))
    describe.add_argument(
        "data", type=Path, metavar="IMAGE", help="this site's image, or points"
    )
    describe.add_argument(
        "--identity", help=f"folder of this site's key ({DEFAULT_HOME})", default=None
    )
    given = parser.parse_args(arguments)
    if given.command == "new":
        helper = "ahead" if given.ahead else "online"
        helper = "none" if given.parties == 2 else helper
        if given.ahead and given.parties == 2:
            raise InputError("--ahead needs a helper, which --parties 2 leaves out")
        print(template(given.operation or "affine", helper), end="")
        return
    if given.command == "describe":
        print(_described(given.role, given.data, Identity.load(given.identity)), end="")
        return
    be_quiet(given.quiet)
    plan, _, parameters = read(given.file)
    pair = _shapes(given, parameters)
    if pair and given.data is not None:
        check_described(plan, OWNERS, pair[0], pair[2])
    line = Line(given.rtt / 1000, 1e6 * given.bandwidth)
    say(explain(plan, pair and [pair], line))


def _described(role, path, identity):
    """The table of an owner for a helper that deals ahead.

    Of an image its header is read and nothing else.
    """
    if path.suffix.lower() in (".txt", ".npy", ".csv"):
        shape = load_points(path, role, PointParameters().precision).shape
        lines = [f"shape = {list(shape)}"]
    else:
        shape, grid2world = inputs.load_header(path, f"the {role} image")
        if grid2world is None:
            raise InputError(
                f"{path} has two dimensions, for which there is no command; write "
                f"[deal.{role}] with its shape and grid2world by hand"
            )
        rows = ", ".join(str([float(x) for x in row]) for row in grid2world)
        lines = [f"shape = {list(map(int, shape))}", f"grid2world = [{rows}]"]
    return "\n".join([f"[deal.{role}]", *lines, f'sealing = "{identity.sealing}"', ""])


def _positive(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number


def _shapes(given, parameters):
    """Shapes that `dipy_ppir_session check` was given; None for those that are usual.

    Returns
    -------
    static_shape, moving_shape : tuple of int
    static_grid2world : array or None
    """
    shapes = {name: getattr(given, f"{name}_shape") for name in ("static", "moving")}
    shapes = {name: tuple(shape) for name, shape in shapes.items() if shape}
    of_points = isinstance(parameters, PointParameters)
    if given.data is not None and shapes:
        raise InputError("IMAGE has a shape; leave out --static_shape, --moving_shape")
    if given.data is not None and of_points:
        shape = load_points(given.data, "own", parameters.precision).shape
        return shape, shape, None
    if given.data is not None:
        shape, grid2world = inputs.load_header(given.data, "the image")
        dim = getattr(parameters, "dim", len(shape))
        if len(shape) != dim or dim not in (2, 3):
            raise InputError(
                f"the image {given.data} has {len(shape)} dimensions, and the session "
                f"file is for {dim if dim in (2, 3) else '2 or 3'}; choose another, or "
                "change dim in [parameters]"
            )
        return shape, shape, grid2world
    for name, shape in shapes.items():
        _check_shape(name, shape, parameters)
    if len(set(map(len, shapes.values()))) > 1:
        raise InputError("--static_shape and --moving_shape differ in dimensions")
    if not shapes:
        return None
    (static, *_), (*_, moving) = shapes.values(), shapes.values()
    return static, moving, None


def _check_shape(name, shape, parameters):
    """Refuse a shape that is none, of what the parameters are for."""
    dims = (2, 3) if not hasattr(parameters, "dim") else (parameters.dim,)
    if isinstance(parameters, PointParameters):
        good = len(shape) == 2 and shape[0] > 0 and shape[1] in (2, 3)
        wanted = "how many points and 2 or 3 coordinates, for example 200 3"
    else:
        good = len(shape) in dims and min(shape) > 0
        wanted = f"{' or '.join(map(str, dims))} numbers of voxels"
    if not good:
        given = " ".join(map(str, shape))
        raise InputError(f"--{name}_shape must be {wanted}; got {given}")


def helper_parser():
    """The arguments of ``dipy_ppir_helper``."""
    parser = site_parser(
        "dipy_ppir_helper",
        "Take part in a registration between two image owners as the helper, which "
        "has no image and learns nothing about theirs.",
    )
    parser.add_argument("file", type=Path, help="the session file (TOML)")
    parser.add_argument(
        "--listen",
        help="host:port to listen on (by default all addresses of this machine, at "
        "the port in the session file)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted session"
    )
    parser.add_argument(
        "--deal",
        action="store_true",
        help="deal before the owners meet: write a file for each of them, and be gone",
    )
    parser.add_argument(
        "--out_dir",
        type=Path,
        default=Path("."),
        help="folder for the receipt, or the files",
    )
    parser.add_argument(
        "--receipt", default="receipt.json", help="name of the receipt (receipt.json)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace files that are there already"
    )
    parser.add_argument(
        "--log_level", default="INFO", help="least important messages shown (INFO)"
    )
    return parser


def helper(arguments=None):
    """``dipy_ppir_helper``: take part in a session without an image."""
    given = helper_parser().parse_args(arguments)
    be_quiet(given.quiet)
    log_to_stderr(given.log_level)
    agreed = plan, operation, _ = read(given.file)
    if plan.alone:
        raise InputError(
            "the session file is for two owners alone, who need no helper; run "
            f"{operation.command} at each of them"
        )
    site = Site(given.file, given.identity, given.listen, agreed)
    party = site.party
    if party.pid != HELPER and given.deal:
        raise InputError(
            f"this is the key of {party.title}; the helper deals, with its own: give "
            "its folder with --identity"
        )
    if party.pid != HELPER:
        raise InputError(
            f"this party's certificate is the {ROLES[party.pid]}'s, not the "
            f"helper's; run {operation.command} with --session {given.file}, or "
            "give the folder of another key with --identity"
        )
    if given.deal or plan.helper == "ahead":
        _deal(site, given)
        return
    check_name(given.receipt, "receipt")
    files = {"receipt": given.out_dir / given.receipt}
    with (
        new_folders(files.values()),
        OutputFiles(files.values(), [given.file], force=given.force) as out,
    ):
        checkpoint = site.checkpoint(given.out_dir, given.resume)

        def write(*result, receipt):
            write_receipt(out, files["receipt"], receipt)

        receipt = site.run(
            checkpoint, write, static=WORD, moving=WORD, **site.plan.arguments
        )
        finish(out, receipt, files)
        if checkpoint is not None:
            checkpoint.discard()


def _deal(site, given):
    """Deal before the owners meet."""
    if site.plan.helper != "ahead":
        raise InputError(
            "--deal is for a helper that does not meet the owners: write helper = "
            '"ahead" above all tables of the session file, and [deal.moving] and '
            "[deal.static] (dipy_ppir_session describe), everywhere; or leave it out"
        )
    if not given.deal:
        raise InputError(
            "by this session file the helper deals before the owners meet; run "
            f"dipy_ppir_helper --deal {given.file}, and send each owner its file"
        )
    receipt = given.receipt != helper_parser().get_default("receipt")
    if given.listen or given.resume or receipt:
        raise InputError(
            "--listen, --receipt and --resume are for a helper that meets the owners; "
            "leave them out. Who resumes a session needs a new deal: make one as the "
            "first time"
        )
    paths = [deal_path(given.out_dir, given.file, p) for p in OWNERS]
    expected = dealt_bytes(site.parameters, *described_pair(site.plan))
    logger.info("The two files will take about %s", size_text(expected))
    with (
        new_folders(paths),
        OutputFiles(paths, [given.file], force=given.force) as out,
    ):
        for path in remove_unfinished(f for p in paths for f in out.left_over(p)):
            logger.info("Removed %s, of a helper that was killed", path)
        free = shutil.disk_usage(given.out_dir).free
        if expected > free:
            raise InputError(
                f"the two files will take about {size_text(expected)}, and "
                f"{given.out_dir} has room for {size_text(free)}; free some, or give "
                "another --out_dir"
            )
        session = site.deal([out.temporary(path) for path in paths])
        try:
            with inputs.explained():
                site.operation.function(
                    session=session, static=WORD, moving=WORD, **site.plan.arguments
                )
            session.finish()
        except BaseException as exc:
            session.fail(exc)
            if isinstance(exc, OSError):
                raise InputError(
                    f"cannot write the files to {given.out_dir}: {exc.strerror}"
                ) from exc
            raise
        out.commit()
    say(f"Deal {session.number}, to be used once")
    for path, owner in zip(paths, OWNERS, strict=True):
        to = site.plan.parties[owner].title
        say(f"{path}, {size_text(path.stat().st_size)}: for {to}")


def _utf8(text):
    """An argument in UTF-8, whose letters the locale may not know."""
    with suppress(UnicodeDecodeError):
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    return text


def site_parser(name, description):
    """Arguments that the commands of a site have in common."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument(
        "--identity", help=f"folder of this site's key ({DEFAULT_HOME})", default=None
    )
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    parser.add_argument(
        "--debug", action="store_true", help="on an error show where it occurred"
    )
    return parser


def log_to_stderr(level):
    """Log on standard error, from a level on that a user named."""
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise InputError(f"--log_level {level} is not one of {', '.join(levels)}")
    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING
    )
    level = levels[level.upper()]
    logger.setLevel(max(level, logging.WARNING) if is_quiet() else level)
