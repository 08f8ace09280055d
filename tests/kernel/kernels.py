"""Kernels for testing the module, fetched from Debian's archive into a cache outside the repository.

The kernels are those of Debian's cloud images: small (42 MB of packages each), signed, kept current, and with the
modules that the tests need: veth, bridge, netem, VXLAN, overlay, virtiofs. apt finds and verifies them with a
configuration of its own; nothing is installed on the host.

    <cache>/<name>.json          which release stands for the name; written last, so that it means "done"
    <cache>/releases/<release>/  the unpacked packages
    <cache>/trixie/              Debian 13, whose compiler the newest kernel needs (build.py)

The cache is $MACE_CACHE/kernels, else mace/kernels in the user's cache directory. Mirrors are those of the machine's
own apt sources; MACE_DEBIAN_MIRROR (the address that ends in /debian) names one where the machine has none.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ATTEMPTS = 3  # mirrors fail now and then


class KernelUnavailable(Exception):
    """A kernel could not be fetched, or its module not built; the message has the step and the end of its output."""


@dataclass(frozen=True, slots=True)
class KernelLine:
    """A line of kernels and its place in Debian."""

    suites: tuple[str, ...]  # the newest version of all suites; a suite that the mirror has dropped is skipped
    compiler: str  # of the host, or of the chroot where builds_in names one
    builds_in: str | None = None  # the Debian suite in whose chroot its module is built; None: on the host


KERNELS: dict[str, KernelLine] = {
    # gcc 12 builds 5.10's modules although gcc 10 built the kernel.
    "5.10": KernelLine(("bullseye-security", "bullseye"), "gcc-12"),
    "6.1": KernelLine(("bookworm-security", "bookworm"), "gcc-12"),
    "6.12": KernelLine(("bookworm-backports",), "gcc-12"),
    # Its objtool needs glibc 2.38, its configuration gcc 14.
    "7": KernelLine(("trixie-backports",), "gcc-14", builds_in="trixie"),
}
"""Kernels, oldest first: one for each Debian release, and the newest."""

# What to unpack of everything that the two metapackages lead to. linux-base, linux-compiler and initramfs-tools
# configure the host and are of no use here; in 7 the image is split into binary, modules and base.
PARTS = re.compile(r"linux-(image|binary|modules|headers|kbuild|base)-\S*\d\S*(?<!-unsigned)(?<!-dbg)")


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel. Its directories are in the cache and must not be modified."""

    name: str  # name in KERNELS
    release: str  # output of uname -r
    root: Path  # what the packages were unpacked into

    @property
    def wanted(self) -> KernelLine:
        return KERNELS[self.name]

    @property
    def vmlinuz(self) -> Path:
        inside = self.modules_dir / "vmlinuz"  # the packages of 7.3 have no /boot
        return inside if inside.exists() else self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules_dir(self) -> Path:
        return _modules_root(self.root) / self.release

    @property
    def headers_dir(self) -> Path:
        """The kernel's configuration and generated headers: O= of its builds."""
        return self.root / "usr/src" / f"linux-headers-{self.release}"

    @property
    def common_dir(self) -> Path:
        """Headers that all flavours share, with the Makefile: the source tree of its builds."""
        return self.root / "usr/src" / f"linux-headers-{self.release.removesuffix('-cloud-amd64')}-common"


def _modules_root(root: Path) -> Path:
    # Debian 13 ships no /lib any more.
    return next(path for path in (root / "usr/lib/modules", root / "lib/modules") if path.is_dir())


def cache_dir() -> Path:
    named = os.environ.get("MACE_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mace"
    path = base.absolute() / "kernels"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process and thread at a time run the block; the lock ends with the process that holds it."""
    with (cache_dir() / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """Make a temporary directory on the cache's file system: complete results are renamed out of it."""
    for left in cache_dir().glob(".*-*/"):  # left by killed processes
        if left.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=f".{prefix}-", dir=cache_dir()))
    try:
        path.chmod(0o755)
        yield path
    finally:
        shutil.rmtree(path)


def run(
    args: Sequence[str | Path], *, what: str, cwd: Path | None = None, timeout_s: float = 600, tail_lines: int = 20
) -> str:
    """Run a program, and return its output, both streams; raises KernelUnavailable, beginning with `what`."""
    env = os.environ | {"LC_ALL": "C", "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            args,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{what}: {error}") from error
    if done.returncode != 0:
        said = "\n".join(done.stdout.strip().splitlines()[-tail_lines:])
        raise KernelUnavailable(f"{what}: {args[0]} exits {done.returncode}:\n{said}")
    return done.stdout


# --- where Debian is ----------------------------------------------------------------------------


def mirror() -> str:
    """Return the address of the Debian archive that this machine's apt uses, ending in /debian."""
    named = os.environ.get("MACE_DEBIAN_MIRROR")
    if named:
        return named.rstrip("/")
    listed = run(["apt-get", "indextargets", "--format", "$(REPO_URI)"], what="apt's own sources")
    for address in listed.split():
        if re.search(r"/debian/?$", address):
            return address.rstrip("/")
    raise KernelUnavailable(
        "the apt sources of this machine name no Debian mirror to fetch kernels from: "
        "MACE_DEBIAN_MIRROR=<address that ends in /debian>"
    )


def _source(suite: str) -> str:
    # Debian's mirrors have the two archives side by side.
    address = f"{mirror()}-security" if suite.endswith("-security") else mirror()
    return f"deb [arch=amd64 signed-by={KEYRING}] {address} {suite} main\n"


class _Apt:
    """apt with lists, sources and preferences of its own in `home`; the host's network settings stay in force."""

    def __init__(self, home: Path, suites: Sequence[str]):
        for folder in ("lists/partial", "archives/partial"):
            (home / folder).mkdir(parents=True)
        (home / "sources.list").write_text("".join(_source(suite) for suite in suites))
        options = {
            "Dir::Etc::SourceList": home / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::State::Lists": home / "lists",
            "Dir::State::Status": "/dev/null",  # ignore the host's installed packages
            "Dir::Cache": home,
            "Acquire::Languages": "none",
            "Acquire::Retries": ATTEMPTS,
            "Acquire::Check-Valid-Until": "false",  # signatures of unmaintained suites expire
            "APT::Sandbox::User": "root",  # apt's own user may not enter this user's cache
            "APT::Update::Error-Mode": "any",  # otherwise apt ignores a suite that it cannot reach
        }
        self.options = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        self.home = home
        self.what = f"Debian {' '.join(suites)}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self("apt-get", "update")
                break
            except KernelUnavailable:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(attempt)

    def __call__(self, program: str, *args: str) -> str:
        return run([program, "-q", *self.options, *args], what=self.what, cwd=self.home)

    def parts_of(self, *metapackages: str) -> set[str]:
        """Return the names of the packages to unpack."""
        seen: set[str] = set()
        asked = set(metapackages)
        while asked:
            seen |= asked
            told = self("apt-cache", "depends", "--important", *sorted(asked))
            named = set(re.findall(r"^ [ |](?:Pre)?Depends: (\S+)", told, re.MULTILINE))
            asked = {name for name in named if PARTS.fullmatch(name)} - seen
        return seen - set(metapackages)


def _apt(home: Path, suites: Sequence[str]) -> _Apt:
    """Return apt over all suites or, if the mirror has dropped one of them, over the first that it has."""
    try:
        return _Apt(home / "all", suites)
    except KernelUnavailable:
        for suite in suites if len(suites) > 1 else ():
            with contextlib.suppress(KernelUnavailable):
                return _Apt(home / suite, [suite])
        raise


# --- the cache ----------------------------------------------------------------------------------


def fetched(name: str) -> Kernel | None:
    """Return the kernel if it is in the cache, else None."""
    try:
        release = json.loads((cache_dir() / f"{name}.json").read_text())["release"]
    except FileNotFoundError:
        return None
    kernel = Kernel(name, release, cache_dir() / "releases" / release)
    return kernel if kernel.root.is_dir() else None


def fetch(name: str, *, newest: bool = False) -> Kernel:
    """Return the kernel from the cache or, if it is not there or with `newest`, from Debian.

    Raises KernelUnavailable.
    """
    with locked(name):
        kernel = fetched(name)
        return kernel if kernel is not None and not newest else _download(name)


def _download(name: str) -> Kernel:
    with scratch(name) as folder:
        apt = _apt(folder / "apt", KERNELS[name].suites)
        parts = apt.parts_of("linux-image-cloud-amd64", "linux-headers-cloud-amd64")
        releases = {
            match[1]
            for part in parts
            if (match := re.fullmatch(r"linux-headers-(\d\S*-cloud-amd64)", part)) is not None
        }
        if len(releases) != 1:
            raise KernelUnavailable(f"kernel {name}: expected one release in {apt.what}, found {sorted(releases)}")
        kernel = Kernel(name, releases.pop(), root=folder / "root")
        place = cache_dir() / "releases" / kernel.release
        if not place.is_dir():
            apt("apt-get", "download", *sorted(parts))
            _unpack(kernel, sorted(apt.home.glob("*.deb")))
            place.parent.mkdir(exist_ok=True)
            kernel.root.rename(place)
        note = folder / "done.json"
        note.write_text(json.dumps({"release": kernel.release, "packages": sorted(parts)}, indent=1) + "\n")
        note.rename(cache_dir() / f"{name}.json")
        return Kernel(name, kernel.release, place)


def _unpack(kernel: Kernel, packages: Sequence[Path]) -> None:
    for package in packages:
        run(["dpkg", "-x", package, kernel.root], what=f"unpacking {package.name}")
    what = f"kernel {kernel.name} ({kernel.release})"
    for path in (kernel.vmlinuz, kernel.modules_dir, kernel.headers_dir / ".config", kernel.common_dir / "Makefile"):
        if not path.exists():
            raise KernelUnavailable(f"{what}: its packages hold no {path.relative_to(kernel.root)}")
    # depmod looks below lib/modules only; --moduledir came with kmod 32.
    lib = kernel.root / "lib"
    if not lib.exists():
        lib.symlink_to("usr/lib")
    run(["depmod", "--basedir", kernel.root, kernel.release], what=f"{what}: depmod")


def unpacked(package: str, suites: Sequence[str], *others: str) -> Path:
    """Unpack a Debian package and `others`, without their dependencies, into the cache; raises KernelUnavailable."""
    place = cache_dir() / "packages" / "-".join((package, *suites))
    with locked(package):
        if not place.is_dir():
            with scratch(package) as folder:
                apt = _apt(folder / "apt", suites)
                apt("apt-get", "download", package, *others)
                for each in apt.home.glob("*.deb"):
                    run(["dpkg", "-x", each, folder / "root"], what=f"unpacking {each.name}")
                place.parent.mkdir(exist_ok=True)
                (folder / "root").rename(place)
    return place


# --- the kernel's own checkers ------------------------------------------------------------------

SCRIPTS = ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch", "kernel-doc")


def source_scripts() -> Path:
    """Return a directory with SCRIPTS of the kernel's source.

    No smaller package has them: 130 MB are fetched, once. Raises KernelUnavailable.
    """
    place = cache_dir() / "scripts"
    with locked("scripts"):
        if not place.is_dir():
            with scratch("scripts") as folder:
                apt = _apt(folder / "apt", KERNELS["6.1"].suites)
                apt("apt-get", "download", "linux-source-6.1")
                _unpack_scripts(next(apt.home.glob("*.deb")), folder)
                (folder / "scripts").rename(place)
    return place


def _unpack_scripts(package: Path, folder: Path) -> None:
    run(["dpkg", "-x", package, folder / "root"], what=f"unpacking {package.name}")
    source = next((folder / "root/usr/src").glob("linux-source-*.tar.xz"))
    (folder / "scripts").mkdir()
    names = [f"linux-source-6.1/scripts/{name}" for name in SCRIPTS]
    strip = ["--strip-components=2", "--no-same-owner", "-C", folder / "scripts"]
    run(["tar", "-xf", source, *strip, *names], what=f"unpacking {source.name}")
