"""The compiled extension; everything else about the distribution is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("collector/compiled")
SOURCES = sorted(map(str, FOLDER.glob("*.c")))
HEADERS = sorted(map(str, FOLDER.glob("*.h")))
PYTHON = "0x030B0000"
"""The oldest supported Python: with its stable ABI (PEP 384) one binary serves all later ones."""

setup(
    ext_modules=[
        Extension(
            "collector.compiled.loops",
            SOURCES,
            depends=HEADERS,
            define_macros=[("Py_LIMITED_API", PYTHON)],
            py_limited_api=True,
            # -O3 and no -g, whatever this Python was built with. Errors for warnings are a matter of `./dev lint`: a
            # newer compiler's new warning must not keep anyone from installing.
            extra_compile_args=["-std=c11", "-O3", "-g0", "-fvisibility=hidden"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
