"""What is public is there, annotated where that was promised, and documented."""

import importlib
from importlib.resources import files
import inspect
import pkgutil

from numpydoc.validate import validate
import pytest

import dipy_ppir.align
from dipy_ppir.mpc import PUBLIC

#: Docstrings are there, with known sections in order, types as NumPy writes them, and a
#: summary that is one sentence on one line.
CHECKS = {
    *("GL05", "GL06", "GL07", "GL08", "GL09", "GL10"),
    *("SS01", "SS02", "SS03", "SS04", "SS06"),
    *("PR05", "PR06", "PR10"),
}
MODULES = [
    f"dipy_ppir.align.{module.name}"
    for module in pkgutil.iter_modules(dipy_ppir.align.__path__)
]


def members(cls):
    """Public functions and properties of a class, and what makes its objects."""
    for name, member in vars(cls).items():
        inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
        made = name in ("__init__", "__enter__", "__exit__")
        if not inspect.isfunction(inner) or (name.startswith("_") and not made):
            continue
        # What dataclasses write has the annotations of the fields.
        if inner.__module__ == cls.__module__:
            yield f"{cls.__qualname__}.{name}", inner


def public():
    """Pairs of a module's name and a name that it makes public."""
    return [(module, name) for module, names in PUBLIC.items() for name in names]


@pytest.mark.parametrize("module, name", public())
def test_what_is_public_is_annotated(module, name):
    found = getattr(importlib.import_module(f"dipy_ppir.mpc.{module}"), name)
    functions = [(name, found)] if inspect.isfunction(found) else []
    if inspect.isclass(found):
        functions = list(members(found))
        assert functions or issubclass(found, Exception) or found.__annotations__
    for label, function in functions:
        signature = inspect.signature(function)
        bare = [
            argument
            for argument, parameter in signature.parameters.items()
            if parameter.annotation is parameter.empty
            and argument not in ("self", "cls")
        ]
        assert not bare, f"{label}: {bare}"
        # wrapped by contextmanager, it says what the generator gives
        assert signature.return_annotation is not signature.empty, label


def test_every_public_name_is_in_the_words_of_the_package():
    words = dipy_ppir.mpc.__doc__
    for module, name in public():
        assert f"`{name}`" in words or module == "errors", name
    errors = importlib.import_module("dipy_ppir.mpc.errors")
    classes = [n for n, c in vars(errors).items() if inspect.isclass(c)]
    assert sorted(classes) == sorted(PUBLIC["errors"])


def test_the_marker_for_type_checkers_is_installed():
    assert (files("dipy_ppir") / "py.typed").is_file()


def documented(module):
    """Names of a module's public functions, classes and their methods."""
    for name, found in vars(importlib.import_module(module)).items():
        own = getattr(found, "__module__", None) == module
        if name.startswith("_") or not own:
            continue
        if inspect.isfunction(found) or inspect.isclass(found):
            yield f"{module}.{name}"
        if inspect.isclass(found):
            for inner, member in vars(found).items():
                kinds = property, classmethod, staticmethod
                if inner.startswith("_"):
                    continue
                if inspect.isfunction(member) or isinstance(member, kinds):
                    yield f"{module}.{name}.{inner}"


@pytest.mark.parametrize("module", [*MODULES, *(f"dipy_ppir.mpc.{m}" for m in PUBLIC)])
def test_docstrings_can_be_rendered(module):
    wrong = [
        (name, code, message)
        for name in documented(module)
        for code, message in validate(name)["errors"]
        if code in CHECKS
    ]
    assert not wrong
