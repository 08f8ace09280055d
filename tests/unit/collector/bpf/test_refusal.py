"""Each cause of a refusal is told apart from the others, in one line, with its own remedy."""

import errno
import platform
import resource

import pytest

from collector.bpf import refusal

BOTH = 1 << 38 | 1 << 39
NO_LOCKDOWN = "[none] integrity confidentiality\n"
LOG = """0: R1=ctx(off=0,imm=0) R10=fp0
combined stack size of 2 calls is 528. Too large
processed 142934 insns (limit 1000000) max_states_per_insn 22 total_states 6008 peak_states 3763 mark_read 39
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that describes the machine and the process."""

    def made(*, capabilities=BOTH, release="6.12.1", lockdown=NO_LOCKDOWN, locked_kib=None):
        (tmp_path / "status").write_text(f"Name:\tpython3\nCapPrm:\t0\nCapEff:\t{capabilities:016x}\n")
        (tmp_path / "lockdown").write_text(lockdown)
        limit = resource.RLIM_INFINITY if locked_kib is None else locked_kib * 1024
        monkeypatch.setattr(refusal, "_STATUS", tmp_path / "status")
        monkeypatch.setattr(refusal, "_LOCKDOWN", tmp_path / "lockdown")
        monkeypatch.setattr(platform, "release", lambda: release)
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))

    return made


def of(code, log=""):
    found = refusal.of_programs(OSError(code, "refused"), log)
    assert "\n" not in str(found)
    return found


@pytest.mark.parametrize(
    ("capabilities", "missing"),
    [(0, "CAP_PERFMON and CAP_BPF missing"), (1 << 39, ": CAP_PERFMON missing"), (1 << 38, ": CAP_BPF missing")],
)
@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.E2BIG])
def test_missing_capabilities_are_named(machine, capabilities, missing, code):
    machine(capabilities=capabilities)
    found = of(code, LOG)
    assert found.why.endswith(missing)
    assert "CAP_BPF and CAP_PERFMON" in found.remedy


def test_sys_admin_includes_both(machine):
    machine(capabilities=1 << 21)
    assert "seccomp" in of(errno.EPERM).remedy


def test_the_verifiers_verdict_is_told(machine):
    machine()
    for code in (errno.EACCES, errno.EINVAL, errno.E2BIG):
        found = of(code, LOG)
        assert found.why.endswith("combined stack size of 2 calls is 528. Too large")
        assert "Linux 6.12.1" in found.why
        assert "--source ftrace" in found.remedy


def test_a_refusal_without_a_log_is_told_by_its_errno(machine):
    machine()
    assert "No such process" in of(errno.ESRCH).why


def test_lockdown_goes_before_all_else(machine):
    """The verifier only says that a function is unknown."""
    machine(lockdown="none integrity [confidentiality]\n")
    found = of(errno.EINVAL, "unknown func bpf_probe_read_kernel#113\n")
    assert "locked down" in found.why
    assert "lockdown=integrity" in found.remedy
    machine(lockdown="none [integrity] confidentiality\n")
    assert "locked down" not in of(errno.EINVAL, "unknown func\n").why


def test_an_old_kernel_is_named(machine):
    machine(release="5.4.0-42-generic")
    found = of(errno.EINVAL, "")
    assert "Linux 5.4.0-42-generic is too old" in found.why
    assert "5.10" in found.remedy


def test_locked_memory_is_limited_before_linux_5_11(machine):
    machine(release="5.10.0-46", locked_kib=64)
    assert "64 KiB" in of(errno.EPERM).why
    assert "LimitMEMLOCK=infinity" in refusal.of_ring(OSError(errno.EPERM, ""), 4096).remedy
    machine(release="5.10.0-46", locked_kib=64, capabilities=BOTH | 1 << 24)
    assert "seccomp" in of(errno.EPERM).remedy
    machine(release="5.11.0", locked_kib=64)
    assert "seccomp" in of(errno.EPERM).remedy


def test_memory(machine):
    machine()
    assert "cgroup" in of(errno.ENOMEM).remedy
    found = refusal.of_ring(OSError(errno.ENOMEM, ""), 8 << 20)
    assert found.why == "no memory for a ring of 8 MiB"
    assert "ring_mib" in found.remedy
    assert "cgroup" in found.remedy


def test_attaching(machine):
    machine()
    assert "consume_skb cannot be attached" in refusal.of_attaching("consume_skb", OSError(errno.EBUSY, "")).why
    machine(capabilities=1 << 39)
    assert "CAP_PERFMON" in refusal.of_attaching("consume_skb", OSError(errno.EPERM, "")).why
