"""`mace lab exec`: runs a command in the network namespace of a container, of `host` or of `remote`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console
from mace.commands.options import with_lab


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace lab exec`."""

    lab: str
    member: str
    argv: tuple[str, ...]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace lab exec` to the parser."""
    with_lab(parser, "the lab (default lab)", default="lab")
    parser.add_argument("member", metavar="MEMBER", help="a container, `host` or `remote`")
    parser.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="the command to run, and its arguments"
    )


def run(options: Options, console: Console) -> int:
    """Run the command with our own standard streams; returns its exit status."""
    del console
    from mace import lab

    argv = list(options.argv)
    return lab.attach(options.lab).exec(options.member, argv[1:] if argv[:1] == ["--"] else argv)
