"""The command ``dipy_ppir_cohort``: many pairs between two or more sites."""

import argparse
import logging
import os
from pathlib import Path

from dipy_ppir.align.remote import WORD
from dipy_ppir.mpc.identity import Identity
from dipy_ppir.mpc.sessionfile import parse_address
from dipy_ppir.workflows.align import SecureImageRegistrationFlow
from dipy_ppir.workflows.cohortbits import check_bits, explain_cohort
from dipy_ppir.workflows.cohortfolder import check_folder, mark_folder
from dipy_ppir.workflows.cohortimages import check_images, read_images
from dipy_ppir.workflows.cohortplan import HELPER_NAME, CohortPlan, toml_text
from dipy_ppir.workflows.engine import dask_client, run_all
from dipy_ppir.workflows.freeform import SecureFreeFormRegistrationFlow
from dipy_ppir.workflows.inputs import InputError, load_matrix
from dipy_ppir.workflows.operations import OPERATIONS, operation_of, parameter_lines
from dipy_ppir.workflows.outcomes import FILE, summary, write_table
from dipy_ppir.workflows.outputs import new_folders
from dipy_ppir.workflows.pairs import RECEIPT, RESULTS, SESSION, Task, facts, state
from dipy_ppir.workflows.points import SecurePointRegistrationFlow
from dipy_ppir.workflows.sites import log_to_stderr, site_parser
from dipy_ppir.workflows.streams import be_quiet, say
from dipy_ppir.workflows.syn import SecureSynRegistrationFlow

logger = logging.getLogger("dipy_ppir")

FLOWS = {
    "affine": SecureImageRegistrationFlow,
    "syn": SecureSynRegistrationFlow,
    "freeform": SecureFreeFormRegistrationFlow,
    "points": SecurePointRegistrationFlow,
}


def cohort(arguments=None):
    """``dipy_ppir_cohort``: register many pairs between two or more sites.

    Returns
    -------
    status : int
        0 if all pairs are done, 1 otherwise.
    """
    given = cohort_parser().parse_args(arguments)
    be_quiet(given.quiet)
    log_to_stderr(given.log_level)
    if given.new:
        print(template(given.new), end="")
        return 0
    if given.plan is None:
        raise InputError(
            "give the plan of the cohort; dipy_ppir_cohort --new affine prints one to "
            "start from"
        )
    plan = CohortPlan.read(given.plan)
    if given.check:
        say(explain_cohort(plan))
        return 0
    if given.pair:
        _register_here(plan, given)
        return 0
    return Coordinator(plan, given).run()


class Coordinator:
    """This site's part in a cohort.

    Parameters
    ----------
    plan : CohortPlan
    given : argparse.Namespace
        the flags.

    Attributes
    ----------
    site : str
        the short name of this site, "helper", or "" where all images are here.
    outcomes : dict
        maps names of pairs to what became of them, in the order of the plan.

    Raises
    ------
    InputError
        if something cannot work, before anybody is met.
    """

    def __init__(self, plan, given):
        self.plan, self.given = plan, given
        self.folder = given.out_dir.absolute()
        self.site = ""
        if plan.sites:
            identity = Identity.load(given.identity)
            self.site = plan.site_of(identity.fingerprint)
        self._check_flags()
        self.pairs = plan.pairs_of(self.site)
        if not self.pairs:
            raise InputError(f"no pair of the plan names {self.site}: nothing is to do")
        self.parameters = operation_of(plan.session(self.pairs[0]))[1]
        if plan.sites:
            check_bits(plan, self.site, given.limit_bits)
        self._images = self._read_images()
        check_folder(self.folder, plan, self.site, anew=bool(given.again))
        states = self._states()
        again = self._again()
        self.outcomes, self._tasks, self._absent = {}, [], {}
        with new_folders([self.folder / FILE]):
            self.folder.mkdir(parents=True, exist_ok=True)
            mark_folder(self.folder, plan, self.site)
            for pair in self.pairs:
                task = self._task(pair, anew=pair.name in again)
                outcome = task.outcome("open")
                if states[pair.name] == "finished" and pair.name not in again:
                    receipt = self.folder / pair.name / RECEIPT
                    outcome = task.outcome("done", **facts(receipt))
                elif not again or pair.name in again:
                    self._tasks.append((pair, task))
                self.outcomes[pair.name] = outcome
            write_table(self.folder, self.outcomes.values())

    # -- what is wanted ------------------------------------------------------

    def _check_flags(self):
        given, plan, owner = self.given, self.plan, self.site not in ("", HELPER_NAME)
        if plan.sites and self.site == HELPER_NAME:
            for flag in ("images", "prealign_dir", "limit_bits", "strict"):
                if getattr(given, flag) not in (None, False):
                    raise InputError(
                        f"this site's certificate is the helper's, which has no "
                        f"images; leave out --{flag}, or give the folder of another "
                        "key with --identity"
                    )
        elif given.images is None:
            raise InputError(
                "say which file each image is: give a table with the columns "
                "participant_id and file with --images"
            )
        if not plan.sites:
            for flag in ("identity", "listen", "limit_bits"):
                if getattr(given, flag) is not None:
                    raise InputError(
                        f"--{flag} is for a plan between sites; leave it out"
                    )
        operation, reveal = plan.shared["operation"], plan.shared.get("reveal")
        if owner and given.limit_bits is not None:
            counted = operation == "points" or (operation, reveal) == (
                "affine",
                "transform",
            )
            if not counted:
                raise InputError(
                    "--limit_bits is for points, and for affine registration with "
                    'reveal = "transform"; leave it out'
                )
        if given.prealign_dir is not None and operation not in ("syn", "freeform"):
            raise InputError(
                f"--prealign_dir is not for operation {operation!r}; leave it out"
            )
        if given.listen is not None and "address" not in plan.sites[self.site]:
            raise InputError(
                f"{self.site} has no address in the plan, so nobody dials it; leave "
                "out --listen"
            )
        if given.scheduler and given.slurm:
            raise InputError("give --scheduler or --slurm, not both")
        if given.slurm and "address" in plan.sites.get(self.site, {}):
            raise InputError(
                "nobody knows at which node Slurm will start a pair, so that this "
                "site cannot be dialled there: "
                + (
                    "run the helper without --slurm"
                    if self.site == HELPER_NAME
                    else "leave its address out of the plan, at all sites, or run it "
                    "without --slurm"
                )
            )

    def _read_images(self):
        """The files of this site's images that the plan names, by pseudonym."""
        if self.site == HELPER_NAME:
            return {}
        images, wanted = read_images(self.given.images), {}
        for pair in self.pairs:
            for part, image in pair.images.items():
                # More is asked of moving images.
                if image.site == self.site and wanted.get(image.pseudonym) != "moving":
                    wanted[image.pseudonym] = part
        operation = self.plan.shared["operation"]
        check_images(images, wanted, operation, self.parameters)
        if idle := len(set(images) - set(wanted)):
            logger.info("%d lines of %s are in no pair", idle, self.given.images)
        for pair in self.pairs:
            matrix = self._prealign(pair)
            if matrix is not None:
                load_matrix(matrix, "the prealign file")
        return images

    def _prealign(self, pair):
        """The matrix that a pair starts from, at the moving owner; None without."""
        if self.given.prealign_dir is None or pair.moving.site != self.site:
            return None
        return self.given.prealign_dir.absolute() / pair.name / RESULTS["affine"]

    def _result(self, pair):
        """Name of the file that this party has when a pair is done; or None."""
        mine = pair.image_of(self.site) if self.plan.sites else "moving"
        gets = self.plan.shared.get("result_to", "both") in ("both", mine)
        gets = gets or not self.plan.sites
        return RESULTS[self.plan.shared["operation"]] if mine and gets else None

    def _states(self):
        """How far each pair has come, by its folder."""
        states = {}
        for pair in self.pairs:
            session = self.plan.session(pair) if self.plan.sites else None
            text = toml_text(self.plan.contents(pair))
            folder = self.folder / pair.name
            states[pair.name] = state(folder, session, text, self._result(pair))
        given = self.given
        others = [name for name, s in states.items() if s == "other"]
        if others and not given.again:
            raise InputError(
                f"{self.folder / others[0]} is of another plan, or of this one before "
                "it was changed; choose another --out_dir"
            )
        if set(states.values()) != {"new"} and not (given.resume or given.again):
            raise InputError(
                f"{self.folder} has pairs of an earlier run; add --resume to go on "
                "with it, or choose another --out_dir"
            )
        return states

    def _again(self):
        """Names of the pairs that are to be registered anew."""
        names = {str(pair.place): pair.name for pair in self.pairs}
        names |= {pair.name: pair.name for pair in self.pairs}
        for name in self.given.again:
            if name not in names:
                raise InputError(
                    f"--again {name} is no pair of this site; give its folder's name, "
                    f"for example {self.pairs[0].name}"
                )
        return {names[name] for name in self.given.again}

    def _task(self, pair, *, anew):
        """What to run for a pair."""
        folder, given, plan = self.folder / pair.name, self.given, self.plan
        operation = plan.shared["operation"]
        arguments = ["--out_dir", str(folder)]
        if not plan.sites:
            command = "dipy_ppir_cohort"
            arguments += [str(given.plan.absolute()), "--pair", pair.name]
            arguments += ["--images", str(given.images.absolute())]
            arguments += ["--force"] * (anew or given.resume)
        elif self.site == HELPER_NAME:
            command = "dipy_ppir_helper"
            arguments += [str(folder / SESSION)]
        else:
            command = OPERATIONS[operation].command
            arguments += self._owners_arguments(pair, folder)
        if plan.sites:
            if given.identity is not None:
                arguments += ["--identity", str(Path(given.identity).absolute())]
            if given.listen is not None:
                _, port = parse_address(plan.sites[self.site]["address"])
                arguments += ["--listen", f"{given.listen}:{port + plan.lane(pair)}"]
            # A pair goes on wherever an earlier run left it: all sites say so always.
            arguments += ["--force"] if anew else []
            arguments += [] if anew or operation == "points" else ["--resume"]
        matrix = self._prealign(pair)
        if matrix is not None:
            arguments += ["--prealign_file", str(matrix)]
        arguments += ["--strict"] * given.strict
        arguments += ["--log_level", given.log_level]
        threads = None
        if not (given.scheduler or given.slurm):
            threads = max((os.cpu_count() or 1) // plan.concurrent, 1)
        return Task(
            name=pair.name,
            moving=str(pair.moving),
            static=str(pair.static),
            folder=str(folder),
            command=command,
            arguments=arguments,
            text=toml_text(plan.contents(pair)),
            here=not plan.sites,
            threads=threads,
        )

    def _owners_arguments(self, pair, folder):
        part = pair.image_of(self.site)
        image = self._images[pair.images[part].pseudonym]
        files = {"static": WORD, "moving": WORD, part: str(image.file)}
        arguments = [files["static"], files["moving"]]
        arguments += ["--session", str(folder / SESSION)]
        if image.mask is not None:
            arguments += [f"--{part}_mask", str(image.mask)]
        limit = self.given.limit_bits
        counted = part == "static" or self.plan.shared["operation"] == "points"
        if limit is not None and counted:
            arguments += ["--limit_bits", f"{limit:g}"]
        return arguments

    # -- running -------------------------------------------------------------

    def run(self):
        """Register what is left; returns the exit status."""
        left = len(self._tasks)
        logger.info(
            "This is %s of %r; hash of the plan %s",
            self.site or "the place of all images",
            self.plan.title,
            self.plan.digest,
        )
        logger.info("%d pairs, of which %d are to do", len(self.pairs), left)
        if self._tasks:
            try:
                with dask_client(
                    self.plan.concurrent,
                    self.folder,
                    self.given.scheduler,
                    self.given.slurm,
                ) as client:
                    run_all(client, self._lanes(), self._done)
            except (KeyboardInterrupt, SystemExit) as exc:
                where = " at all sites" if self.plan.sites else ""
                exc.add_note(f"pairs under way were ended; go on with --resume{where}")
                raise
        outcomes = list(self.outcomes.values())
        say(summary(outcomes))
        logger.info("Saved %s", self.folder / FILE)
        return int(any(outcome.status != "done" for outcome in outcomes))

    def _lanes(self):
        """The tasks, by lane: in each one after the other."""
        if not self.plan.sites:
            return [self._in_turn(self._tasks)] * self.plan.concurrent
        lanes = [[] for _ in range(self.plan.concurrent)]
        for pair, task in self._tasks:
            lanes[self.plan.lane(pair)].append((pair, task))
        return [self._in_turn(lane) for lane in lanes]

    def _in_turn(self, tasks):
        """Tasks one by one, without those of sites that did not come before."""
        for pair, task in tasks:
            absent = [s for s in self.plan.parties(pair) if s in self._absent]
            if not absent:
                logger.info("%s begins", pair.name)
                yield task
                continue
            before = self._absent[absent[0]]
            error = (
                f"{absent[0]} did not come to {before}, and was not waited for again"
            )
            self._enter(task.outcome("skipped", error=error))

    def _done(self, task, outcome):
        """Take note of what became of a pair."""
        self._note_absent(task, outcome)
        self._enter(outcome)

    def _enter(self, outcome):
        self.outcomes[outcome.pair] = outcome
        write_table(self.folder, self.outcomes.values())
        if outcome.status == "done":
            took = f" in {outcome.seconds:g} s"
        else:
            took = f": {outcome.error}"
        over = sum(o.status != "open" for o in self.outcomes.values())
        logger.log(
            logging.INFO if outcome.status == "done" else logging.WARNING,
            "%s %s%s (%d of %d)",
            outcome.pair,
            outcome.status,
            took,
            over,
            len(self.outcomes),
        )

    def _note_absent(self, task, outcome):
        """Sites that the command of a pair has waited for in vain."""
        who, words, _ = outcome.error.partition(" did not come within ")
        if not words or outcome.status != "failed" or not self.plan.sites:
            return
        (pair,) = (pair for pair in self.pairs if pair.name == task.name)
        for party, site in zip(
            self.plan.session(pair).parties.values(),
            self.plan.parties(pair),
            strict=True,
        ):
            if party.title in who.split(" and "):
                self._absent.setdefault(site, pair.name)


def _register_here(plan, given):
    """Register one pair with both images here, in this process."""
    (pair,) = (pair for pair in plan.pairs if pair.name == given.pair)
    images = read_images(given.images)
    parameters = operation_of(plan.session(pair))[1]
    operation, flags = plan.shared["operation"], {"strict": given.strict}
    files = {part: images[image.pseudonym] for part, image in pair.images.items()}
    if operation == "points":
        flags |= {"scaling": parameters.scaling, "precision": parameters.precision}
    else:
        flags["no_pictures"] = True
        for part, image in files.items():
            if image.mask is not None:
                flags[f"{part}_mask"] = str(image.mask)
        if given.prealign_file is not None:
            flags["prealign_file"] = str(given.prealign_file)

    class Planned(FLOWS[operation]):
        """The command's flow, by the parameters of the plan."""

        def parameters(self, flags):
            """See `RegistrationFlow`."""
            flags["save_metric"] = getattr(parameters, "ret_metric", False)
            return parameters

    Planned(force=given.force).run(
        str(files["static"].file),
        str(files["moving"].file),
        out_dir=str(given.out_dir),
        **flags,
    )


def cohort_parser():
    """The arguments of ``dipy_ppir_cohort``."""
    parser = site_parser(
        "dipy_ppir_cohort",
        "Register many pairs of images between two or more sites and a helper, as one "
        "plan says that all of them hold, or with all images on this machine. What "
        "was interrupted goes on with --resume.",
    )
    parser.add_argument("plan", nargs="?", type=Path, help="the plan (TOML)")
    parser.add_argument(
        "--images",
        type=Path,
        help="this site's own table of images, which stays here: participant_id, file "
        "and, if wanted, mask, with tabs between them",
    )
    parser.add_argument(
        "--out_dir", type=Path, default=Path("."), help="a folder for each pair in it"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="say in plain words who takes part and who will learn what, and end",
    )
    parser.add_argument(
        "--new", choices=sorted(OPERATIONS), help="print a plan to fill in, and end"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with what an earlier run left"
    )
    parser.add_argument(
        "--again",
        nargs="+",
        default=[],
        metavar="PAIR",
        help="register these pairs (names of folders), and no others, from the start, "
        "whatever is there; at all sites that take part in them",
    )
    parser.add_argument(
        "--prealign_dir",
        type=Path,
        metavar="DIR",
        help="at the moving owner: output folder of an affine cohort of the same "
        "pairs, to start from",
    )
    parser.add_argument(
        "--limit_bits",
        type=float,
        metavar="BITS",
        help="at the static owner: most bits that may be opened about an image in all "
        "sessions; 0 for no limit",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="a result that is not plausible is an error",
    )
    parser.add_argument(
        "--listen",
        metavar="HOST",
        help="address of this machine to listen on, by default all of them; the ports "
        "are those of the plan",
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="of Dask, where there is one already"
    )
    parser.add_argument(
        "--slurm", action="store_true", help="run pairs as jobs of Slurm"
    )
    parser.add_argument(
        "--log_level", default="INFO", help="least important messages shown (INFO)"
    )
    # How the coordinator runs one pair with both images here.
    parser.add_argument("--pair", help=argparse.SUPPRESS)
    parser.add_argument("--force", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prealign_file", type=Path, help=argparse.SUPPRESS)
    return parser


TEMPLATE = """\
# Plan of a cohort of dipy_ppir: the same at all sites, and public among them.
title = "Cohort 1"
operation = "{operation}"
reveal = "{reveal}"
result_to = "both"
concurrent = 2                # pairs at a time; each site takes as many ports
pairs = [                     # [moving, static], each SITE/PSEUDONYM
  ["A/sub-01", "B/sub-01"],
  ["A/sub-02", "B/sub-01"],
]

# One table for each site that has images; without any all images are on this machine,
# and pairs are of pseudonyms alone. A site that can only dial out has no address.
[sites.A]
name = "Hospital A"
fingerprint = "..."           # from dipy_ppir_keygen; compare it by telephone

[sites.B]
name = "Hospital B"
fingerprint = "..."
# address = "registration.hospital-b.example:7433"

[helper]                      # has no images; independent of all sites
name = "University C"
fingerprint = "..."
address = "helper.university-c.example:7433"

[parameters]
{parameters}

[timeouts]                    # seconds
connect = 3600                # for one that is not there; it must outlast one pair
"""


def template(operation):
    """A plan to start from."""
    return TEMPLATE.format(
        operation=operation,
        reveal=next(iter(OPERATIONS[operation].opens)),
        parameters=parameter_lines(operation),
    )
