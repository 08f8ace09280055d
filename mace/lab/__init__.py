"""The test network: containers on bridges behind NAT, in namespaces of their own, with traffic to measure.

    with running(Spec(containers=2)) as lab:
        lab.ping("c1", count=100)
        lab.udp("c2", count=10_000, rate_pps=20_000)

docs/lab.md has a picture of it.
"""

from mace.lab.lifecycle import Lab, LabInfo, attach, capture_of, check, down, list_labs, running, up
from mace.lab.plan import HOST, REMOTE, FarEnd, Layout, Runtime, Spec
from mace.lab.traffic import Flow, PingResult, TcpResult, UdpResult

__all__ = [
    "HOST",
    "REMOTE",
    "FarEnd",
    "Flow",
    "Lab",
    "LabInfo",
    "Layout",
    "PingResult",
    "Runtime",
    "Spec",
    "TcpResult",
    "UdpResult",
    "attach",
    "capture_of",
    "check",
    "down",
    "list_labs",
    "running",
    "up",
]
