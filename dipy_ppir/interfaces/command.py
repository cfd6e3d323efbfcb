"""The base of the interfaces: commands, their common inputs, and their outputs."""

import os
import shlex

from nipype.interfaces.base import (
    CommandLine,
    CommandLineInputSpec,
    File,
    isdefined,
    traits,
)

from dipy_ppir.interfaces.base import nipype_that_calls_nobody

#: What stands for the data of another site.
REMOTE = "remote"


class OwnFile(File):
    """A file that is there, by its whole path: nodes run in folders of their own."""

    def __init__(self, **metadata):
        super().__init__(exists=True, **metadata)

    def validate(self, objekt, name, value, return_pathlike=False):
        """The path, as nipype's files give it."""
        found = super().validate(objekt, name, value, return_pathlike)
        return type(found)(os.path.abspath(found))


def own_or_remote(position, **metadata):
    """A file that this site has, or the word that stands for another site's."""
    return traits.Either(
        OwnFile(),
        traits.Enum(REMOTE),
        argstr="%s",
        position=position,
        mandatory=True,
        **metadata,
    )


def levels(kind, name, value=None, **metadata):
    """A value for each level."""
    given = {} if value is None else {"value": value}
    return traits.List(
        kind, minlen=1, maxlen=16, argstr=f"--{name} %s", **given, **metadata
    )


class CommandInputSpec(CommandLineInputSpec):
    """Inputs of all commands."""

    out_dir = traits.Str(
        argstr="--out_dir %s",
        desc="folder for the results, by default that of the node",
    )
    force = traits.Bool(False, argstr="--force", desc="replace files that are there")
    log_level = traits.Enum(
        "INFO",
        "CRITICAL",
        "ERROR",
        "WARNING",
        "DEBUG",
        "NOTSET",
        argstr="--log_level %s",
        nohash=True,
        desc="the least important messages that are shown",
    )
    quiet = traits.Bool(
        False,
        argstr="--quiet",
        nohash=True,
        desc="print nothing but warnings and errors",
    )
    debug = traits.Bool(
        False, argstr="--debug", nohash=True, desc="on an error show where it occurred"
    )


class SessionInputSpec(CommandInputSpec):
    """Inputs of the commands that can be one party of a session."""

    identity = traits.Str(
        argstr="--identity %s",
        requires=["session"],
        desc="folder of this site's key, by default ~/.dipy_ppir",
    )
    listen = traits.Str(
        argstr="--listen %s",
        requires=["session"],
        desc="address to listen on, host:port",
    )
    resume = traits.Bool(
        False,
        argstr="--resume",
        requires=["session"],
        nohash=True,
        desc="go on with a session that was interrupted, if all parties do; its "
        "checkpoint is in out_dir, which must not be the node's own folder, because "
        "nipype empties that",
    )
    parties = traits.Enum(
        3,
        2,
        argstr="--parties %d",
        xor=["session"],
        desc="without a session, 3 for two owners and a helper, or 2 for two owners "
        "alone",
    )
    strict = traits.Bool(
        False,
        argstr="--strict",
        desc="end with an error where the result is not plausible",
    )
    receipt = traits.Str(
        "receipt.json",
        argstr="--receipt %s",
        desc="name of the JSON file that states what each party learned",
    )
    report = traits.Str(
        "report.html",
        argstr="--report %s",
        desc="name of the page that shows the result and what each party learned",
    )
    no_pictures = traits.Bool(
        False, argstr="--no_pictures", desc="do not draw the result, nor a report"
    )


def session_without(*settled):
    """The session file, and the inputs that it settles."""
    return OwnFile(
        argstr="--session %s",
        xor=list(settled),
        desc=f'session file (TOML), with "{REMOTE}" in place of the other\'s data',
    )


class PpirCommand(CommandLine):
    """A command of dipy_ppir.

    Attributes
    ----------
    terminal_output : str
        what nipype does with what the command prints; see `CommandLine`.
    """

    #: Outputs that are written only if an input says so, to this input.
    _optional = {}

    def __init__(self, command=None, **inputs):
        with nipype_that_calls_nobody():
            super().__init__(command, **inputs)

    def _format_arg(self, name, trait_spec, value):
        # Nipype has a shell read the command line, and quotes some of it only.
        if isinstance(value, str):
            return trait_spec.argstr % shlex.quote(value)
        return super()._format_arg(name, trait_spec, value)

    def _written(self):
        """Names of the outputs that such a run writes."""
        return [
            name
            for name in self.output_spec().copyable_trait_names()
            if name not in self._optional or self._is_set(self._optional[name])
        ]

    def _is_set(self, name):
        value = getattr(self.inputs, name)
        return isdefined(value) and bool(value)

    def _list_outputs(self):
        outputs = self.output_spec().get()
        return outputs | {name: self._path(name) for name in self._written()}

    def _path(self, output):
        """Whole path of the file of an output."""
        folder = self.inputs.out_dir if self._is_set("out_dir") else ""
        return os.path.abspath(os.path.join(folder, self._name(output)))

    def _name(self, output):
        """Name of the file of an output."""
        given = getattr(self.inputs, output)
        return given if isdefined(given) else self.inputs.trait(output).default


class RegistrationCommand(PpirCommand):
    """A command that registers, here or as one site of a session."""

    #: The inputs that the owners give.
    _data = ("static_image_files", "moving_image_files")
    #: The outputs that only an owner of the moving data gets.
    _of_moving = ()
    #: Pictures to their files, with both images and at a site of a session.
    _pictures, _own_pictures = {}, {}

    def _written(self):
        names = super()._written()
        drawn = self._pictures
        if self._is_set("session"):
            drawn = self._own_pictures
            names = [n for n in names if self._is_mine(n)]
        names = [n for n in names if n in drawn or n not in self._all_pictures()]
        return [n for n in names if n not in {*drawn, "report"} or self._drawn(n)]

    def _all_pictures(self):
        return {**self._pictures, **self._own_pictures}

    def _drawn(self, picture):
        # Without matplotlib, which is there where the command runs or is not.
        return not self._is_set("no_pictures") and os.path.exists(self._path(picture))

    def _is_mine(self, output):
        """Whether this owner writes an output at the end of the session."""
        plan, image = self._plan(), self._image()
        if output in ("receipt", "report"):
            return True
        if output in self._of_moving and image != "moving":
            return False
        return plan.result_to in ("both", image)

    def _image(self):
        static, _ = (getattr(self.inputs, name) for name in self._data)
        return "moving" if static == REMOTE else "static"

    def _plan(self):
        from dipy_ppir.mpc.sessionfile import SessionFile

        return SessionFile.read(self.inputs.session)

    def _name(self, output):
        return self._all_pictures().get(output) or super()._name(output)
