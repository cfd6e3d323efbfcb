"""The command ``dipy_ppir_bids``: a BIDS-App that registers a dataset's images.

It finds images of participants in a BIDS dataset, registers them by the flows of the
other commands, and writes transforms, images and receipts as a derivatives dataset.
"""

import argparse
from dataclasses import dataclass
from importlib.metadata import version
import json
import logging
import os
from pathlib import Path
import shutil
import warnings

from dipy_ppir.align.remote import WORD
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.workflows.align import PIPELINES, SecureImageRegistrationFlow
from dipy_ppir.workflows.bidsnames import derived, label
from dipy_ppir.workflows.cli import one_line
from dipy_ppir.workflows.freeform import SecureFreeFormRegistrationFlow
from dipy_ppir.workflows.inputs import InputError, check_volume
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.remote import Site
from dipy_ppir.workflows.sites import log_to_stderr
from dipy_ppir.workflows.streams import QUIET, be_quiet, say
from dipy_ppir.workflows.syn import SecureSynRegistrationFlow

logger = logging.getLogger("dipy_ppir")

#: Of the specification that names and sidecars follow.
BIDS_VERSION = "1.10.0"
#: Operations to their flows.
FLOWS = {
    "affine": SecureImageRegistrationFlow,
    "syn": SecureSynRegistrationFlow,
    "freeform": SecureFreeFormRegistrationFlow,
}
#: What the flows call the images that they resample.
_MOVED = {
    "affine": "moved.nii.gz",
    "syn": "warped_moved.nii.gz",
    "freeform": "warped_moved.nii.gz",
}
_PAIR = ("static_image_files", "moving_image_files")
#: What validators need not know: BIDS has no transforms (yet), and no receipts.
IGNORED = "*_xfm.*\nlogs/\nwork/\n"


def ending_of(operation):
    """The ending that the transform of an operation has, a file of ITK's.

    Parameters
    ----------
    operation : str
        out of `FLOWS`.

    Returns
    -------
    ending : str
    """
    return ".txt" if operation == "affine" else ".h5"


@dataclass(frozen=True)
class Job:
    """One registration.

    Attributes
    ----------
    image : Path
        of the participant.
    source : str
        its BIDS URI.
    static, moving : Path or str
        images, of which one may be the word that stands for another site's.
    spaces : tuple of str
        names of the moving and of the static space.
    reference : str or None
        the static image, a BIDS URI or a path from the dataset; None if it is another
        site's.
    gets_result : bool
        whether the transform is this site's to have.
    operation : str
        out of `FLOWS`.
    """

    image: Path
    source: str
    static: object
    moving: object
    spaces: tuple
    reference: str | None
    gets_result: bool
    operation: str

    @property
    def pair(self):
        """Names of the static and of the moving image, for the flows."""
        return str(self.static), str(self.moving)

    def outputs(self, root, relative):
        """Files of the results in a dataset, by what is in them.

        Parameters
        ----------
        root : Path
            of the dataset.
        relative : Path
            of the image in its own dataset.

        Returns
        -------
        files : dict
        """
        folder, name = root / relative.parent, relative.name
        moving, static = self.spaces
        path = {"from": moving, "to": static, "mode": "image"}
        files = {}
        if self.gets_result:
            ending = ending_of(self.operation)
            xfm = derived(name, "xfm", ending, **path)
            files["transform"] = folder / xfm
            files["transform_sidecar"] = folder / derived(xfm, ending=".json")
            if self.moving != WORD:
                moved = derived(name, space=static, desc="preproc", ending=".nii.gz")
                files["image"] = folder / moved
                files["image_sidecar"] = folder / derived(moved, ending=".json")
        receipt = derived(name, "receipt", ".json", **path)
        files["receipt"] = root / "logs" / receipt
        if self.operation != "affine" and WORD not in self.pair:
            first = derived(name, "receipt", ".json", desc="affine", **path)
            files["affine_receipt"] = root / "logs" / first
        return files

    def about_image(self, files, root):
        """Sidecar of the image on the static one's grid."""
        xfm = files["transform"].relative_to(root).as_posix()
        about = {
            "Description": f"The image on the grid of {self._static}",
            "Sources": [self.source, f"bids::{xfm}"],
            "SkullStripped": bool(_sidecar(self.image).get("SkullStripped", False)),
        }
        return about | ({"SpatialReference": self.reference} if self.reference else {})

    def about_transform(self):
        """Sidecar of the transform."""
        others = [self.reference] if self.reference else []
        return {
            "Description": f"{self._format}; brings the image {self.spaces[0]} onto "
            f"the grid of {self._static}",
            "Sources": list(dict.fromkeys([self.source, *others])),
            "Software": f"dipy_ppir {version('dipy-ppir')}",
        }

    @property
    def _static(self):
        return "another site's image" if self.static == WORD else self.spaces[1]

    @property
    def _format(self):
        if self.operation == "affine":
            return "Matrix from static to moving world coordinates, mm, LPS (ITK)"
        return "Displacements from static to moving coordinates, mm, LPS (ITK)"


def _sidecar(image):
    """What is said beside an image, if anything."""
    file = image.with_name(derived(image.name, ending=".json"))
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def bids_parser():
    """The arguments of ``dipy_ppir_bids``."""
    text = f"dipy_ppir {version('dipy-ppir')}"
    parser = argparse.ArgumentParser(
        prog="dipy_ppir_bids",
        description="A BIDS-App: register each participant's image to a template, to "
        "another image of the participant, or, as one site of a session, to an image "
        "that another site has. Writes a derivatives dataset.",
    )
    parser.add_argument("bids_dir", type=Path, help="the BIDS dataset")
    parser.add_argument("output_dir", type=Path, help="the derivatives dataset")
    parser.add_argument(
        "analysis_level", help="participant, the one level that there is"
    )
    parser.add_argument("--version", action="version", version=text)
    select = parser.add_argument_group("which images")
    select.add_argument(
        "--participant_label",
        "--participant-label",
        nargs="+",
        metavar="LABEL",
        help="participants, with or without sub-; all unless given",
    )
    select.add_argument(
        "--session_label",
        "--session_id",
        "--session-label",
        nargs="+",
        metavar="LABEL",
        help="sessions of the participants, with or without ses-; all unless given",
    )
    select.add_argument(
        "--suffix", default="T1w", help="of the participants' images (T1w)"
    )
    select.add_argument(
        "--filter",
        nargs="+",
        metavar="ENTITY=VALUE",
        default=[],
        help="other entities of these images, as pybids calls them: acquisition=mprage "
        "run=1; with an empty VALUE, images without the entity",
    )
    select.add_argument(
        "--skip_bids_validator",
        "--skip-bids-validator",
        action="store_true",
        help="take files whose names are not BIDS as well",
    )
    pair = parser.add_argument_group("what they are registered with")
    pair.add_argument(
        "--static",
        metavar="FILE",
        help=f'the static image, a NIfTI file (a template); or the word "{WORD}", with '
        "--session, for that of another site",
    )
    pair.add_argument(
        "--static_space",
        metavar="NAME",
        help="name of its space in names of files; by default made of the file's, or "
        "of the other site's",
    )
    pair.add_argument(
        "--to",
        metavar="SUFFIX",
        help="in place of --static: another image of the same participant and session, "
        "as FLAIR",
    )
    pair.add_argument(
        "--moving",
        choices=(WORD,),
        help="with --session, at the owner of the static image: the participant's "
        "image is the static one",
    )
    pair.add_argument(
        "--moving_space",
        metavar="NAME",
        help="with --moving, name of the other site's space in names of files",
    )
    what = parser.add_argument_group("what is computed")
    what.add_argument(
        "--transform",
        choices=(*PIPELINES, "syn", "freeform"),
        help="what is looked for (affine), through the simpler ones before it; syn and "
        "freeform begin with affine",
    )
    what.add_argument("--metric", help="of the last step, as its own command has it")
    what.add_argument(
        "--sampling_prop",
        type=float,
        help="percentage of the voxels that affine steps use; all unless given",
    )
    what.add_argument(
        "--strict",
        action="store_true",
        help="an image whose result is not plausible fails",
    )
    site = parser.add_argument_group("one site of a session")
    site.add_argument("--session", metavar="FILE", help="session file (TOML)")
    site.add_argument("--identity", help="folder of this site's key")
    site.add_argument("--listen", help="host:port to listen on")
    site.add_argument(
        "--resume",
        action="store_true",
        help="go on with a session that was interrupted, if all parties do",
    )
    parser.add_argument(
        "-w",
        "--work_dir",
        type=Path,
        help="folder for what is under way, and for checkpoints of sessions; by "
        "default work in OUTPUT_DIR",
    )
    parser.add_argument(
        "--force", action="store_true", help="register again what is there already"
    )
    parser.add_argument(
        "--log_level", default="INFO", help="least important messages shown (INFO)"
    )
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    parser.add_argument(
        "--debug", action="store_true", help="on an error show where it occurred"
    )
    return parser


def bids(arguments=None):
    """``dipy_ppir_bids``: register the images of a BIDS dataset.

    Returns
    -------
    status : int
        0 if all were registered, or were so before; 1 otherwise.
    """
    given = bids_parser().parse_args(arguments)
    be_quiet(given.quiet)
    log_to_stderr(given.log_level)
    site = check(given)
    layout = index(given.bids_dir, validate=not given.skip_bids_validator)
    images = find(layout, given)
    if site is not None and len(images) > 1:
        raise InputError(
            f"a session registers one image, and {len(images)} match: "
            f"{', '.join(image.filename for image in images[:5])}...; choose one with "
            "--participant_label, --session_label and --filter, or run "
            "dipy_ppir_cohort for many"
        )
    describe_dataset(layout, given.output_dir)
    jobs, states = {}, dict.fromkeys(image.filename for image in images)

    def attempt(image, function, *args):
        try:
            return function(*args)
        except Exception as exc:
            # The others are not to suffer from it.
            if given.debug:
                raise
            states[image.filename] = f"failed: {one_line(exc)}"
            logger.error("%s %s", image.filename, states[image.filename])

    # What cannot be registered is told at once, not after hours.
    for image in images:
        jobs[image.filename] = attempt(image, _job, layout, image, given, site)
    for number, image in enumerate(images, 1):
        name = image.filename
        if jobs[name] is None:
            continue
        logger.info("%s, %d of %d", name, number, len(images))
        state = attempt(image, _process, jobs[name], image, given)
        states[name] = state or states[name]
    say("\n" + table(states))
    return int(any(state.startswith("failed") for state in states.values()))


def check(given):
    """Refuse what contradicts itself, before any file is read.

    Returns
    -------
    site : Site or None
        this party in a session.
    """
    if given.analysis_level != "participant":
        raise InputError(
            f"there is no analysis level {given.analysis_level!r}: images are "
            "registered one by one, and nothing is computed of a group; write "
            "participant"
        )
    ways = [given.static, given.to, given.moving]
    if sum(way is not None for way in ways) != 1:
        raise InputError(
            "say what the images are registered with: --static FILE, --to SUFFIX, or "
            f"with --session --static {WORD} or --moving {WORD}"
        )
    remote = WORD in (given.static, given.moving)
    if remote != (given.session is not None):
        raise InputError(
            f'the word "{WORD}" and --session belong together: one of --static {WORD} '
            f"and --moving {WORD} for a site of a session, otherwise neither"
        )
    for flag in ("static_space", "moving_space"):
        text = getattr(given, flag)
        if text is not None and (not text or label(text) != text):
            raise InputError(f"--{flag} {text} must be letters and digits only")
    if given.moving_space and not given.moving:
        raise InputError(f"--moving_space is for --moving {WORD}; leave it out")
    if given.static_space and not given.static:
        raise InputError("--static_space is for --static; leave it out")
    if not remote:
        for flag in ("identity", "listen", "resume"):
            if getattr(given, flag):
                raise InputError(f"--{flag} is for a site of a session; leave it out")
        if given.static and not Path(given.static).is_file():
            raise InputError(
                f"the static image {given.static} does not exist; check its name"
            )
        if given.static:
            check_volume(given.static, "the static image")
        return None
    for flag in ("transform", "metric", "sampling_prop"):
        if getattr(given, flag) is not None:
            raise InputError(
                f"--{flag} is settled by the session file; leave it out, or change the "
                "session file at all parties"
            )
    site = Site(given.session, given.identity, given.listen)
    if site.plan.operation not in FLOWS:
        raise InputError(
            f"the session file is for operation {site.plan.operation!r}; images are "
            f"for {', '.join(FLOWS)}"
        )
    return site


def index(root, *, validate=True):
    """The files of a BIDS dataset.

    Parameters
    ----------
    root : Path
    validate : bool, optional
        whether what is not BIDS is refused or left out.

    Returns
    -------
    layout : bids.layout.BIDSLayout
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bids.exceptions import BIDSValidationError
            from bids.layout import BIDSLayout, BIDSLayoutIndexer
    except ImportError:
        raise InputError(
            "BIDS datasets are read with pybids; install it with pip install "
            "'dipy-ppir[bids]'"
        ) from None
    if not root.is_dir():
        raise InputError(f"the dataset {root} is no folder; check its name")
    try:
        # What sidecars say is not needed, and takes long to read.
        indexer = BIDSLayoutIndexer(validate=validate, index_metadata=False)
        return BIDSLayout(root, validate=validate, indexer=indexer)
    except (BIDSValidationError, ValueError) as exc:
        raise InputError(
            f"{root} is no BIDS dataset: {' '.join(str(exc).split())}; mend it, or "
            "give --skip_bids_validator"
        ) from None


def find(layout, given):
    """The images that are asked for.

    Parameters
    ----------
    layout : bids.layout.BIDSLayout
    given : argparse.Namespace
        what `bids_parser` knows.

    Returns
    -------
    images : list of bids.layout.BIDSFile
        at least one.
    """
    asked = {"suffix": given.suffix, **_filter(given.filter)}
    labels = {
        "subject": ("sub-", given.participant_label),
        "session": ("ses-", given.session_label),
    }
    for entity, (prefix, wanted) in labels.items():
        if not wanted:
            continue
        wanted = [text.removeprefix(prefix) for text in wanted]
        there = layout.get(return_type="id", target=entity)
        strange = [text for text in wanted if text not in there]
        if strange:
            raise InputError(
                f"the dataset has no {prefix}{f', {prefix}'.join(strange)}; it has "
                f"{', '.join(prefix + text for text in there) or 'none'}"
            )
        asked[entity] = wanted
    images = _get(layout, **asked)
    if not images:
        raise InputError(
            f"no image of the dataset ends in _{given.suffix}.nii.gz or .nii and is "
            "what is asked for; see --suffix and --filter"
        )
    return images


def _filter(pairs):
    from bids.layout import Query

    found = {}
    for pair in pairs:
        entity, equals, value = pair.partition("=")
        if not equals or not entity:
            raise InputError(f"--filter {pair} must be ENTITY=VALUE, as run=1")
        found[entity] = value or Query.NONE
        if entity == "run" and value.isdigit():
            found[entity] = int(value)
    return found


def _get(layout, **entities):
    try:
        return layout.get(extension=[".nii", ".nii.gz"], **entities)
    except ValueError as exc:
        raise InputError(f"--filter: {' '.join(str(exc).split())}") from None


def describe_dataset(layout, root):
    """Write what makes a folder a derivatives dataset, unless it is one of ours.

    Parameters
    ----------
    layout : bids.layout.BIDSLayout
        of the images.
    root : Path
    """
    file, source = root / "dataset_description.json", Path(layout.root)
    if file.exists():
        try:
            by = json.loads(file.read_text())["GeneratedBy"]
            ours = any(entry["Name"] == "dipy_ppir" for entry in by)
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise InputError(
                f"{root} is another dataset ({file.name} does not say that it was "
                "made by dipy_ppir); choose another output folder"
            )
        return
    link = Path(os.path.relpath(source, root.resolve())).as_posix()
    about = {"URL": link}
    known = layout.description or {}
    about |= {"DOI": known["DatasetDOI"]} if "DatasetDOI" in known else {}
    description = {
        "Name": f"Registrations of {known.get('Name') or source.name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "dipy_ppir", "Version": version("dipy-ppir")}],
        "SourceDatasets": [about],
        "DatasetLinks": {"raw": link},
    }
    files = {
        file: json.dumps(description, indent=2) + "\n",
        root / ".bidsignore": IGNORED,
    }
    with new_folders(files), OutputFiles(files, [], force=True) as out:
        for path, text in files.items():
            out.temporary(path).write_text(text)
        out.commit()


def table(states):
    """What became of each image, as text."""
    width = max(map(len, states))
    return "\n".join(f"{name:{width}}  {state}" for name, state in states.items())


# -- one image -----------------------------------------------------------------


def _process(job, image, given):
    """Register one image and write its files; returns what became of it."""
    root, relative = given.output_dir, Path(image.relpath)
    to = job.outputs(root, relative)
    if not given.force and all(path.exists() for path in to.values()):
        logger.info("Its files are there; --force makes them again")
        return "there already"
    work = given.work_dir or root / "work"
    folder = work / to["receipt"].stem
    with (
        new_folders([*to.values(), folder / "any"]),
        OutputFiles(to.values(), [image.path], force=True) as out,
    ):
        concerns = _register(job, to, folder, out, given)
        if "image" in to:
            _write(out, to["image_sidecar"], job.about_image(to, root))
        if "transform" in to:
            _write(out, to["transform_sidecar"], job.about_transform())
        out.commit()
        shutil.rmtree(folder)
    for path in to.values():
        logger.info("Kept as %s", path)
    return f"done; warnings in the receipt: {len(concerns)}" if concerns else "done"


def _job(layout, image, given, site):
    """What has to be done with an image, whose files it can be done to."""
    job = _described(layout, image, given, site)
    # SyN takes one slice, but for the affine registration that it begins with here.
    moves = site is None or job.operation != "syn"
    for part, file in (("moving", job.moving), ("static", job.static)):
        if file != WORD:
            check_volume(file, f"the {part} image", moves=moves and part == "moving")
    return job


def _described(layout, image, given, site):
    path, own = Path(image.path), label(given.suffix)
    what = {
        "image": path,
        "source": _uri(layout, path),
        "static": given.static,
        "moving": path,
    }
    if site is not None:
        other = "static" if site.image == "moving" else "moving"
        space = getattr(given, f"{other}_space")
        party = site.plan.parties[STATIC if other == "static" else MOVING]
        space = space or label(party.name) or WORD
        spaces = (own, space) if other == "static" else (space, own)
        if getattr(given, other) != WORD:
            raise InputError(
                f"this party's certificate is the {site.image} owner's; give --{other} "
                f"{WORD}, or the folder of another key with --identity"
            )
        what |= {other: WORD, site.image: path}
        return Job(
            **what,
            spaces=spaces,
            reference=None if other == "static" else what["source"],
            gets_result=site.gets_result,
            operation=site.plan.operation,
        )
    operation = given.transform if given.transform in FLOWS else "affine"
    if given.to is None:
        static = Path(given.static)
        name = static.name.removesuffix(".gz").removesuffix(".nii")
        space = given.static_space or label(name)
        reference = os.path.relpath(static.resolve(), given.output_dir.resolve())
    else:
        static, space = _other(layout, image, given.to), label(given.to)
        reference = _uri(layout, static)
    return Job(
        **{**what, "static": static},
        spaces=(own, space),
        reference=reference,
        gets_result=True,
        operation=operation,
    )


def _uri(layout, path):
    return f"bids:raw:{path.relative_to(layout.root).as_posix()}"


def _other(layout, image, suffix):
    """The one image of the same participant and session that has this suffix."""
    from bids.layout import Query

    entities = image.get_entities()
    same = {name: entities.get(name, Query.NONE) for name in ("subject", "session")}
    found = [f for f in _get(layout, suffix=suffix, **same) if f.path != image.path]
    if len(found) != 1:
        names = ", ".join(f.filename for f in found) or "none"
        raise InputError(
            f"{len(found)} images {suffix} of the same participant and session "
            f"({names}), but it takes one; give it as --static to a run of its own"
        )
    return Path(found[0].path)


def _register(job, to, folder, out, given):
    """Run the flows in a folder, and take over what they wrote.

    Returns
    -------
    concerns : list of str
        warnings of the receipts.
    """
    flow = FLOWS[job.operation](force=True)
    shared = {"no_pictures": True, "strict": given.strict}
    itk = f"transform{ending_of(job.operation)}"
    concerns = []
    if WORD in (job.static, job.moving):
        own = {"session": given.session, "resume": given.resume}
        own |= {n: getattr(given, n) or "" for n in ("identity", "listen")}
    else:
        affine = {"progressive": True, "sampling_prop": given.sampling_prop}
        own = {} if given.metric is None else {"metric": given.metric}
        if job.operation == "affine":
            own |= affine | {"transform": given.transform or "affine"}
        else:
            first, place = FLOWS["affine"](force=True), folder / "affine"
            first.run(*job.pair, out_dir=str(place), **shared, **affine)
            concerns += first.receipts[0]["warnings"]
            shutil.move(place / "receipt.json", out.temporary(to["affine_receipt"]))
            own |= {"prealign_file": str(place / "affine.txt")}
    flow.run(*job.pair, out_dir=str(folder), out_itk=itk, **shared, **own)
    names = {"receipt": "receipt.json", "transform": itk}
    names |= {"image": _MOVED[job.operation]}
    for what, name in names.items():
        if what in to:
            shutil.move(folder / name, out.temporary(to[what]))
    return concerns + flow.receipts[0]["warnings"]


def _write(out, path, content):
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    out.temporary(path).write_text(text, encoding="utf-8")
