"""Declares what tests need from the machine, and skips or fails those whose needs are not met.

A test that needs root, a kernel facility or a program declares it:

    @pytest.mark.needs("root", "tracefs")
    def test_live_capture(): ...

or a whole file at once, `pytestmark = pytest.mark.needs("docker")`, or in the course of a test, by the fixture:

    def test_all_runtimes(runtime, needs):
        needs("docker")

If a need is not met, the test is skipped with the need and the reason. The environment variable MACE_REQUIRE, a
comma-separated list of needs or `all`, turns such a skip into a failure. CI sets `all`, so that a test that silently
stopped running is noticed.
"""

import functools
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from collector.bpf.source import BpfSource
from collector.ftrace import tracefs
from contracts.errors import Unavailable
from tests import containerd, memory_cgroup, pods
from tests.kernel import beside
from tests.kernel.matrix import Matrix
from tests.places import GOLDEN

if TYPE_CHECKING:
    from tests.browser import Browser

# --- hypothesis ---------------------------------------------------------------------------------

# No deadline: on a shared machine one example may take a hundred times as long as the next.
settings.register_profile("everyday", deadline=None)
# A CI run judges one change; it must not fail on an example that was drawn by luck. The everyday
# runs of the developers do the searching.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "everyday")

# A calibration of this machine would change what the commands print.
os.environ["MACE_CALIBRATION"] = "/nonexistent/calibration.json"


MACHINES = pytest.StashKey[beside.Machines]()

GOLDEN_TRACE = GOLDEN / "tracecmd" / "v6.dat"

# --- needs --------------------------------------------------------------------------------------


def _rps() -> str | None:
    """Return None if packets can be passed to another CPU (RPS), else why not."""
    if len(os.sched_getaffinity(0)) < 2 or not {0, 1} <= os.sched_getaffinity(0):
        return "RPS needs CPUs 0 and 1"
    return None if Path("/proc/sys/net/core/rps_sock_flow_entries").exists() else "this kernel has no CONFIG_RPS"


def _program(name: str, *version_args: str) -> str | None:
    """Return None if the program runs, else why not. Some distributions install a stub that prints an explanation."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")
    if path is None:
        return f"the program {name} is not installed"
    try:
        done = subprocess.run([path, *version_args], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} cannot be run: {error}"
    if done.returncode != 0:
        last_words = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        return f"{path} {' '.join(version_args)} exits {done.returncode}: {last_words[0]}"
    return None


def _installed(name: str) -> str | None:
    """Return None if the program is installed, else why not; for programs without an argument that exits 0."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")
    return None if found else f"the program {name} is not installed"


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _arm64_headers() -> str | None:
    header = Path("/usr/aarch64-linux-gnu/include/stdio.h")
    return None if header.exists() else f"the C library's headers for arm64 are not installed: no {header}"


def _root() -> str | None:
    return None if os.geteuid() == 0 else f"not root (effective user id {os.geteuid()})"


def _tracefs() -> str | None:
    try:
        root = tracefs.find()  # mounts tracefs if it is not mounted, like MACE itself
    except Unavailable as error:
        return f"{error.why}: {error.remedy}"
    if not (root / "events/net/net_dev_queue/format").exists():
        return f"{root} has no events/net"
    # Containers often mount it read-only.
    if not os.access(root / "instances", os.W_OK):
        return f"{root}/instances is not writable"
    return None


def _netns() -> str | None:
    reason = _first([_root(), _program("ip", "-V"), _program("nft", "--version"), _program("ping", "-V")])
    if reason is not None:
        return reason
    # Root without CAP_SYS_ADMIN may not make a namespace.
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, timeout=30, check=False)
    return None if done.returncode == 0 else f"network namespaces cannot be made: {done.stderr.strip()}"


def _userns() -> str | None:
    unprivileged = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*unprivileged, "unshare", "--user", "--map-root-user", "--net", "--mount", "true"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return None if done.returncode == 0 else f"users may not make namespaces here: {done.stderr.strip()}"


def _docker() -> str | None:
    return _first([_root(), _program("dockerd", "--version"), _program("docker", "--version")])


def _cni() -> str | None:
    if not Path("/usr/lib/cni/bridge").exists():
        return "/usr/lib/cni has no plugins (apt-get install containernetworking-plugins)"
    return _program("iptables", "--version")


def _ifb() -> str | None:
    add = ["unshare", "--net", "ip", "link", "add", "name", "try-ifb", "type", "ifb"]
    done = subprocess.run(add, capture_output=True, text=True, timeout=30, check=False)
    return None if done.returncode == 0 else f"the kernel makes no ifb device: {done.stderr.strip()}"


def _bpftrace() -> str | None:
    reason = _first([_root(), _program("bpftrace", "--version")])
    if reason is not None:
        return reason
    return None if Path("/sys/kernel/btf/vmlinux").exists() else f"kernel {platform.release()} has no BTF"


def _bpf() -> str | None:
    status = BpfSource.check()
    return None if status.ok else f"{status.detail}: {status.remedy}"


def _nobody() -> str | None:
    from tests import nobody  # here, because few tests ask

    return _root() or nobody.missing()


def _qemu() -> str | None:
    from tests.kernel import vm  # here, because only one test asks

    return vm.missing()


def _trace_processor() -> str | None:
    from tests import trace_processor  # here, because few tests ask

    return trace_processor.missing()


def _compose() -> str | None:
    from tests import images  # here, because few tests ask
    from tests.kernel import kernels

    try:
        return _program(str(images.compose()), "version")
    except kernels.KernelUnavailable as error:
        return str(error)


def _image() -> str | None:
    from tests import images

    return _first([_docker(), images.missing("python3-venv", "ca-certificates", "mosquitto", "mosquitto-clients")])


def _chromium() -> str | None:
    from tests import browser  # here, because few tests ask

    return browser.missing()


def _victoria() -> str | None:
    from tests import servers  # here, because only few tests ask

    return servers.missing_victoria()


def _ns_last_pid() -> str | None:
    found = os.access("/proc/sys/kernel/ns_last_pid", os.W_OK)
    return None if found else "the kernel lets nobody choose process ids (CONFIG_CHECKPOINT_RESTORE)"


def _memory_cgroup() -> str | None:
    return _first([_root(), memory_cgroup.missing()])


def _cgroup() -> str | None:
    return _first([_root(), pods.missing()])


def _podman() -> str | None:
    netavark = Path("/usr/lib/podman/netavark")
    return _first([_docker(), _program("podman", "--version"), None if netavark.exists() else f"no {netavark}"])


def _apptainer() -> str | None:
    from tests import apptainer  # here, because few tests ask

    return _first([_cni(), _netns(), apptainer.missing()])


def _containerd() -> str | None:
    return _first([_root(), _cni(), containerd.missing()])


NEEDS: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "tracefs": _tracefs,
    "netns": _netns,
    "userns": _userns,
    "docker": _docker,
    "podman": _podman,
    "apptainer": _apptainer,
    "cni": _cni,
    "ifb": lambda: _first([_netns(), _ifb()]),
    "bpf": _bpf,
    "nobody": _nobody,
    "memory_cgroup": _memory_cgroup,
    "cgroup": _cgroup,
    "containerd": _containerd,
    "containerd_events": containerd.missing_events,
    "bpftrace": _bpftrace,
    "rps": _rps,
    "schedstat": lambda: None if Path("/proc/self/schedstat").exists() else "this kernel has no CONFIG_SCHED_INFO",
    "perf": lambda: _program("perf", "--version"),
    "ns_last_pid": _ns_last_pid,
    "tcpdump": lambda: _program("tcpdump", "--version"),
    # The program prints its version and exits with the status of a usage error.
    "trace-cmd": lambda: _program("trace-cmd", "report", str(GOLDEN_TRACE)),
    "fping": lambda: _program("fping", "--version"),
    "busybox": lambda: _program("busybox", "true"),
    "zsh": lambda: _program("zsh", "--version"),
    "fish": lambda: _program("fish", "--version"),
    "dig": lambda: _program("dig", "-v"),
    "curl": lambda: _program("curl", "--version"),
    "qemu": _qemu,
    "trace_processor": _trace_processor,
    "mosquitto": lambda: _first([_installed("mosquitto"), _installed("mosquitto_passwd")]),
    "tmux": lambda: _program("tmux", "-V"),
    "openssl": lambda: _program("openssl", "version"),
    "cc": lambda: _program("cc", "--version"),
    "c++": lambda: _program("c++", "--version"),
    "gcc": lambda: _program("gcc", "--version"),
    "arm64": lambda: _first([_program("clang", "--version"), _arm64_headers()]),
    "cppcheck": lambda: _program("cppcheck", "--version"),
    "clang-format": lambda: _program("clang-format", "--version"),
    "sparse": lambda: _program("sparse", "--version"),
    "npm": lambda: _first([_program("npm", "--version"), _program("node", "--version")]),
    "chromium": _chromium,
    "systemd-analyze": lambda: _program("systemd-analyze", "--version"),
    "compose": _compose,
    "image": _image,
    "influxd": lambda: _program("influxd", "version"),
    "victoria-metrics": _victoria,
    # The kernel's scripts want more than perl-base, which every Debian has.
    "perl": lambda: _program("perl", "-MTerm::ANSIColor", "-MEncode", "-e", "1"),
}
"""Need -> its check, which returns None if the need is met, else a reason that can follow "needs NAME: "."""


@functools.cache
def _reason(name: str) -> str | None:
    """Return None if the need is met, else why not; checked once per run, because some checks start programs."""
    return NEEDS[name]()


def _known(names: Iterable[str], said_by: str) -> set[str]:
    """Return the names as a set; fails for an unknown name, because a misspelt need would never be checked."""
    unknown = set(names) - NEEDS.keys()
    if unknown:
        raise pytest.UsageError(f"{said_by}: unknown need {', '.join(sorted(unknown))}; there are {', '.join(NEEDS)}")
    return set(names)


def _required() -> set[str]:
    """Return the needs that MACE_REQUIRE requires."""
    names = {name.strip() for name in os.environ.get("MACE_REQUIRE", "").split(",")} - {""}
    return set(NEEDS) if "all" in names else _known(names, "MACE_REQUIRE")


def _insist(names: Iterable[str]) -> None:
    """Skip the running test, or fail it if MACE_REQUIRE says so, if one of the needs is not met."""
    for name in names:
        reason = _reason(name)
        if reason is None:
            continue
        if name in _required():
            pytest.fail(f"needs {name}: {reason} (MACE_REQUIRE insists on {name})", pytrace=False)
        pytest.skip(f"needs {name}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    """Check MACE_REQUIRE before anything runs; the marker is described here for runs with another configuration."""
    config.addinivalue_line("markers", "needs(*names): what the test needs from the machine, from NEEDS")
    _required()
    # A shell starts its background jobs with SIGINT ignored, and the commands under test would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("needs"):
            _known(mark.args, item.nodeid)
    beside.arrange(items)


# Last, when other hooks have removed the tests that were not selected.
@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[MACHINES] = beside.Machines(session.items)


def pytest_unconfigure(config: pytest.Config) -> None:
    if MACHINES in config.stash:
        config.stash[MACHINES].end()


# First, so that no fixture touches the machine before it is known to be fit.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        _insist(mark.args)
    machines = item.config.stash[MACHINES]
    if machines.before(item) and not (_reason("root") or _reason("qemu")):
        machines.started()


@pytest.fixture
def machines(pytestconfig: pytest.Config) -> Matrix:
    """The virtual machines of the selected kernels, started."""
    return pytestconfig.stash[MACHINES].started()


@pytest.fixture
def needs(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function `needs("docker", ...)` for tests and fixtures: it skips or fails the test if a need is not met."""

    def need(*names: str) -> None:
        _known(names, request.node.nodeid)
        _insist(names)

    return need


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:
    """A Chromium for all tests, which need `chromium`; each test makes pages of its own."""
    from tests.browser import Browser

    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()
