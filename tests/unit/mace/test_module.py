"""`mace module` on made-up machines in folders, and on this machine as far as possible."""

import subprocess
from pathlib import Path

import pytest

from contracts import abi
from contracts.errors import SourceError, Unavailable
from mace import module
from mace.module import Machine
from tests.made_rings import MadeDevice

RELEASE = "6.1.0-test"


class Made:
    """A machine made of a folder, with programs whose answers the test sets."""

    def __init__(self, path):
        self.root = path / "root"
        self.sources = path / "kmod"
        self.sources.mkdir(parents=True)
        (self.sources / "Makefile").touch()
        self.put("proc/modules", "")
        self.put(f"lib/modules/{RELEASE}/build/Makefile", "")
        self.programs = {"make", "gcc", "modprobe", "insmod", "rmmod"}
        self.answers = {}
        self.ran = []
        self.uid = 0

    def put(self, name, text):
        place = self.root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def loaded(self, refcnt=0):
        self.put("sys/module/mace/version", "0.1.0\n")
        self.put("sys/module/mace/refcnt", f"{refcnt}\n")
        self.put("sys/module/mace/parameters/max_ring_mib", "64\n")

    def run(self, argv):
        self.ran.append(list(argv))
        code, out, err = self.answers.get(argv[0], (0, "", ""))
        return subprocess.CompletedProcess(argv, code, out, err)

    @property
    def machine(self):
        which = {name: f"/usr/sbin/{name}" for name in self.programs}.get
        return Machine(self.root, self.sources, RELEASE, self.uid, self.run, which)


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


# --- build ----------------------------------------------------------------------------------------


def test_build_is_make_in_the_sources(made):
    assert module.build(made.machine) == str(made.sources / "mace.ko")
    kdir = made.root / "lib/modules" / RELEASE / "build"
    assert made.ran == [["make", "-C", str(made.sources), f"KDIR={kdir}", "modules"]]


def test_build_for_another_kernel_needs_no_modules_in_this_one(made):
    (made.root / "proc/modules").unlink()
    with pytest.raises(Unavailable, match="CONFIG_MODULES"):
        module.build(made.machine)
    other = made.root / "other"
    with pytest.raises(Unavailable, match="is no build directory"):
        module.build(made.machine, other)
    other.mkdir()
    (other / "Makefile").touch()
    made.programs |= {"dkms"}
    module.build(made.machine, other)
    assert [argv[0] for argv in made.ran] == ["make"]
    assert f"KDIR={other}" in made.ran[0]


@pytest.mark.parametrize(
    ("about", "package"),
    [
        ("ID=debian\n", f"apt-get install linux-headers-{RELEASE}"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', f"apt-get install linux-headers-{RELEASE}"),
        ("ID=fedora\n", f"dnf install kernel-devel-{RELEASE}"),
        ("ID=arch\n", "on Debian and Ubuntu"),
    ],
)
def test_missing_headers_are_named(made, about, package):
    made.put("etc/os-release", about)
    (made.root / f"lib/modules/{RELEASE}/build/Makefile").unlink()
    with pytest.raises(Unavailable) as caught:
        module.build(made.machine)
    assert f"the headers of kernel {RELEASE} are not installed" in caught.value.why
    assert package in caught.value.remedy
    assert made.ran == []


@pytest.mark.parametrize(("program", "package"), [("make", "make"), ("gcc", "gcc")])
def test_missing_tools_are_named(made, program, package):
    made.programs.remove(program)
    with pytest.raises(Unavailable, match=f"{package} is not installed"):
        module.build(made.machine)


def test_a_failed_build_shows_the_errors(made):
    noise = "".join(f"  CC [M]  {i}.o\n" for i in range(50))
    made.answers["make"] = (2, noise, "mace_probes.c:7:1: error: too few arguments\nmake: *** [x] Error 2\n")
    with pytest.raises(Unavailable) as caught:
        module.build(made.machine)
    assert "status 2:\n  mace_probes.c:7:1: error: too few arguments" in caught.value.why
    assert "CC [M]" not in caught.value.why


def test_no_sources(made):
    (made.sources / "Makefile").unlink()
    with pytest.raises(Unavailable, match="no sources"):
        module.build(made.machine)


def test_dkms_if_it_is_installed(made):
    made.programs.add("dkms")
    (made.sources / "dkms.conf").write_text('PACKAGE_NAME="mace"\nPACKAGE_VERSION="9.8"\n')
    assert module.build(made.machine) == f"mace/9.8, installed by DKMS for {RELEASE}"
    assert [argv[:2] for argv in made.ran] == [["dkms", what] for what in ("status", "add", "build", "install")]
    assert made.ran[2] == ["dkms", "build", "mace/9.8", "-k", RELEASE]
    made.answers["dkms"] = (7, "mace/9.8: added", "Error! Bad return status\n")
    with pytest.raises(Unavailable, match="dkms add failed with status 7"):
        module.build(made.machine)
    made.uid = 1000
    made.ran.clear()
    module.build(made.machine)
    assert made.ran[0][0] == "make"


def test_dkms_parses_the_dkms_conf_of_this_tree():
    text = (module.SOURCES / "dkms.conf").read_text()
    assert 'PACKAGE_NAME="mace"' in text
    assert "PACKAGE_VERSION=" in text


# --- load and unload ------------------------------------------------------------------------------


def test_load_prefers_the_installed_module(made):
    assert module.load(["max_ring_mib=128"], made.machine) == "loaded (modprobe)"
    assert made.ran == [["modprobe", "mace", "max_ring_mib=128"]]


def test_load_falls_back_to_the_built_module(made):
    made.answers["modprobe"] = (1, "", "modprobe: FATAL: Module mace not found in directory /lib/modules/x\n")
    with pytest.raises(Unavailable, match=r"is not built; `mace module build`"):
        module.load((), made.machine)
    (made.sources / "mace.ko").touch()
    assert module.load((), made.machine) == f"loaded ({made.sources / 'mace.ko'})"
    assert made.ran[-1] == ["insmod", str(made.sources / "mace.ko")]
    made.loaded()
    assert module.load((), made.machine) == "loaded already (version 0.1.0)"


@pytest.mark.parametrize(
    ("said", "why", "remedy"),
    [
        ("Key was rejected by service", "refuses the module's signature", "mokutil --import"),
        ("Required key not available", "Secure Boot", "mokutil"),
        (
            "Invalid module format",
            "built for another kernel (5.4.0-old), this kernel is 6.1.0-test",
            "mace module build",
        ),
        ("Operation not permitted", "not permitted", "CAP_SYS_MODULE"),
        ("Unknown symbol in module", "that this kernel does not have", "dmesg names"),
        ("Invalid parameters", "Invalid parameters", "NAME=VALUE"),
        ("Cannot allocate memory", "Cannot allocate memory", "dmesg"),
    ],
)
def test_errors_of_loading_have_a_remedy(made, said, why, remedy):
    made.programs.remove("modprobe")
    (made.sources / "mace.ko").write_bytes(b"\x7fELF\0license=GPL\0vermagic=5.4.0-old SMP mod_unload \0x")
    made.answers["insmod"] = (1, "", f"insmod: ERROR: could not insert module mace.ko: {said}\n")
    with pytest.raises(Unavailable) as caught:
        module.load((), made.machine)
    assert why in caught.value.why
    assert remedy in caught.value.remedy


def test_lockdown_and_disabled_loading_are_distinguished_from_missing_rights(made):
    made.answers["modprobe"] = (1, "", "modprobe: ERROR: could not insert 'mace': Operation not permitted\n")
    made.put("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    with pytest.raises(Unavailable, match=r"locked down \(integrity: Secure Boot\); sign it"):
        module.load((), made.machine)
    made.put("sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
    made.put("proc/sys/kernel/modules_disabled", "1\n")
    with pytest.raises(Unavailable, match="modules_disabled"):
        module.load((), made.machine)


@pytest.mark.parametrize("what", ["load", "unload"])
def test_only_root_may_load_and_unload(made, what):
    made.uid = 1000
    with pytest.raises(Unavailable, match=f"sudo mace module {what}"):
        getattr(module, what)(machine=made.machine)
    assert made.ran == []


def test_unload_names_the_processes_that_use_the_module(made):
    assert module.unload(made.machine) == "not loaded"
    made.loaded(refcnt=2)
    made.answers["rmmod"] = (1, "", "rmmod: ERROR: Module mace is in use\n")
    with pytest.raises(Unavailable, match="2 sessions are open; end the processes that `fuser"):
        module.unload(made.machine)
    made.answers["rmmod"] = (1, "", "rmmod: ERROR: something else\n")
    made.loaded()
    with pytest.raises(Unavailable, match="rmmod mace: rmmod: ERROR: something else"):
        module.unload(made.machine)
    made.answers.clear()
    assert module.unload(made.machine) == "unloaded"


# --- status ---------------------------------------------------------------------------------------


def test_status_of_a_loaded_module(made):
    made.loaded(refcnt=1)
    device = MadeDevice()
    found = module.status(made.machine, lambda: device)
    assert (found.loaded, found.version, found.abi, found.sessions) == (
        True,
        "0.1.0",
        f"{abi.ABI_MAJOR}.{abi.ABI_MINOR}",
        1,
    )
    assert found.parameters == {"max_ring_mib": "64"}
    assert found.as_dict()["cost"] == [
        {"hook": "netif_rx", "calls": 100, "timed": 25, "timed_ns": 1000, "ns_per_call": 40.0}
    ]
    text = module.show(found)
    assert "parameter max_ring_mib = 64" in text
    assert "cost netif_rx: 100 calls, 40 ns each (25 timed)" in text
    assert device.log == ["close"]


def test_status_of_a_module_that_cannot_be_opened(made):
    made.loaded()

    def refuse():
        raise SourceError("the module speaks ABI 2.0")

    found = module.status(made.machine, refuse)
    assert (found.loaded, found.abi) == (True, "")
    assert "speaks ABI 2.0" in found.detail


def test_status_without_the_module(made):
    assert "mace module build" in module.status(made.machine).remedy
    (made.sources / "mace.ko").touch()
    assert module.status(made.machine).remedy == "`mace module load`"
    (made.root / "proc/modules").unlink()
    assert "CONFIG_MODULES" in module.status(made.machine).detail


def test_a_kernel_without_modules_is_reported(capsys):
    from mace.cli import main

    if Path("/proc/modules").exists():
        pytest.skip("this kernel has modules")
    assert main(["module", "build"]) == 1
    assert main(["module", "status"]) == 0
    captured = capsys.readouterr()
    assert "no loadable modules (CONFIG_MODULES" in captured.err
    assert "no loadable modules (CONFIG_MODULES" in captured.out
