"""Build the Cython kernels. Everything else about the package is in pyproject.toml."""

from glob import glob
import os
from pathlib import Path
import runpy
import sys
import tempfile

from Cython.Build import cythonize
import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# DIPY_PPIR_BOUNDSCHECK=1 turns index checks back on in every kernel: slow, for
# continuous integration and for hunting a crash.
CHECKED = os.environ.get("DIPY_PPIR_BOUNDSCHECK", "0") == "1"

KERNELS = (
    "field61",
    "field127",
    "ring32",
    "ring64",
    "ring128",
    "carry",
    "windows",
    "parzen",
    "sampling",
    "lattice",
)
# What the kernels include.
INCLUDED = sorted(glob("cython_kernels/*.h") + glob("cython_kernels/*.pxi"))
# Not imported: the package wants to have its kernels.
digest = runpy.run_path("dipy_ppir/_kernels/digest.py")["digest"]
COMPILE_ARGS = [] if sys.platform == "win32" else ["-O3"]


def openmp_flags():
    """The compiler's flags for OpenMP; none where it lacks OpenMP."""
    from distutils.ccompiler import new_compiler
    from distutils.errors import CCompilerError, DistutilsError
    from distutils.sysconfig import customize_compiler

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(
            "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
        )
        compiler = new_compiler()
        customize_compiler(compiler)
        try:
            objects = compiler.compile(
                [str(source)], output_dir=folder, extra_postargs=["-fopenmp"]
            )
            compiler.link_executable(
                objects, str(Path(folder, "probe")), extra_postargs=["-fopenmp"]
            )
        except (CCompilerError, DistutilsError, OSError):
            return []
    return ["-fopenmp"]


OPENMP = openmp_flags()


class BuildPython(build_py):
    """Leaves the digest of the kernels' sources beside the kernels.

    It is among what sites compare: compiled kernels differ from machine to machine.
    """

    def run(self):
        super().run()
        folder = "" if self.editable_mode else self.build_lib
        file = Path(folder, "dipy_ppir", "_kernels", "sources.py")
        file.write_text(
            '"""SHA-256 of the sources of the kernels; written when they were built."""'
            f'\n\nDIGEST = "{digest(".")}"\n'
        )


extensions = [
    Extension(
        f"dipy_ppir._kernels.{name}",
        [f"cython_kernels/{name}.pyx"],
        include_dirs=[np.get_include(), "cython_kernels"],
        depends=INCLUDED,
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        extra_compile_args=COMPILE_ARGS + OPENMP,
        extra_link_args=OPENMP,
    )
    for name in KERNELS
]

setup(
    cmdclass={"build_py": BuildPython},
    # Each kernel is one translation unit of some seconds.
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        extensions,
        compiler_directives={
            "language_level": 3,
            "boundscheck": CHECKED,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": CHECKED,
            "embedsignature": True,
        },
    ),
)
