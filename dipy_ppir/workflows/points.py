"""The command ``dipy_ppir_align_points``, as a DIPY workflow."""

from functools import partial
import io
import logging
from pathlib import Path
import warnings

import numpy as np

from dipy_ppir.align import plausibility, point_registration
from dipy_ppir.align.alone import check_parties
from dipy_ppir.align.estimate import estimate
from dipy_ppir.align.facts import OwnFiles
from dipy_ppir.align.itkfiles import check_ending
from dipy_ppir.align.parameters import POINTS, ParameterError, PointParameters
from dipy_ppir.align.points import (
    UndeterminedError,
    centred,
    check_shapes,
    planned_bits,
    point_array,
)
from dipy_ppir.align.remote import WORD
from dipy_ppir.mpc.identity import home
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC
from dipy_ppir.mpc.session import PARTIES
from dipy_ppir.workflows import inputs
from dipy_ppir.workflows.flow import OutputFilesFlow, check_name, short_name
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.openings import POINT_LIMIT, Openings
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.progress import estimate_text
from dipy_ppir.workflows.remote import (
    Site,
    check_flags,
    check_words,
    finish,
    write_receipt,
)
from dipy_ppir.workflows.report import (
    HTML,
    of_point_sets,
    pictures_of,
    save_report,
    wanted,
)
from dipy_ppir.workflows.results import save_itk

logger = logging.getLogger("dipy_ppir")

#: Flags that name outputs.
OUTPUTS = ("out_moved", "out_matrix", "out_affine", "out_itk", "receipt")
#: Flags that a session file settles.
SETTLED = ("scaling", "precision", "parties")
_HEADER = "takes moving points to static ones, mm: matrix @ (x, y, (z,) 1)"


class SecurePointRegistrationFlow(OutputFilesFlow):
    """Rigid registration of two sets of corresponding points that two parties hold.

    Attributes
    ----------
    receipts : list of dict
        that of the registration.
    """

    def run(
        self,
        static_points_file,
        moving_points_file,
        scaling=POINTS.scaling,
        precision=POINTS.precision,
        out_dir="",
        out_moved="moved_points.txt",
        out_matrix="moving_to_static.txt",
        out_affine="affine.txt",
        out_itk="",
        receipt="receipt.json",
        report="report.html",
        no_pictures=False,
        parties=PARTIES,
        session="",
        identity="",
        listen="",
        resume=False,
        strict=False,
        limit_bits=POINT_LIMIT,
        debug=False,
    ):
        """Register two sets of corresponding points that neither owner shows.

        The first point of the one file belongs to the first of the other, and so on.
        With two files, processes on this machine play the owners and a helper,
        and run the protocol that separate sites run. With --session and the word
        remote in place of the points that another site has, this is one party of a
        session between sites.

        Parameters
        ----------
        static_points_file : string or Path
            Static points: a text file with one point of 2 or 3 coordinates a line,
            mm, separated by blanks or commas, ``#`` begins a comment; or an array of
            NumPy (.npy).
        moving_points_file : string or Path
            Moving points, as many and in the same order.
        scaling : boolean, optional
            Find a scale as well: the ratio of the sizes of the two sets.
        precision : float, optional
            By how much, in mm, rounding may move a point.
        out_dir : string or Path, optional
            Directory to save the results in.
        out_moved : string, optional
            Name for the moving points in the static ones' space, .txt or .npy.
        out_matrix : string, optional
            Name for the matrix that takes moving points to static ones.
        out_affine : string, optional
            Name for its inverse, from static to moving space, as DIPY's commands write
            and read for images: world coordinates, mm, RAS+.
        out_itk : string, optional
            Name of a file for this inverse in the form of ITK and ANTs, which ends in
            .txt, .tfm, .mat or .h5. Not written without a name.
        receipt : string, optional
            Name of the JSON file that states what each party learned.
        report : string, optional
            Name of the page (HTML) that shows the result and what each party learned,
            made if jinja2 and matplotlib are installed.
        no_pictures : boolean, optional
            Do not write the report.
        parties : int, optional
            With both sets here, how many parties there are: 3, for two owners
            and a helper, or 2, for two owners alone, who compute on encrypted numbers.
        session : string or Path, optional
            Session file (TOML) of a registration between sites; write "remote" in
            place of the points that this site does not have.
        identity : string or Path, optional
            Folder of this site's key, by default ~/.dipy_ppir.
        listen : string, optional
            Address to listen on, host:port; by default all of this machine, at the
            port in the session file.
        resume : boolean, optional
            Not for points, which are registered in a moment: there is nothing to
            resume.
        strict : boolean, optional
            End with an error, and write no result, where it is not plausible; without
            it a warning is given and is in the receipt.
        limit_bits : float, optional
            In a session: most bits that may be opened about this site's points in all
            sessions, this one included; 0 for no limit. They are counted in
            opened.json, beside the key.
        debug : boolean, optional
            On an error also show where in the program it occurred.
        """
        flags = {k: v for k, v in locals().items() if k != "self"}
        files = {"static": static_points_file, "moving": moving_points_file}
        self.receipts = []
        check_words(files, session, "points", identity=identity, listen=listen)
        if out_itk:
            inputs.explain(partial(check_ending, field=False), out_itk)
        outputs = [flag for flag in OUTPUTS if flag != "out_itk" or out_itk]
        for flag in outputs:
            check_name(flags[flag], flag)
        check_name(report, "report", HTML)
        folder = Path(out_dir or ".")
        names = {flag: folder / flags[flag] for flag in outputs}
        reported = {} if no_pictures else wanted(report)
        names |= {flag: folder / name for flag, name in reported.items()}
        site = None
        if session:
            check_flags({flag: flags[flag] for flag in SETTLED}, self.run)
            site = Site(session, identity, listen)
            site.check_owner("points", files)
            site.checkpoint(folder, resume)
            parameters = site.parameters
            mine = {site.image: files[site.image]}
            _keep_own(names, site)
        else:
            _check_no_session(resume, limit_bits)
            try:
                parameters = PointParameters(scaling=scaling, precision=precision)
                check_parties(parties, None, "points", parameters)
            except ParameterError as exc:
                raise InputError(exc.spelled("--{}".format)) from None
            mine = files
        own = OwnFiles({f"{name} points": path for name, path in mine.items()})
        points = {
            name: load_points(path, name, parameters.precision)
            for name, path in mine.items()
        }
        if site is None:
            inputs.explain(check_shapes, {n: x.shape for n, x in points.items()})
        count, matrices = None, []
        if site is not None:
            count = _Count(site, points[site.image], limit_bits)
        with (
            new_folders(names.values()),
            OutputFiles(
                names.values(), mine.values(), force=self._force_overwrite
            ) as out,
        ):

            def write(moved, matrix, *, receipt):
                matrices.append(matrix)
                if "out_moved" in names:
                    _save_points(out.temporary(names["out_moved"]), moved)
                if "out_matrix" in names:
                    to_static = out.temporary(names["out_matrix"])
                    np.savetxt(to_static, matrix, header=_HEADER)
                    to_moving = out.temporary(names["out_affine"])
                    np.savetxt(to_moving, np.linalg.inv(matrix))
                    if "out_itk" in names:
                        itk = out.temporary(names["out_itk"])
                        save_itk(itk, np.linalg.inv(matrix))
                own.enter(receipt)
                write_receipt(out, names["receipt"], receipt)

            try:
                found = _register(site, points, parameters, write, count, parties)
            except UndeterminedError as exc:
                # What was learned stays on record.
                if count is not None:
                    count.end(exc.receipt)
                own.enter(exc.receipt)
                write_receipt(out, names["receipt"], exc.receipt)
                out.commit()
                raise
            self.receipts.append(found)
            if strict and found["warnings"]:
                out.commit(names["receipt"])
                plausibility.tell(found["warnings"], strict=True)
            out.commit()
            if reported:
                save = partial(_save_report, found, mine, points, *matrices)
                if not out.attempt(names["report"], save):
                    del names["report"]
            finish(out, found, names)


def _check_no_session(resume, limit_bits):
    """Refuse flags that mean something in sessions only."""
    if resume:
        raise InputError(
            "--resume is for sessions of images; leave it out: points are registered "
            "in a moment"
        )
    if limit_bits != POINT_LIMIT:
        raise InputError("--limit_bits is for an owner in a session; leave it out")


def _keep_own(names, site):
    """Take out of the outputs what this owner does not get."""
    if site.image != "moving" or not site.gets_result:
        del names["out_moved"]
    if not site.gets_result:
        if "out_itk" in names:
            raise InputError(
                "--out_itk needs the transform, which the session file gives to the "
                "moving owner only; leave it out"
            )
        del names["out_matrix"], names["out_affine"]


class _Count:
    """Counts what is opened about this owner's points, see `openings`."""

    def __init__(self, site, points, limit):
        other = MOVING if site.image == "static" else STATIC
        receiver = "moving" if other == MOVING else "static"
        self.role = ROLES[other]
        self.planned = planned_bits(site.parameters, points.shape[1], receiver)
        folder = home(site.identity)
        self.count = Openings(folder, points, limit, "these points")
        self.count.check(self.planned)

    def begin(self):
        """The parties have met."""
        self.count.begin(self.planned)

    def end(self, receipt):
        """The session has come to its end."""
        self.count.end(self.planned, receipt, self.role)


def _register(site, points, parameters, write, count, parties):
    """Register here, or as one site; returns the receipt."""
    if site is not None:
        pair = {"static": WORD, "moving": WORD, **points}
        receipt = site.run(None, write, count.begin, **pair, **site.plan.arguments)
        count.end(receipt)
        return receipt
    shapes = points["static"].shape, points["moving"].shape
    ahead = estimate(parameters, *shapes, alone=parties != PARTIES)
    logger.info("%s", estimate_text(ahead))
    *result, receipt = point_registration(
        **points, parties=parties, ret_receipt=True, **parameters.plain()
    )
    write(*result, receipt=receipt)
    return receipt


def load_points(path, name, precision):
    """Read an owner's points, and refuse those that cannot be registered.

    Parameters
    ----------
    path : str or Path
        text with a point a line, or .npy.
    name : str
        "static" or "moving", for messages.
    precision : float
        mm.

    Returns
    -------
    points : array, shape (n, dim)

    Raises
    ------
    InputError
        that names the file, and the line in it if it is that of one.
    """
    path, what = Path(path), f"the {name} points"
    if not str(path).strip() or not path.exists():
        raise InputError(f"{what} {path} do not exist; check the name of the file")
    if path.is_dir():
        raise InputError(f"{what} {path} are a folder; give the name of a file")
    try:
        read = _read_array if path.suffix.lower() == ".npy" else _read_text
        points = read(path, what)
    except OSError as exc:
        raise InputError(
            f"{what} {path} cannot be read: {exc.strerror}; check the file"
        ) from None
    points = inputs.explain(point_array, points, name, file=path, of="points")
    # What the registration would refuse, before anybody is met.
    inputs.explain(centred, points, precision, name, file=path, of="points")
    return points


def _read_array(path, what):
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise InputError(
            f"{what} {path} are no array of numbers; save one with numpy.save"
        ) from None


def _read_text(path, what):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(
            f"{what} {path} are no text; give one point a line, or a .npy file"
        ) from None
    text = text.replace(",", " ")
    try:
        # A file without a number is refused below, in one line.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            points = np.loadtxt(io.StringIO(text), ndmin=2)
    except ValueError:
        raise InputError(_explained(text, f"{what} {path}")) from None
    if not points.size:
        raise InputError(f"{what} {path} are empty; give one point a line")
    return points


def _explained(text, what):
    """What is wrong with text that cannot be read."""
    count = None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        for word in words:
            try:
                float(word)
            except ValueError:
                return (
                    f"{what}, line {number}: {word[:40]!r} is no number; give "
                    "coordinates between blanks or commas, and begin comments with #"
                )
        count = count or len(words)
        if words and len(words) != count:
            return (
                f"{what}, line {number}: {len(words)} coordinates, but {count} in the "
                "lines before; give each point as many"
            )
    return f"{what} cannot be read as numbers; give one point a line"


def _save_report(receipt, files, points, matrix, path):
    """Write the report: pictures of this party's points, if it gets the transform."""
    shown = None
    if matrix is not None:
        shown = pictures_of(of_point_sets, points, matrix)
    names = {name: short_name(file) for name, file in files.items()}
    save_report(path, receipt, names=names, pictures=shown)


def _save_points(path, points):
    if path.suffix.lower() == ".npy":
        np.save(path, points)
    else:
        np.savetxt(path, points, fmt="%.15g")
