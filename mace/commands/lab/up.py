"""`mace lab up`: makes a test network that stays until `mace lab down` removes it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.choices import LAYOUTS, OVERLAY
from mace.commands.console import Console
from mace.commands.options import FarEndOptions, LabShape, with_far_end, with_lab_shape


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace lab up`."""

    name: str
    shape: LabShape
    far_end: FarEndOptions
    cni: Path | None
    layout: str
    rps: list[str]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace lab up` to the parser."""
    parser.add_argument("name", nargs="?", default="lab", metavar="NAME", help="name of the lab (default lab)")
    with_lab_shape(parser, containers=1)
    with_far_end(parser)
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="how containers are connected: as Docker does, or as a CNI implementation does (default %(default)s)",
    )
    network.add_argument(
        "--overlay",
        action="store_const",
        const=OVERLAY,
        dest="layout",
        help=f"the same as --layout {OVERLAY}: two hosts with a bridge each, and VXLAN between them",
    )
    parser.add_argument(
        "--rps",
        action="append",
        default=[],
        metavar="DEVICE=CPUS",
        help="let these CPUs run the receive softirqs of a kind of the host's devices: outer, vxlan or veth, as in"
        " --rps vxlan=1 --rps veth=0-1",
    )
    network.add_argument(
        "--cni",
        type=Path,
        metavar="FILE",
        help="CNI network configuration list (.conflist) whose plugins make the containers' network; they are looked"
        " for in $CNI_PATH (default /usr/lib/cni:/opt/cni/bin)",
    )


def run(options: Options, console: Console) -> int:
    """Make the lab and print its members."""
    from mace import lab
    from mace.commands import settings

    made = lab.up(settings.spec(options.shape, options.name, options.far_end, options.cni, options.layout, options.rps))
    console.line(f"lab {made.name} is up: {', '.join(made.members)}")
    if made.network:
        console.line(made.network)
    if made.far_end:
        console.line(made.far_end)
    return 0
