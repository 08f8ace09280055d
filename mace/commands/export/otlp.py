"""`mace export otlp`: writes recordings as traces of OpenTelemetry, a trace for each packet."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mace.commands.console import Console
from mace.commands.export import ExportOptions, exported, with_export


@dataclass(frozen=True, slots=True)
class Options(ExportOptions):
    """Options and arguments of `mace export otlp`."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace export otlp` to the parser."""
    with_export(parser)


def run(options: Options, console: Console) -> int:
    """Write the traces and print how many there are."""
    from mace.replaying.export import export_spans

    return exported(options, console, export_spans)
