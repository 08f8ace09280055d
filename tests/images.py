"""Container images without a registry: a base image made of the machine's Debian packages, and wheels for it.

    base_image("python3-venv")   a tar archive of the packages' files, with all their dependencies
    wheelhouse()                 the wheels of deploy/requirements.lock, in a cache outside the repository
    compose()                    the program docker-compose of Debian 13, in the same cache

`docker import` makes an image of the base, and the Dockerfile uses it through its argument BASE. The Dockerfile that
users build from a registry's image is thereby built here without a registry, in the same steps. Docker Compose is
fetched from Debian 13, because Debian 12 has only its predecessor, which refuses valid files.
"""

import functools
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.kernel import kernels
from tests.places import ROOT

# What only installs and configures packages; no program that a container runs needs it.
LEFT_OUT = {
    "adduser", "debconf", "dpkg", "dpkg-dev", "init-system-helpers", "install-info", "lsb-base", "mailcap",
    "mime-support", "perl", "perl-base", "sysvinit-utils", "tar", "tzdata", "ucf", "udev", "systemd",
}  # fmt: skip
NOT_NEEDED = re.compile(r"/(usr/share/(doc|man|info|locale|lintian|bash-completion)|etc/(init\.d|cron|default))(/|$)")

PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
GROUP = "root:x:0:\nnogroup:x:65534:\n"


@functools.cache
def _installed() -> tuple[dict[str, list[list[str]]], dict[str, str]]:
    """Return package → its dependencies, each with alternatives, and virtual package → a package that provides it."""
    told = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}\t${Package}\t${Pre-Depends}, ${Depends}\t${Provides}\n"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    depends: dict[str, list[list[str]]] = {}
    provided: dict[str, str] = {}
    for line in told.splitlines():
        status, name, wanted, provides = line.split("\t")
        if status.startswith("ii"):
            depends[name] = [[_name(one) for one in group.split("|")] for group in wanted.split(",") if group.strip()]
            provided |= {_name(virtual): name for virtual in provides.split(",") if virtual.strip()}
    return depends, provided


def _name(dependency: str) -> str:
    return re.sub(r"[\s(:].*", "", dependency.strip())


def closure(packages: Iterable[str]) -> set[str]:
    """Return the packages and all their dependencies that are installed and needed in a container."""
    depends, provided = _installed()
    seen, asked = set[str](), list(packages)
    while asked:
        name = asked.pop()
        if name in provided and name not in depends:
            name = provided[name]
        if name in seen or name in LEFT_OUT or name not in depends:
            continue
        seen.add(name)
        for alternatives in depends[name]:
            asked += [one for one in alternatives if one in depends or one in provided][:1]
    return seen


def missing(*packages: str) -> str | None:
    """Return None if a base image can be made of these packages on this machine, else why not."""
    if not Path("/usr/bin/dpkg-query").exists():
        return "not a Debian: no dpkg-query"
    lacking = [name for name in packages if name not in _installed()[0]]
    return f"packages that are not installed: {', '.join(lacking)}" if lacking else None


ALWAYS = ("base-files", "coreutils", "dash", "findutils", "grep", "libc-bin", "libstdc++6", "sed")
MERGED = ("bin", "sbin", "lib", "lib64")
"""Directories that link to those of the same name in /usr; some packages still name files below them."""


def base_image(*packages: str) -> bytes:
    """Return a root file system as a tar archive, some 50 MB for Python."""
    listed = subprocess.run(
        ["dpkg-query", "-L", *sorted(closure([*packages, *ALWAYS]))],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout.splitlines()  # fmt: skip
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for link in MERGED:
            _add(archive, link, link_to=f"usr/{link}")
        places = {}
        for name in listed:
            first, *others = name.lstrip("/").split("/")
            if name.startswith("/") and not (first in MERGED and not others) and os.path.lexists(name):
                places.setdefault(f"usr{name}" if first in MERGED else name.lstrip("/"), name)
        for place, name in sorted(places.items()):
            if not NOT_NEEDED.match(f"/{place}"):
                archive.add(name, arcname=place or ".", recursive=False)
        # Made by the packages' scripts, so in no package's list.
        for made in ("etc/ssl/certs/ca-certificates.crt", "etc/ld.so.cache"):
            archive.add(f"/{made}", arcname=made)
        _add(archive, "etc/passwd", PASSWD)
        _add(archive, "etc/group", GROUP)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, text: str = "", *, link_to: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.mode, entry.size = 0o644, len(text.encode())
    if link_to:
        entry.type, entry.linkname = tarfile.SYMTYPE, link_to
    archive.addfile(entry, io.BytesIO(text.encode()))


def wheelhouse(lock: Path = ROOT / "deploy/requirements.lock") -> Path:
    """Return a directory with the wheels of the lock for the machine's own python3; fetched once for each lock.

    Raises `kernels.KernelUnavailable` with the end of pip's output.
    """
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout.strip()  # fmt: skip
    key = hashlib.sha256(lock.read_bytes() + version.encode()).hexdigest()[:16]
    place = kernels.cache_dir().parent / "wheels" / key
    with kernels.locked("wheels"):
        if not place.is_dir():
            place.parent.mkdir(exist_ok=True)
            with kernels.scratch("wheels") as folder:
                kernels.run(
                    [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                     "--python-version", version, "--only-binary", ":all:", "--no-deps", "--require-hashes",
                     "--dest", folder / "wheels", "--requirement", lock],
                    what="the wheels of the container image",
                )  # fmt: skip
                (folder / "wheels").rename(place)
    return place


def compose() -> Path:
    """Return the path of Docker Compose, a single program; raises `kernels.KernelUnavailable`."""
    return kernels.unpacked("docker-compose", ("trixie",)) / "usr/libexec/docker/cli-plugins/docker-compose"
