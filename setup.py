"""Build the Cython kernels. Everything else about the package is in pyproject.toml."""

import os
import sys

from Cython.Build import cythonize
import numpy as np
from setuptools import Extension, setup

# DIPY_PPIR_BOUNDSCHECK=1 turns index checks back on in every kernel: slow, for
# continuous integration and for hunting a crash.
CHECKED = os.environ.get("DIPY_PPIR_BOUNDSCHECK", "0") == "1"

KERNELS = ("field61", "field127", "ring64", "parzen", "sampling")
COMPILE_ARGS = [] if sys.platform == "win32" else ["-O3"]

extensions = [
    Extension(
        f"dipy_ppir._kernels.{name}",
        [f"cython_kernels/{name}.pyx"],
        include_dirs=[np.get_include(), "cython_kernels"],
        depends=["cython_kernels/dispatch.h", "cython_kernels/dispatch.pxi"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        extra_compile_args=COMPILE_ARGS,
    )
    for name in KERNELS
]

setup(
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
    )
)
