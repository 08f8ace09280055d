"""`mace verify-seal`: compares a recording or a store with its seal, and names every difference."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import UsageError
from mace.commands.console import Console
from mace.commands.options import JSON, with_format


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace verify-seal`."""

    sealed: Path
    public_key: Path | None
    head: str | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace verify-seal` to the parser."""
    parser.add_argument("sealed", type=Path, metavar="FILE|STORE", help="a capture file with FILE.seal, or a store")
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="the operator's public key (PEM), kept apart from the data; without it the key is only shown",
    )
    parser.add_argument(
        "--head", metavar="HEX", help="a hash that sealing has printed; the seal must contain that statement"
    )
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print the seal's state, every difference and the clocks; returns 1 unless all is as sealed, to its end."""
    from mace.shown.terminal import styled
    from storage.sealing.check import check
    from storage.sealing.keys import public_key

    key = public_key(options.public_key) if options.public_key else None
    found = check(options.sealed, key=key)
    head_known = True
    if options.head is not None:
        head = options.head.lower()
        if len(head) != 64 or set(head) - set("0123456789abcdef"):
            raise UsageError(f"--head {options.head}: expected the 64 hexadecimal digits that sealing has printed")
        head_known = head in found.heads
    status = 0 if found.state == "intact" and head_known else 1
    if options.format == JSON:
        console.json(found.as_dict() | ({"head_known": head_known} if options.head is not None else {}))
        return status
    lines = [f"{found.path}: {found.line()}", *map(str, found.findings)]
    if found.more_findings:
        lines.append(f"and {found.more_findings:,} more")
    if not head_known:
        lines.append(f"missing: the statement {options.head}: the seal was cut, or is not the one that had it")
    lines += found.notes
    lines += [f"clocks, {when}: {pair}" for when, pair in found.clocks]
    lines.append(f"{found.statements:,} statements are verified; the last one is {found.head}")
    for line in lines:
        console.out().print(styled(line, ""), soft_wrap=True)
    return status
