"""Builds the module against a kernel's headers, outside the repository.

A build is named by a digest of its inputs and kept, so that an unchanged module is built once. A warning is a failure.
The newest kernel's module is built in a chroot of Debian 13, into which sources and headers are copied; nothing of the
host is mounted there.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.kernels import Kernel, KernelUnavailable, cache_dir, locked, mirror, run, scratch
from tests.places import ROOT

REPOSITORY = ROOT
SOURCE = REPOSITORY / "kmod"
KEPT_S = 7 * 86400  # builds unused for a week are removed

# Debian's kbuild programs are linked with libelf and, for signing, libssl; minbase with these takes 450 MB.
TOOLCHAIN = ("gcc-14", "make", "libelf1t64", "libssl3t64")

# Its own /proc, where objtool reads its limits; no access to the host's processes or network.
INTO_CHROOT = ("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc")

# Expected warnings: gcc 10 built 5.10, and pahole is missing because there is no BTF.
HARMLESS = re.compile(r"warning: (the compiler|pahole version) differs from the one used to build the kernel")
WARNING = re.compile(r"\bwarning:|\bWARNING:|\berror:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Build:
    """A module built for a kernel."""

    kernel: Kernel
    module: Path  # mace.ko
    log: str  # of make


def build(kernel: Kernel, source: Path = SOURCE, extra: Mapping[str, str] | None = None) -> Build:
    """Build the module in `source`; `extra` are further variables of make, such as C=2 and CF= for sparse.

    Raises KernelUnavailable with the compiler's output, even for a warning.
    """
    variables = {
        "W": "1",
        "CC": kernel.wanted.compiler,
        "ARCH": "x86",
        "CONFIG_DEBUG_INFO_BTF_MODULES": "",  # would need pahole and the kernel's BTF, which only BPF programs use
        **(extra or {}),
    }
    if kernel.wanted.builds_in is None and shutil.which(kernel.wanted.compiler) is None:
        variables["CC"] = "gcc"  # on distributions other than Debian 12; `extra` may override it
        variables |= extra or {}
    place = cache_dir() / "builds" / _digest(kernel, source, variables)
    with locked(f"build-{kernel.release}"):
        if not (place / "mace.ko").exists():
            _build(kernel, source, variables, place)
        os.utime(place)
        _prune(place.parent)
    return Build(kernel, place / "mace.ko", (place / "make.log").read_text())


def _files(source: Path) -> list[Path]:
    """Return the source files of the folder, in order, without the output of a build in the tree."""
    made = re.compile(r"\..*|.*\.(o|ko|mod|mod\.c|cmd)|Module\.symvers|modules\.order")
    return sorted(path for path in source.rglob("*") if path.is_file() and not made.fullmatch(path.name))


def _digest(kernel: Kernel, source: Path, variables: Mapping[str, str]) -> str:
    told = hashlib.sha256(repr((kernel.release, sorted(variables.items()))).encode())
    for path in _files(source):
        told.update(f"\0{path.relative_to(source)}\0".encode())
        told.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{kernel.release}-{told.hexdigest()[:16]}"


def _prune(builds: Path) -> None:
    for old in builds.iterdir():
        if old.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(old, ignore_errors=True)  # another process may remove it, too


def _build(kernel: Kernel, source: Path, variables: Mapping[str, str], place: Path) -> None:
    what = f"building the module for {kernel.name} ({kernel.release})"
    if not (source / "Kbuild").exists():
        raise KernelUnavailable(f"{what}: there is no {source / 'Kbuild'}")
    with scratch("build") as folder:
        work = folder / "module"
        for path in _files(source):
            copy = work / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        if kernel.wanted.builds_in is None:
            log = run(_make(kernel, work, variables), what=what, tail_lines=200)
        else:
            log = _make_in_chroot(kernel, work, variables, what)
        warnings = [line for line in log.splitlines() if WARNING.search(line) and not HARMLESS.search(line)]
        if warnings:
            raise KernelUnavailable(f"{what}: warnings, and a warning is a failure here:\n{log}")
        if not (work / "mace.ko").exists():
            raise KernelUnavailable(f"{what}: make made no mace.ko:\n{log}")
        (work / "make.log").write_text(log)
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        work.rename(place)


def _make(kernel: Kernel, module: Path, variables: Mapping[str, str]) -> Sequence[str | Path]:
    # The Makefile of Debian's headers names the common one, and itself as KBUILD_OUTPUT, by where they would be if
    # they were installed. Hence the common one by -f, and the output empty.
    headers = kernel.headers_dir
    words: list[str | Path] = [
        "make",
        "-j2",
        "-C",
        headers,
        "-f",
        kernel.common_dir / "Makefile",
        f"O={headers}",
        "KBUILD_OUTPUT=",
    ]
    return [*words, f"M={module}", *_assignments(variables), "modules"]


def _assignments(variables: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]


# --- the chroot ---------------------------------------------------------------------------------


def _make_in_chroot(kernel: Kernel, work: Path, variables: Mapping[str, str], what: str) -> str:
    suite = kernel.wanted.builds_in
    assert suite is not None
    root = chroot(suite)
    with locked(suite):
        inside = root / "build" / work.parent.name
        _take_headers(root, kernel)
        shutil.copytree(work, inside)
    # In the chroot the headers are at their installed paths, which Debian's Makefile expects.
    headers = Path("/") / kernel.headers_dir.relative_to(kernel.root)
    make: list[str | Path] = [
        "make",
        "-j2",
        "-C",
        headers,
        f"M=/build/{inside.name}",
        *_assignments(variables),
        "modules",
    ]
    try:
        log = run([*INTO_CHROOT, f"--root={root}", *make], what=what, tail_lines=200)
        shutil.rmtree(work)
        shutil.copytree(inside, work)
        return log
    finally:
        shutil.rmtree(inside)


def chroot(suite: str) -> Path:
    """Return the root of a small Debian with the compiler; made on first use, in half a minute."""
    place = cache_dir() / suite
    with locked(suite):
        if not place.is_dir():
            with scratch(suite) as folder:
                # In a mount namespace of its own, because debootstrap mounts proc and sysfs: were it
                # interrupted, they would still be there when the scratch directory is removed.
                command = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(TOOLCHAIN)}"]
                run([*command, suite, folder / "root", mirror()], what=f"Debian {suite} for its compiler")
                for cached in (folder / "root/var/cache/apt/archives").glob("*.deb"):
                    cached.unlink()
                (folder / "root/build").mkdir()
                (folder / "root").rename(place)
    return place


def _take_headers(root: Path, kernel: Kernel) -> None:
    """Copy the headers and kbuild to the paths at which a package would install them."""
    stamp = root / "build" / f".has-{kernel.release}"
    if stamp.exists():
        return
    for path in (*kernel.root.glob("usr/src/linux-*"), *kernel.root.glob("usr/lib/linux-kbuild-*")):
        copy = root / path.relative_to(kernel.root)
        shutil.rmtree(copy, ignore_errors=True)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, copy, symlinks=True)
    stamp.touch()
