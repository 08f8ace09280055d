"""The root file system of a lab's containers: the machine's busybox, ping and their libraries. Nothing is pulled."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from contracts.errors import Unavailable
from mace.lab import netns

PROGRAMS: Final = ("busybox", "ldd")
"""Programs that making it needs besides those of every lab."""
_DIRECTORIES: Final = ("proc", "sys", "dev", "etc", "tmp")
_APPLETS: Final = ("sh", "sleep", "ls", "cat", "ip", "nc", "wget")


def archive() -> bytes:
    """Return the root file system as a tar archive. Raises `Unavailable` if a program is missing."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for directory in _DIRECTORIES:
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name, source in _files().items():
            content = source.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
        for applet in _APPLETS:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)
    return buffer.getvalue()


def saved(name: str) -> bytes:
    """Return an image with this root file system as `docker save` writes it, which containerd imports."""
    layer = archive()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
        "os": "linux",
        "config": {"Cmd": ["/bin/sleep", "2147483647"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as image:
        for path, content in {
            "layer.tar": layer,
            "config.json": json.dumps(config).encode(),
            "manifest.json": json.dumps(manifest).encode(),
        }.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            image.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def write(root: Path) -> None:
    """Make the root file system in the new directory `root`. Raises `Unavailable` if a program is missing."""
    for directory in _DIRECTORIES:
        (root / directory).mkdir(parents=True)
    for name, source in _files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / name)
        (root / name).chmod(0o755)
    for applet in _APPLETS:
        (root / "bin" / applet).symlink_to("busybox")


def _files() -> dict[str, Path]:
    """Return the files: path below the root -> the machine's file."""
    files: dict[str, Path] = {}
    for program in ("busybox", "ping"):
        found = netns.find_program(program)
        if found is None:
            raise Unavailable("lab", f"the program {program!r} is missing", netns.remedy_for(program))
        files[f"bin/{program}"] = Path(found)
        for library in _libraries(found):
            files[str(library).lstrip("/")] = library
    return files


def _libraries(program: str) -> list[Path]:
    env: Mapping[str, str] = {"PATH": netns.search_path(), "LC_ALL": "C"}
    done = subprocess.run(["ldd", program], capture_output=True, text=True, env=env, check=False, timeout=10)
    # `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, `/lib64/ld-linux-x86-64.so.2 (0x...)`; nothing if static
    return [Path(name) for name in re.findall(r"(/\S+) \(0x", done.stdout)]
