"""An overlay network of two Docker daemons in a swarm: its bridge and tunnel are in a namespace of their own."""

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from mace.lab import HOST, REMOTE, Runtime, Spec, docker, image, running, state
from tests.lab_leftovers import leftovers, own_lab
from tests.measuring import RunningMace, balanced, wait_for

pytestmark = [
    pytest.mark.needs("root", "netns", "docker", "bpf"),
    pytest.mark.slow,
    pytest.mark.timeout(120),
]
COUNT = 50


def client(directory: Path, *argv: str, stdin: bytes | None = None) -> str:
    argv = ("docker", "-H", f"unix://{directory}/docker.sock", *argv)
    return subprocess.run(argv, input=stdin, capture_output=True, check=True).stdout.decode().strip()


def second_daemon(lab, place: Path) -> subprocess.Popen[str]:
    """Start a Docker daemon in the far end's namespace, with its files in `place`."""
    first = lab.docker_socket.parent
    place.mkdir()
    for name in ("containerd.toml", "daemon.json"):
        (place / name).write_text((first / name).read_text().replace(str(first), str(place)))
    needs = docker.DAEMONS[Runtime.DOCKER]
    covers = "".join(f"mount -t tmpfs tmpfs {path} && " for path in needs.covered)
    argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", f"{covers}{needs.script.strip()}", str(place)]
    daemon = lab.popen(REMOTE, argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: subprocess.run(["docker", "-H", f"unix://{place}/docker.sock", "version"], capture_output=True,
                                    check=False).returncode == 0, what="the second daemon")  # fmt: skip
    client(place, "import", "-", docker.IMAGE, stdin=image.archive())
    return daemon


def test_packets_of_an_overlay_network_are_followed_through_the_network_s_namespace(request, tmp_path):
    with own_lab(request.node.name) as name:
        with running(Spec(name, runtime=Runtime.DOCKER)) as lab, ExitStack() as leaving:
            one, two = lab.docker_socket.parent, lab.docker_socket.parent / "second"
            daemon = second_daemon(lab, two)
            (host, remote), port = (lab.address(each) for each in (HOST, REMOTE)), 2377
            client(one, "swarm", "init", "--advertise-addr", host, "--listen-addr", f"{host}:{port}")
            token = client(one, "swarm", "join-token", "--quiet", "worker")
            joining = ["--advertise-addr", remote, "--listen-addr", f"{remote}:{port}", "--token", token]
            client(two, "swarm", "join", *joining, f"{host}:{port}")
            client(one, "network", "create", "--driver", "overlay", "--attachable", "--subnet", "192.0.2.0/24", "over")
            sleep = ("--network", "over", docker.IMAGE, "/bin/sleep", "1000")
            client(one, "run", "--detach", "--name", "near", *sleep)
            far = client(two, "run", "--detach", "--name", "far", *sleep)
            address = json.loads(client(two, "inspect", far))[0]["NetworkSettings"]["Networks"]["over"]["IPAddress"]
            # Docker's mounts of these namespaces are in the daemons' own mount namespaces; a process shows them here.
            for pid, place in ((state.load(name).daemon.pid, one), (daemon.pid, two)):
                for path in Path(f"/proc/{pid}/root{place}/run/netns").glob("1-*"):
                    inside = leaving.enter_context(subprocess.Popen(["nsenter", f"--net={path}", "sleep", "1000"]))
                    leaving.callback(inside.kill)
            run = RunningMace(lab, tmp_path, "--source", "bpf")
            leaving.callback(run.kill)
            client(one, "exec", "near", "ping", "-q", "-c", str(COUNT), "-i", "0.01", address)
            found = run.stop()
        assert leftovers(name) == []
    balanced(found)
    for direction, role in (("egress", "outer"), ("ingress", "inner")):
        rows = [r for r in found["devices"] if (r["container"], r["direction"]) == ("near", direction)]
        counts = {(r["device"], r["role"]): r["count"] for r in rows if r["segment"] == "device"}
        (bridge_port,) = (each for each, its in counts if its == "host" and each.startswith("veth"))
        path = [("eth0", "inner"), (bridge_port, "host"), ("vxlan0", "host")]
        assert all(counts[each] >= COUNT for each in path if each[1] != role), counts
