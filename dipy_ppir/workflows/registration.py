"""What the commands that register do alike, here or as one site of a session."""

from contextlib import contextmanager
from functools import cache, partial
import inspect
import logging
from pathlib import Path

from dipy.align.imaffine import AffineMap
from dipy.io.image import save_nifti

from dipy_ppir.align import plausibility
from dipy_ppir.align.alone import check_parties
from dipy_ppir.align.estimate import estimate
from dipy_ppir.align.facts import OwnFiles
from dipy_ppir.align.itkfiles import check_ending
from dipy_ppir.align.parameters import ParameterError
from dipy_ppir.mpc.session import PARTIES
from dipy_ppir.workflows import figures, inputs, report
from dipy_ppir.workflows.course import Course
from dipy_ppir.workflows.flow import (
    OutputFilesFlow,
    beside,
    check_name,
    pictures,
    short_name,
    written_files,
)
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.operations import check_plan
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.progress import display, estimate_text
from dipy_ppir.workflows.remote import (
    Site,
    check_flags,
    check_others,
    check_words,
    finish,
    register,
    write_receipt,
)
from dipy_ppir.workflows.results import save_itk

logger = logging.getLogger("dipy_ppir")

IMAGES = ("static", "moving")
NIFTI = (".nii", ".nii.gz")


class RegistrationFlow(OutputFilesFlow):
    """A command that registers two images that two parties hold.

    The ``run`` of a subclass has the signature and the docstring from which DIPY makes
    the command line, and hands its arguments to `register`.

    Attributes
    ----------
    operation : str
        what session files call it.
    outputs : dict
        flags that name files of results, in the order of the signature, to what is in
        them: "image", "transform" or one of `optional`.
    optional : dict
        results that are written only if a flag says so, to this flag.
    belongs : dict
        flags to the image whose owner gives them in a session.
    also_read : tuple of str
        flags that name files to read, besides the images.
    settled : tuple of str
        flags that a session file settles.
    spelling : dict
        parameters to their flags, where these are called otherwise.
    pictures : dict
        names of pictures to their kinds.
    own_pictures : dict
        the same for an owner in a session, who has one image.
    receipts : list of dict
        one for each pair that was registered.
    """

    def register(self, flags):
        """Register all pairs, or this site's image with that of another.

        Parameters
        ----------
        flags : dict
            the arguments of ``run``, as ``locals()`` has them.
        """
        flags = {flag: value for flag, value in flags.items() if flag != "self"}
        files = {name: flags[f"{name}_image_files"] for name in IMAGES}
        self.receipts = []
        in_sessions = {flag: flags[flag] for flag in ("identity", "listen", "resume")}
        check_words(files, flags["session"], **in_sessions)
        if flags["session"]:
            self._register_at_site(files, flags)
        else:
            self._register_here(files, flags)

    # -- what the commands differ in --------------------------------------

    def at_site(self, site, flags):
        """Arguments of `remote.register` that only this command has, checked.

        What the session file settles of `optional` is written into `flags`.
        """
        raise NotImplementedError

    def parameters(self, flags):
        """Parameters of the registration, checked before any file is read.

        Returns
        -------
        parameters : AffineParameters or SynParameters
        """
        raise NotImplementedError

    def steps(self, parameters):
        """Names of the steps that are taken one after the other."""
        raise NotImplementedError

    def load(self, paths, flags, parameters):
        """Both images of a pair, their ``_grid2world`` and what else is read.

        Everything is checked that the registration will refuse.
        """
        raise NotImplementedError

    def compute(self, images, parameters, progress, wanted, **options):
        """Register a pair that was loaded.

        Parameters
        ----------
        images : dict
            of `load`.
        parameters : AffineParameters or SynParameters
        progress : callable
            display for the callback.
        wanted : set of str
            of `optional`.
        **options
            of the function: ``strict``, whether a result that is not plausible is an
            error, and ``parties``, how many there are.

        Returns
        -------
        moved, transform, *more, receipt
        """
        raise NotImplementedError

    def save(self, out, files, images, transform, *more):
        """Write what was found, but for the moved image, under temporary names."""
        raise NotImplementedError

    def start(self, images):
        """The matrix from static to moving space that was there before, mm."""
        raise NotImplementedError

    def checked(self, schema, **given):
        """Parameters, of which a mistake is told by the name of the flag."""
        with self._spelled():
            parameters = schema(**given)
        inputs.explain(check_plan, parameters)
        return parameters

    @contextmanager
    def _spelled(self):
        """Tell of mistakes in parameters by the names of their flags."""
        try:
            yield
        except ParameterError as exc:
            text = exc.spelled(lambda name: f"--{self.spelling.get(name, name)}")
            raise InputError(text) from None

    # -- one site of a session --------------------------------------------

    def _register_at_site(self, files, flags):
        check_flags({flag: flags[flag] for flag in self.settled}, self.run)
        self._check_names(flags)
        site = Site(flags["session"], flags["identity"], flags["listen"])
        site.check_owner(self.operation, files)
        check_others(
            site, {flag: (image, flags[flag]) for flag, image in self.belongs.items()}
        )
        for flag in ("inv_static", "out_itk"):
            if flags[flag] and not site.gets_result:
                raise InputError(
                    f"--{flag} needs the transform, which the session file gives to "
                    "the moving owner only; leave it out"
                )
        own = self.at_site(site, flags)
        names = {kind: flags[flag] for flag, kind in self._results(flags).items()}
        names["receipt"] = flags["receipt"]
        made = {}
        if not flags["no_pictures"]:
            made = pictures(self.own_pictures)
            names |= {name: name for name in made} | report.wanted(flags["report"])
        with site.declining():
            receipt = register(
                site,
                files[site.image],
                flags[f"{site.image}_vol_idx"],
                {kind: self._in_folder(name, flags) for kind, name in names.items()},
                resume=flags["resume"],
                strict=flags["strict"],
                force=self._force_overwrite,
                pictures=made,
                **own,
            )
        self.receipts.append(receipt)

    # -- all parties on this machine --------------------------------------

    def _register_here(self, files, flags):
        parameters = self.parameters(flags)
        options = {"strict": bool(flags["strict"]), "parties": flags["parties"]}
        with self._spelled():
            check_parties(options["parties"], None, self.operation, parameters)
        self._check_names(flags)
        for path in files.values():
            if not str(path).strip():
                raise InputError("the name of an image is empty; give a NIfTI file")
        made, reported = {}, {}
        if not flags["no_pictures"]:
            made, reported = pictures(self.pictures), report.wanted(flags["report"])
        given = [flags[flag] for flag in (*self._results(flags), "receipt")]
        given += reported.values()
        with new_folders([self._in_folder(name, flags) for name in given]):
            extras = {**{name: name for name in made}, **reported}
            jobs = self._jobs(files, flags, extras)
            read = [f for paths, _ in jobs for f in paths.values()]
            read += [flags[flag] for flag in self.also_read if flags[flag]]
            written = written_files(jobs)
            with OutputFiles(written, read, force=self._force_overwrite) as out:
                if len(jobs) > 1:
                    # A bad pair is found before others are registered for nothing.
                    for paths, _ in jobs:
                        self.load(paths, flags, parameters)
                for paths, to in jobs:
                    own = self._own_files(paths, flags)
                    images = self.load(paths, flags, parameters)
                    self._register_pair(
                        paths, own, images, parameters, to, out, options
                    )

    def _jobs(self, files, flags, extras):
        """The pairs that are named: (images, files to write by what is in them)."""
        rows = self.rows(
            [files[name] for name in IMAGES],
            flags["out_dir"],
            [flags[flag] for flag in self.outputs],
        )
        results = self._results(flags)
        (main,) = (flag for flag, kind in results.items() if kind == "transform")
        others = {"receipt": flags["receipt"], **extras}
        jobs = []
        for static, moving, *named in rows:
            named = dict(zip(self.outputs, named, strict=True))
            to = {kind: Path(named[flag]) for flag, kind in results.items()}
            for kind, name in others.items():
                to[kind] = beside(named[main], flags[main], name)
            jobs.append(({"static": static, "moving": moving}, to))
        return jobs

    def _own_files(self, paths, flags):
        """What is read for a pair, by what is in it; for the receipt."""
        files = {f"{name} image": path for name, path in paths.items()}
        for flag in self.also_read:
            files[flag.removesuffix("_file").replace("_", " ")] = flags[flag]
        return OwnFiles(files)

    def _register_pair(self, paths, own, images, parameters, files, out, options):
        """Register one pair and write its files."""
        steps = self.steps(parameters)
        logger.info(
            "Registering %s to %s: %s",
            paths["moving"],
            paths["static"],
            ", ".join(step.replace("_", " ") for step in steps),
        )
        concerns = [c for n in IMAGES for c in inputs.of_header(paths[n], n)]
        plausibility.tell(concerns, strict=options["strict"])
        shown = [step for step in steps if step != "center_of_mass"]
        wanted = set(self.optional) & set(files)
        ahead = estimate(
            parameters,
            images["static"].shape,
            images["moving"].shape,
            static_grid2world=images["static_grid2world"],
            alone=options["parties"] != PARTIES,
        )
        logger.info("%s", estimate_text(ahead))
        with display(shown, len(parameters.level_iters)) as progress:
            progress.expect(ahead)
            course = Course(progress)
            moved, transform, *more, receipt = self.compute(
                images, parameters, course, wanted, **options
            )
        receipt["warnings"] = [*concerns, *receipt["warnings"]]
        own.enter(receipt)
        course.enter(receipt)
        self.receipts.append(receipt)
        save_nifti(out.temporary(files["image"]), moved, images["static_grid2world"])
        self.save(out, files, images, transform, *more)
        if "itk" in files:
            save_itk(out.temporary(files["itk"]), transform)
        write_receipt(out, files["receipt"], receipt)
        names = {name: short_name(paths[name]) for name in IMAGES}
        self._draw(out, files, images, moved, transform, names, receipt)
        finish(out, receipt, files)

    def _draw(self, out, files, images, moved, transform, names, receipt):
        """Draw what is wanted; what cannot be drawn is taken out of `files`."""
        kinds = {n: kind for n, kind in self.pictures.items() if n in files}
        if not kinds and "report" not in files:
            return
        static, grid2world = images["static"], images["static_grid2world"]
        title = f"{names['moving']} on {names['static']}"

        @cache
        def before():
            return AffineMap(
                self.start(images),
                domain_grid_shape=static.shape,
                domain_grid2world=grid2world,
                codomain_grid_shape=images["moving"].shape,
                codomain_grid2world=images["moving_grid2world"],
            ).transform(images["moving"])

        def overlay(kind, path):
            figures.save_overlay(
                path, kind, static, before(), moved, grid2world, title=title
            )

        def on_static(kind, path):
            figures.save_map(path, kind, static, transform, title=title)

        def page(path):
            both = static, before(), moved, grid2world, transform
            shown = report.pictures_of(report.of_both_images, *both)
            report.save_report(path, receipt, names=names, pictures=shown)

        draw = {
            name: partial(overlay if name in figures.PICTURES else on_static, kind)
            for name, kind in kinds.items()
        }
        draw |= {"report": page} if "report" in files else {}
        for name, write in draw.items():
            if not out.attempt(files[name], write):
                del files[name]

    # -- names of files -----------------------------------------------------

    def _results(self, flags):
        """Flags of the results that are wanted, to what is in them."""
        return {
            flag: kind
            for flag, kind in self.outputs.items()
            if kind not in self.optional or flags[self.optional[kind]]
        }

    def _check_names(self, flags):
        defaults = inspect.signature(self.run).parameters
        if flags["out_itk"]:
            field = self.operation != "affine"
            inputs.explain(partial(check_ending, field=field), flags["out_itk"])
        for flag in (*self.outputs, "receipt"):
            if flag == "out_itk":
                continue
            nifti = defaults[flag].default.endswith(NIFTI)
            check_name(flags[flag], flag, NIFTI if nifti else ())
        check_name(flags["report"], "report", report.HTML)

    @staticmethod
    def _in_folder(name, flags):
        return Path(flags["out_dir"] or ".", name)


def load_images(paths, flags, function):
    """Both images of a pair and their ``_grid2world``, read by a command.

    Parameters
    ----------
    paths, flags : dict
    function : str
        what to call from Python with 2D images.

    Returns
    -------
    images : dict
    """
    images = {}
    for name in IMAGES:
        images[name], images[f"{name}_grid2world"] = inputs.load_volume(
            paths[name], name, flags[f"{name}_vol_idx"], function=function
        )
    return images
