"""An unprivileged user can choose the paths at which namespaces are found, and mount anything over them.

The tests do that in the user's own namespaces, without any privilege on this machine.
"""

import asyncio
import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.machine import netns
from collector.machine.devices import DeviceFollower
from collector.machine.netns import hidden, inode_of, open_netns, open_nsfs

pytestmark = pytest.mark.needs("root", "netns", "userns")

# A veth leads from the user's namespace into one that only a mount in the user's mount namespace keeps; $1 then hides
# the mount.
SCRIPT = """
set -e
mount -t tmpfs none "$PLACE"
touch "$PLACE/ns"
mkfifo "$PLACE/fifo"
unshare --net sleep 300 & holder=$!
while [ "$(readlink /proc/$holder/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
mount --bind /proc/$holder/ns/net "$PLACE/ns"
ip link add a0 type veth peer name b0 netns $holder
kill $holder
wait $holder || true
case "$1" in
fifo) mount --bind "$PLACE/fifo" "$PLACE/ns" ;;
device) mount --bind /dev/full "$PLACE/ns" ;;
esac
echo ready
exec sleep 300
"""


@contextlib.contextmanager
def hostile(over: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Provide the user's namespaces, with `over` mounted over the namespace that they hide."""
    place = tmp_path / "place"
    place.mkdir()
    for parent in (place, *place.parents[:-2]):
        parent.chmod(0o755)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    command += [
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        "--mount",
        "sh",
        "-c",
        SCRIPT,
        "sh",
        over,
        f"{place}/ns",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PLACE": str(place)})
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def hidden_of(process: subprocess.Popen[str]) -> netns.Found:
    """Return the namespace that the user's mount keeps."""
    [found] = [found for found in hidden().values() if found.path == f"/proc/{process.pid}/root{process.args[-1]}"]
    return found


def test_a_hidden_namespace_is_reached(tmp_path: Path) -> None:
    with hostile("nothing", tmp_path) as process:
        found = hidden_of(process)
        fd = open_netns(found)
        assert fd is not None
        assert os.fstat(fd).st_ino == found.inode
        os.close(fd)


@pytest.mark.parametrize("over", ["fifo", "device"])
def test_the_file_mounted_over_a_namespace_is_not_opened(tmp_path: Path, over: str) -> None:
    with hostile(over, tmp_path) as process:
        found = hidden_of(process)
        with pytest.raises(OSError, match="no namespace") as refused:
            open_nsfs(found.path)
        assert refused.value.errno == errno.EINVAL
        assert open_netns(found) is None


@pytest.mark.slow
def test_other_devices_are_still_followed(tmp_path: Path) -> None:
    async def followed(user: int) -> bool:
        """Whether the user's device is seen, so that the search for its peer has begun or ended."""
        there = False
        follower = DeviceFollower(docker_sockets=())
        try:
            await follower.open()
            namespace = inode_of(f"/proc/{user}/ns/net")
            for _ in range(400):
                there |= any(d.netns == namespace and d.name == "a0" for d in follower.poll() or ())
                if there and searched:
                    return True
                await asyncio.sleep(0.05)
            return False
        finally:
            await follower.aclose()

    searched: list[str] = []
    with hostile("fifo", tmp_path) as process, pytest.MonkeyPatch.context() as patch:

        def seen(path: str) -> int:
            if path.startswith(f"/proc/{process.pid}/root/"):
                searched.append(path)
            return open_nsfs(path)

        patch.setattr(netns, "open_nsfs", seen)
        assert asyncio.run(followed(process.pid))
    # The thread has ended: it waits in no open(2) of the user's FIFO.
    assert not [thread for thread in threading.enumerate() if thread.name == "mace-devices"]
