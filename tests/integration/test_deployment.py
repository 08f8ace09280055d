"""The project's image and Compose file are built, started by Docker Compose on the lab's Docker, and measure.

No image can be pulled here. Images of the same names are made of the machine's own packages: a base for the Dockerfile,
and mosquitto. InfluxDB 2.7 and Grafana are not available; all other services run as the file defines them.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import yaml

from collector.bpf.object import OBJECT, OLD_OBJECT
from collector.compiled import loops
from correlator.compiled import joiner
from mace import lab
from mace.lab import Runtime, Spec
from mace.lab.containerd import message
from tests import containerd, images, measuring
from tests.places import GOLDEN, ROOT

BOTH = GOLDEN / "both-sources"
NAME = "measured.example"
VISITOR = "visitor.example"
"""A host name of the test alone: the broker allows one session per name."""
PINGS = 300
SIZE = 1211
"""Payload of the pings that are counted by their length, bytes."""
POWERS = {38, 39}
"""CAP_PERFMON and CAP_BPF (linux/capability.h)."""
OLD_POWERS = {21}
"""CAP_SYS_ADMIN, which includes both, and which a Docker before 23 gives instead: it does not know the two by name."""
READY_S = 120
BROKER = ["/usr/sbin/mosquitto", "-c", "/mosquitto/config/mosquitto.conf"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.needs("image", "compose", "bpf", "netns", "openssl", "mosquitto"),
]

# Only addresses for documentation, like all addresses of the lab.
NETWORKS = """
networks:
  broker: {{ipam: {{config: [{{subnet: 192.0.2.0/27}}]}}}}
  store: {{ipam: {{config: [{{subnet: 192.0.2.32/27}}]}}}}
services:
  mosquitto: {{ports: !override ["127.0.0.1:{port}:8883"]}}
"""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Provide a lab with Docker and the built image."""
    folder = tmp_path_factory.mktemp("deployment")
    copy_tree(folder)
    with lab.running(Spec("deployed", containers=1, runtime=Runtime.DOCKER)) as place:
        call = functools.partial(run, folder=folder, place=place)
        call(
            "docker",
            "import",
            "-",
            "mace-base:test",
            given=images.base_image("python3-venv", "ca-certificates", "libbpf1"),
        )
        call("docker", "build", "--network", "none", "--build-arg", "BASE=mace-base:test", "--tag", "mace", ".")
        up = SimpleNamespace(folder=folder, place=place, call=call, compose=functools.partial(call, images.compose()))
        try:
            yield up
        finally:
            # A gigabyte of layers would exceed the few seconds of the lab's own clean-up.
            for name in ("mace", "mace-base:test", "eclipse-mosquitto:2.0"):
                subprocess.run(
                    ["docker", "rmi", "--force", name],
                    env=os.environ | {"DOCKER_HOST": f"unix://{place.docker_socket}"}, capture_output=True, timeout=120,
                    check=False,
                )  # fmt: skip
            call("docker", "image", "prune", "--force")


@pytest.fixture(scope="module")
def running(deployed):
    """Provide the lab with the services of the Compose file: broker, ingest and collector, without the database."""
    call, place = deployed.call, deployed.place
    call(
        *(
            "docker",
            "import",
            "--change",
            'ENTRYPOINT ["/usr/sbin/mosquitto", "-c", "/mosquitto/config/mosquitto.conf"]',
        ),
        *("-", "eclipse-mosquitto:2.0"),
        given=images.base_image("mosquitto", "mosquitto-clients"),
    )
    # The lab's host namespace is not the machine's; a real deployment needs no such setting.
    daemon = (place.docker_socket.parent / "docker.pid").read_text().strip()
    settings = deployed.folder / "deploy/mace/collector.toml"
    capture = f'[capture]\nhost_netns = "/proc/{daemon}/ns/net"\nouter = ["{place.outer_device}"]'
    settings.write_text(settings.read_text().replace("[capture]", capture))
    call("./deploy/make-secrets", NAME)
    call("./deploy/make-secrets", "host", VISITOR)
    (deployed.folder / ".env").write_text(f"MACE_HOST={NAME}\n")
    override = NETWORKS.format(port=free_port())
    deployed.powers = POWERS
    if int(call("docker", "version", "--format", "{{.Server.Version}}").split(".")[0]) < 23:
        override += "  collector: {cap_add: !override [SYS_ADMIN]}\n"
        deployed.powers = OLD_POWERS
    (deployed.folder / "override.yml").write_text(override)
    deployed.compose = functools.partial(deployed.compose, "-f", "docker-compose.yml", "-f", "override.yml")
    try:
        deployed.compose("up", "--detach", "--no-deps", "--no-build", "mosquitto", "ingest", "collector")
        for service in ("mosquitto", "ingest", "collector"):
            wait_for(lambda service=service: state(deployed, service)["Health"]["Status"] == "healthy", deployed)
        yield deployed
    finally:
        deployed.compose("down", "--volumes", "--timeout", "10")


def copy_tree(folder: Path) -> None:
    """Copy the files of the repository, and the wheels."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, timeout=60, check=True,
    ).stdout.decode()  # fmt: skip
    for name in listed.rstrip("\0").split("\0"):
        if name.split("/")[0] not in {"tests", "docs"} and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    # `./dev setup` built them; the lab has no package index from which the image could get a compiler.
    for file in (OBJECT, OLD_OBJECT, Path(loops.__file__), Path(joiner.__file__)):
        shutil.copy(file, folder / file.relative_to(ROOT))
    shutil.copytree(images.wheelhouse(), folder / "deploy/wheelhouse")


def run(*argv, folder: Path, place, given: bytes | None = None) -> str:
    # Docker 20.10 without plugins has only the legacy builder.
    env = os.environ | {"DOCKER_HOST": f"unix://{place.docker_socket}", "DOCKER_BUILDKIT": "0"}
    done = subprocess.run(
        [str(word) for word in argv], cwd=folder, env=env, input=given, capture_output=True, timeout=300, check=False
    )
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, f"{argv}: exit {done.returncode}\n{said[-3000:]}"
    return done.stdout.decode()


def free_port() -> int:
    from tests.servers import free_port as found

    return found()


def state(up, service: str) -> dict:
    number = up.compose("ps", "--all", "--quiet", service).strip()
    return json.loads(up.call("docker", "inspect", number))[0]["State"]


def wait_for(holds, up) -> None:
    until = time.monotonic() + READY_S
    while not holds():
        assert time.monotonic() < until, up.compose("logs", "--no-color", "--tail", "30") + up.compose("ps")
        time.sleep(0.5)


def test_the_image_is_small_and_needs_no_rights(deployed):
    (found,) = json.loads(deployed.call("docker", "inspect", "mace"))
    assert found["Config"]["User"] == "10001:10001"
    # Arrow, DuckDB and numpy are 240 MB of it, the base of the test 70.
    assert found["Size"] < 420e6
    bare = ("--rm", "--pull", "never", "--network", "none", "--read-only", "--cap-drop", "ALL")
    hardened = ("docker", "run", *bare, "--security-opt", "no-new-privileges", "--tmpfs", "/tmp")
    assert "Name: pip" not in deployed.call(
        *hardened, "--entrypoint", "sh", "mace", "-c", "python -m pip show pip 2>&1 || true"
    )
    listed = deployed.call(
        *hardened, "--entrypoint", "sh", "mace", "-c", "ls /opt/mace/native /opt/mace/app/collector/bpf"
    )
    assert {"libbpf.so.1", "libelf.so.1", "mace.bpf.o"} <= set(listed.split())
    volume = ("--volume", f"{BOTH}:/captures:ro")
    inside = deployed.call(*hardened, *volume, "mace", "replay", "/captures/kmod.mace", "--store", "/tmp/s", "--json")
    outside = subprocess.run(
        [sys.executable, "-m", "mace", "replay", BOTH / "kmod.mace", "--json"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert json.loads(inside)["overhead"] == json.loads(outside)["overhead"]
    assert json.loads(inside)["packets"] > 100


def test_it_measures_containers_of_the_host(running):
    place = running.place
    before = stored(running)
    replied = place.ping("c1", "remote", count=PINGS, interval_s=0.005).received
    container = json.loads(running.call("docker", "inspect", "c1"))[0]["Id"][:12]

    def arrived() -> bool:
        counts = stored(running).get(container, {})
        return min(counts.get("egress", 0), counts.get("ingress", 0)) >= replied

    assert before.get(container) is None
    assert replied == PINGS
    wait_for(arrived, running)


def stored(running) -> dict[str, dict[str, int]]:
    """Return the ingest's packets by container and direction, from `mace report`."""
    code = (
        "import duckdb, json, glob; g = '/var/lib/mace/store/delays/**/*.parquet';"
        "print(json.dumps(duckdb.sql(f\"SELECT container, direction, count(*) FROM read_parquet('{g}') WHERE"
        " segment = 'overhead' GROUP BY ALL\").fetchall() if glob.glob(g, recursive=True) else []))"
    )
    found: dict[str, dict[str, int]] = {}
    for container, direction, count in json.loads(running.compose("exec", "-T", "ingest", "python", "-c", code)):
        found.setdefault(container, {})[direction] = count
    return found


@pytest.mark.parametrize(("service", "user"), [("collector", 0), ("ingest", 10001)])
def test_a_container_has_the_rights_that_it_needs_and_no_other(running, service, user):
    powers = running.powers if service == "collector" else set()
    pid = state(running, service)["Pid"]
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    for kind in ("CapEff", "CapPrm", "CapBnd"):
        held = int(status[kind], 16)
        assert {bit for bit in range(64) if held >> bit & 1} <= powers, kind
    assert {bit for bit in range(64) if int(status["CapEff"], 16) >> bit & 1} == powers
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["Uid"].split()[0]) == user
    root = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines() if line.split()[1] == "/"]
    assert "ro" in root[-1][3].split(",")
    text = json.dumps(json.loads(running.call("docker", "inspect", running.compose("ps", "-q", service).strip())))
    for secret in (running.folder / "deploy/secrets").iterdir():
        if secret.suffix in {"", ".key"}:
            assert secret.read_text().strip() not in text, f"{secret.name} can be read by docker inspect"


def test_the_collector_says_what_it_can_name(running):
    found = json.loads(running.compose("exec", "-T", "collector", "python", "-m", "mace", "check", "--json"))
    told = {part: found[part]["ok"] for part in ("source bpf", "devices for bpf", "names by processes")}
    assert told == dict.fromkeys(told, True), found
    assert not found["names by runtimes"]["ok"]
    assert "container_sockets" in found["names by runtimes"]["remedy"]
    # In containers without the host's process ids, names are what is missing, and not devices.
    alone = ("--rm", "--pull", "never", "--network", "none", "--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp")
    found = json.loads(running.call("docker", "run", *alone, "mace", "check", "--json"))
    assert not found["source bpf"]["ok"]
    assert "CAP_BPF and CAP_PERFMON" in found["source bpf"]["remedy"] + found["source bpf"]["detail"]
    assert "pid: host" in found["names by processes"]["remedy"]


def test_the_broker_refuses_to_publish_for_another_host(running):
    secrets = running.folder / "deploy/secrets"

    def publish(who: str, topic: str) -> str:
        # The client runs in the container, because the broker's network is reachable only there.
        script = (
            f"umask 077; mkdir -p /tmp/k; cat >/tmp/k/all; mosquitto_pub -V 5 -d -q 1 -h localhost -p 8883 --cafile"
            f" /run/secrets/ca_certificate --cert /tmp/k/all --key /tmp/k/all -t {topic} -m x 2>&1 || true"
        )
        both = (secrets / f"{who}.crt").read_bytes() + (secrets / f"{who}.key").read_bytes()
        container = running.compose("ps", "-q", "mosquitto").strip()
        mounted = ("--volumes-from", container, "--network", f"container:{container}")
        image = ("--rm", "-i", "--pull", "never", "--entrypoint", "sh", "eclipse-mosquitto:2.0", "-c", script)
        return running.call("docker", "run", *mounted, *image, given=both)

    assert "Not authorized" in publish(f"host-{VISITOR}", f"mace/v1/{NAME}/status")
    assert "Not authorized" in publish(f"host-{VISITOR}", "mace/v1/other.example/status")
    assert "Not authorized" not in (said := publish(f"host-{VISITOR}", f"mace/v1/{VISITOR}/status")), said
    assert "PUBACK" in said
    # From time to time the broker's health check takes over the session of its user.
    wait_for(lambda: "Not authorized" in publish("health", f"mace/v1/{NAME}/status"), running)


def test_a_restart_of_the_broker_loses_nothing(running):
    """Hosts keep frames that are not acknowledged: no record is lost, and the health check succeeds again."""
    container = json.loads(running.call("docker", "inspect", "c1"))[0]["Id"][:12]
    before = stored(running).get(container, {}).get("egress", 0)
    running.compose("kill", "mosquitto")
    assert running.place.ping("c1", "remote", count=100, interval_s=0.005).received == 100
    running.compose("start", "mosquitto")
    wait_for(lambda: stored(running)[container]["egress"] >= before + 100, running)
    assert stored(running)[container]["egress"] == before + 100, "once each"


@pytest.mark.needs("containerd")
def test_the_daemon_set_measures_with_two_capabilities(deployed):
    """Its pod on a real containerd, whose default seccomp profile allows bpf(2) to whoever has CAP_BPF."""
    documents = yaml.safe_load_all((ROOT / "deploy/kubernetes/mace.yaml").read_text())
    (pod,) = (one["spec"]["template"]["spec"] for one in documents if one["kind"] == "DaemonSet")
    (container,) = pod["containers"]
    context = container["securityContext"]
    assert (pod["hostPID"], pod["hostNetwork"], context["seccompProfile"]) == (True, True, {"type": "RuntimeDefault"})
    linux = message(
        f1=message(f1=context["capabilities"]["add"], f2=context["capabilities"]["drop"]),
        f2=int(context["privileged"]),
        f5=message(f1=context["runAsUser"]),
        f7=int(context["readOnlyRootFilesystem"]),
        f11=int(not context["allowPrivilegeEscalation"]),
        f12=message(f1=context["runAsGroup"]),
        f15=message(f1=0),
    )
    place = deployed.place
    with (
        TemporaryDirectory(prefix="mace-cri-") as folder,
        containerd.running(Path(folder) / "c", place.netns_path(lab.HOST)) as daemon,
    ):
        written = Path(folder) / "state"
        written.mkdir()
        deployed.call("docker", "save", "--output", f"{folder}/mace.tar", "mace")
        daemon.load(Path(folder) / "mace.tar")
        # The lab's host is not the machine, whose processes the pod has, and it has no default route.
        settings = f'source = "bpf"\nhost_netns = "/proc/self/ns/net"\nouter = ["{place.outer_device}"]'
        (written / "mace.toml").write_text(f"[capture]\n{settings}\n")
        inside = Path("/var/lib/mace")
        args = [
            "run",
            "--config",
            inside / "mace.toml",
            "--store",
            inside / "store",
            "--record",
            inside / "stream.mace",
        ]
        with daemon.agent("docker.io/library/mace:latest", args, linux, {inside: written}) as pid:
            status = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
            )
            powers = {kind: int(status[kind], 16) for kind in ("CapEff", "CapPrm", "CapBnd")}
            assert powers == dict.fromkeys(powers, sum(1 << bit for bit in POWERS))
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
            capture = written / "stream.mace"
            measuring.wait_for(lambda: capture.exists() and capture.stat().st_size > 0, what="the collector")
            assert place.ping("c1", "remote", count=PINGS, size=SIZE, interval_s=0.005).received == PINGS
        counts = measuring.query(
            written / "store",
            "SELECT direction, count(*) FROM delays"
            f" WHERE segment = 'overhead' AND l3_len = {SIZE + 28} GROUP BY direction",
        ).fetchall()
    assert dict(counts) == {"egress": PINGS, "ingress": PINGS}
