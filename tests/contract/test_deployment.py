"""The deployment's files: valid for the programs that read them, consistent with each other, and without a secret.

tests/integration/test_deployment.py shows in real containers that they work together.
"""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from contracts import config
from tests import images
from tests.places import ROOT
from tests.typescript import held_to

COMPOSE = ROOT / "docker-compose.yml"
FILE = yaml.safe_load(COMPOSE.read_text())
SERVICES = FILE["services"]
POWERS = {"BPF", "PERFMON"}
POWERS_OF_ROOT = {"SYS_ADMIN", "SYS_PTRACE", "NET_ADMIN", "NET_BROADCAST"}
"""What the sources ftrace and kmod need, which the collector gets only from a file of its own."""
OF_ROOT = ROOT / "deploy/compose-root.yml"


# --- compose ------------------------------------------------------------------------------------


def compose_config(folder: Path, text: str, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "docker-compose.yml").write_text(text)
    return subprocess.run(
        [images.compose(), *args, "config", "-q"],
        cwd=folder, env={"PATH": os.environ["PATH"], "MACE_HOST": "measured.example"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.needs("compose")
def test_compose_accepts_the_file(tmp_path):
    done = compose_config(tmp_path, COMPOSE.read_text(), "--profile", "replay")
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()


@pytest.mark.needs("compose")
def test_compose_adds_the_rights_for_ftrace_and_the_module(tmp_path):
    (tmp_path / "docker-compose.yml").write_text(COMPOSE.read_text())
    done = subprocess.run(
        [images.compose(), "-f", "docker-compose.yml", "-f", OF_ROOT, "config"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "MACE_HOST": "measured.example"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    collector = yaml.safe_load(done.stdout)["services"]["collector"]
    assert set(collector["cap_add"]) == POWERS | POWERS_OF_ROOT
    assert set(collector["security_opt"]) == {"no-new-privileges:true", "apparmor:unconfined"}
    assert "/sys/kernel/tracing" in {volume["target"] for volume in collector["volumes"]}
    assert not collector.get("privileged")


@pytest.mark.needs("compose")
@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("read_only: true", "readonly: true", "readonly"),
        ("healthcheck:\n      test: [", "healthchek:\n      test: [", "healthchek"),
        ("depends_on: [mosquitto, influxdb]", "depends_on: [mosquito, influxdb]", "mosquito"),
        (":3000:3000", ":3000:300000", "300000"),
        ("networks: [broker, store]", "networks: [broker, stor]", "stor"),
        ("secrets: [grafana_admin_password,", "secrets: [grafana_admin_pasword,", "grafana_admin_pasword"),
        ("${MACE_HOST:?", "${MACE_NAME:?", "MACE_NAME"),
    ],
)
def test_compose_refuses_misspelt_keys(tmp_path, right, wrong, complaint):
    text = COMPOSE.read_text()
    assert right in text
    done = compose_config(tmp_path, text.replace(right, wrong, 1), "--profile", "replay")
    assert done.returncode != 0
    assert complaint in done.stderr


def test_no_service_has_more_rights_than_it_needs():
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        assert service.get("network_mode") is None, name
        assert service["restart"] in {"unless-stopped", "no"}, name
        assert service["logging"]["options"]["max-size"], f"{name}: logs fill the disk"
        if name != "replay":
            assert service["healthcheck"]["test"], name
        mounts = [mount for mount in service.get("volumes", []) if "docker.sock" in mount]
        assert not mounts, f"{name}: who has that socket has the machine"
    assert {name for name, service in SERVICES.items() if service.get("pid")} == {"collector"}
    assert set(SERVICES["collector"]["cap_add"]) == POWERS
    assert not any(
        service.get("cap_add") for name, service in SERVICES.items() if name not in {"collector", "influxdb"}
    )
    # Published ports are bound to 127.0.0.1, and so not reachable from outside.
    for name, service in SERVICES.items():
        assert all(":-127.0.0.1}:" in port for port in service.get("ports", [])), name
    assert FILE["networks"]["store"]["internal"] is True
    assert SERVICES["influxdb"]["networks"] == ["store"]


def test_the_image_runs_as_an_unprivileged_user():
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert [name for name, service in SERVICES.items() if service.get("user", "").startswith("0:")] == ["collector"]


# --- secrets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "secrets"
    make_secrets(folder, "measured.example")
    return folder


def make_secrets(folder: Path, *args: str, status: int = 0) -> str:
    done = subprocess.run(
        [ROOT / "deploy/make-secrets", *args],
        env=os.environ | {"MACE_SECRETS": str(folder)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.mark.needs("openssl")
def test_make_secrets_makes_all_that_compose_asks_for(secrets):
    named = {
        entry["file"].replace("${MACE_HOST:-unnamed}", "measured.example").removeprefix("./deploy/secrets/")
        for entry in FILE["secrets"].values()
    }
    there = {path.name for path in secrets.iterdir()}
    assert named <= there
    assert there - named <= {"ca.key", "ca.srl"}
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700, "inside, files are readable: the directory keeps people out"
    assert stat.S_IMODE((secrets / "ca.key").stat().st_mode) == 0o600
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert used == set(FILE["secrets"]), "a secret that nobody uses"


@pytest.mark.needs("openssl")
def test_making_secrets_again_changes_nothing(secrets):
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    make_secrets(secrets, "measured.example")
    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == before
    make_secrets(secrets, "host", "second.example")
    assert (secrets / "host-second.example.crt").exists()
    names = [before[name] for name in before if "password" in name or "token" in name]
    assert len(set(names)) == len(names)
    assert all(len(value) >= 48 for value in names)
    assert before["influxdb_ingest_login"] == b"ingest:" + before["influxdb_ingest_password"]


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "ingest", "broker", "x" * 65, "a;b", "höst"])
def test_make_secrets_refuses_invalid_names(tmp_path, name):
    assert "host name" in make_secrets(tmp_path / "s", "host", name, status=1)
    assert not list(tmp_path.rglob("*.key")) or not list(tmp_path.rglob("host-*"))


def test_no_secret_in_the_tree():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    assert not [name for name in listed if name.startswith("deploy/secrets") or name == ".env"]
    ignored = subprocess.run(
        ["git", "check-ignore", ".env", "deploy/secrets/ca.key", "deploy/wheelhouse/x.whl"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    ).stdout.split()  # fmt: skip
    assert len(ignored) == 3
    for path in [COMPOSE, ROOT / ".env.example", *(ROOT / "deploy").rglob("*")]:
        if path.is_file() and "secrets" not in path.parts and path.suffix != ".lock":
            assert not re.search(r"BEGIN .*PRIVATE KEY|(password|token)\s*[=:]\s*[\"']?[0-9a-f]{16}", path.read_text())


def test_every_setting_is_in_the_example():
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    told = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used == told
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]+)\}", COMPOSE.read_text().split("\nsecrets:")[0]))
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert {name: example[name] for name in defaults} == defaults


# --- our own configuration ----------------------------------------------------------------------

CONFIGS = sorted([*(ROOT / "deploy/mace").glob("*.toml"), *(ROOT / "deploy/systemd").glob("*.toml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_configurations_load(path: Path):
    loaded = config.load(path)
    assert loaded.mqtt.broker or loaded.sinks.influxdb.url
    if loaded.mqtt.broker:
        assert loaded.mqtt.broker.startswith("mqtts://"), "unencrypted"
        assert loaded.sinks.prometheus.listen, "no health to ask for"


def test_configurations_for_kubernetes_load(tmp_path):
    documents = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/mace.yaml").read_text()))
    text = next(d for d in documents if d["kind"] == "ConfigMap")["data"]["collector.toml"]
    (tmp_path / "collector.toml").write_text(text)
    assert config.load(tmp_path / "collector.toml").publish.spool == "/var/lib/mace/spool"


def test_files_that_containers_name_are_mounted():
    for name in ("collector", "ingest", "replay"):
        service = SERVICES[name]
        loaded = config.load(ROOT / f"deploy/mace/{name}.toml")
        paths = [loaded.mqtt.ca_file, loaded.mqtt.cert_file, loaded.mqtt.key_file, loaded.sinks.influxdb.token_file]
        named = {path.removeprefix("/run/secrets/") for path in paths if path}
        assert named == set(service["secrets"]), name
        for path in (loaded.sinks.influxdb.spool, loaded.publish.spool, loaded.store.path):
            assert path.startswith("/var/lib/mace/") or path in {"mace-spool", "mace-store"}
    conf = (ROOT / "deploy/mosquitto/mosquitto.conf").read_text()
    named = set(re.findall(r"/run/secrets/(\w+)", conf))
    assert named | {"health_certificate", "health_key"} == set(SERVICES["mosquitto"]["secrets"])
    script = (ROOT / "deploy/influxdb/10-users.sh").read_text()
    assert set(re.findall(r"/run/secrets/(\w+)", script)) <= set(SERVICES["influxdb"]["secrets"])


def test_access_list_is_the_documented_one():
    def rules(text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    page = (ROOT / "docs/mqtt.md").read_text()
    documented = rules(re.search(r"```\n(# every host.*?)```", page, re.DOTALL)[1])
    shipped = rules((ROOT / "deploy/mosquitto/acl").read_text())
    assert shipped[: len(documented)] == documented
    assert shipped[len(documented) :] == ["user health", "topic read mace/health"]


# --- image --------------------------------------------------------------------------------------


def test_the_image_s_lock_is_a_part_of_the_lock():
    def entries(path: Path) -> dict[str, set[str]]:
        parts = re.split(r"\n(?=[A-Za-z0-9])", path.read_text())
        return {part.split(" ", 1)[0]: set(re.findall(r"sha256:\w+", part)) for part in parts if "==" in part[:200]}

    whole, image = entries(ROOT / "requirements.lock"), entries(ROOT / "deploy/requirements.lock")
    assert image
    assert {name: whole.get(name) for name in image} == image, "run ./dev lock"
    names = {name.split("==")[0] for name in image}
    assert {"numpy", "pyarrow", "duckdb", "influxdb-client", "aiomqtt", "prometheus-client"} <= names
    assert not names & {"pytest", "ruff", "mypy", "matplotlib", "hypothesis"}


def test_the_image_contains_only_code():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = set(re.findall(r"^COPY (\S+?)/? ", (ROOT / "Dockerfile").read_text(), re.MULTILINE)) - {"--from=build"}
    assert let_in == (copied - {"deploy"}) | {"deploy/requirements.lock", "deploy/wheelhouse"}


# --- systemd, Kubernetes ------------------------------------------------------------------------


@pytest.mark.needs("systemd-analyze")
def test_systemd_accepts_the_units(tmp_path):
    for path in (ROOT / "deploy/systemd").glob("*.service"):
        # The place of the installation depends on the machine; all other complaints count.
        text = path.read_text().replace("/opt/mace/.venv/bin/mace", shutil.which("true") or "/bin/true")
        for name in (path.name, path.name.replace("@", "@1-2")):
            (tmp_path / name).write_text(text)
    units = [tmp_path / "mace-collector.service", tmp_path / "mace-ingest@1-2.service"]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    for unit, most in zip(units, (2.0, 1.5), strict=True):
        # Exposure in tenths; the least that a unit with CAP_SYS_ADMIN and without this file's limits has is above 9.
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", f"--threshold={most * 10:.0f}", "--no-pager", unit],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-300:]
    dropin = tmp_path / "mace-collector.service.d"
    dropin.mkdir()
    shutil.copy(ROOT / "deploy/systemd/mace-collector-root.conf", dropin)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", units[0]],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    broken = (tmp_path / "mace-collector.service").read_text().replace("NoNewPrivileges", "NoNewPrivilegs")
    (tmp_path / "mace-broken.service").write_text(broken)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / "mace-broken.service"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "NoNewPrivilegs" in done.stderr


@pytest.mark.parametrize(
    ("name", "setting", "powers"),
    [
        ("mace-collector.service", "CapabilityBoundingSet", POWERS),
        ("mace-collector.service", "AmbientCapabilities", POWERS),
        ("mace-collector-root.conf", "CapabilityBoundingSet", POWERS_OF_ROOT),
    ],
)
def test_systemd_has_the_powers_that_the_container_has(name, setting, powers):
    text = (ROOT / "deploy/systemd" / name).read_text()
    allowed = re.search(rf"^{setting}=(.*)$", text, re.MULTILINE)[1].split()
    assert {name.removeprefix("CAP_") for name in allowed} == powers


@pytest.mark.slow
@pytest.mark.needs("npm")
def test_kubernetes_accepts_the_example():
    documents = {d["kind"]: d for d in yaml.safe_load_all((ROOT / "deploy/kubernetes/mace.yaml").read_text())}
    assert set(documents) == {"ServiceAccount", "ConfigMap", "DaemonSet"}
    daemons = documents["DaemonSet"]
    misspelt = yaml.safe_load(yaml.safe_dump(daemons).replace("readOnlyRootFilesystem", "readonlyRootFilesystem"))
    good, bad = held_to("kubernetes-types/apps/v1.d.ts", "DaemonSet", [daemons, misspelt])
    assert good == []
    assert any("readonlyRootFilesystem" in complaint for complaint in bad)
    pod = daemons["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert set(container["securityContext"]["capabilities"]["add"]) == POWERS
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (logs,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == config.Config().capture.pod_logs)
    assert logs["readOnly"]
    assert {"path": logs["mountPath"], "type": "Directory"} in (volume.get("hostPath") for volume in pod["volumes"])
    assert (
        daemons["spec"]["selector"]["matchLabels"].items() <= daemons["spec"]["template"]["metadata"]["labels"].items()
    )
