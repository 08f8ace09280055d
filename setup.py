"""The compiled extensions; everything else about the distribution is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

PYTHON = "0x030B0000"
"""The oldest supported Python: with its stable ABI (PEP 384) one binary serves all later ones."""


def extension(name: str) -> Extension:
    """Return the extension whose C is in the folder of its package."""
    folder = Path(*name.split(".")[:-1])
    return Extension(
        name,
        sorted(map(str, folder.glob("*.c"))),
        depends=sorted(map(str, folder.glob("*.h"))),
        define_macros=[("Py_LIMITED_API", PYTHON)],
        py_limited_api=True,
        # -O3 and no -g, whatever this Python was built with. Errors for warnings are a matter of `./dev lint`: a
        # newer compiler's new warning must not keep anyone from installing.
        extra_compile_args=["-std=c11", "-O3", "-g0", "-fvisibility=hidden"],
    )


setup(
    ext_modules=[extension("collector.compiled.loops"), extension("correlator.compiled.joiner")],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
