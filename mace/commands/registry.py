"""Every command by name, in the order in which `mace --help` lists them.

The command `lab up` is the file `lab/up.py` in this folder, `verify-seal` is `verify_seal.py`. A command's file is
imported only to run the command, to complete its line or to print its help. The meanings are in this file, so that the
list of commands imports none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple


class Command(NamedTuple):
    """One command: its name, and what it does in one line."""

    name: str
    """One word, or the name of a group and one word."""
    meaning: str


GROUPS: Final = {
    "lab": "test networks",
    "module": "the kernel module",
    "store": "the store's files",
    "export": "files for other tools",
}
"""Groups of commands: the first word of names with two words, and the group's subject."""

COMMANDS: Final = (
    Command("check", "show what can run on this machine, and what to do where a part cannot"),
    Command("demo", "make a test network, send traffic, show what its devices add (root)"),
    Command("lab up", "make a test network that stays"),
    Command("lab down", "remove a test network and end all processes in it"),
    Command("lab list", "list test networks, including those left behind by killed runs"),
    Command("lab exec", "run a command in a container, in `host` or in `remote`"),
    Command("lab traffic", "send a bounded amount of traffic; prints what both ends counted"),
    Command("module build", "compile the kernel module, through DKMS where DKMS is installed"),
    Command("module load", "load the kernel module (root)"),
    Command("module unload", "unload the kernel module (root)"),
    Command("module status", "show whether the kernel module is loaded, its version, parameters and cost"),
    Command("run", "measure live: print a table, write rows and windows to the store (root)"),
    Command("top", "watch containers and devices live, or a store or recording: sort, filter, expand, freeze"),
    Command("record", "write live records to a capture file, to replay later or elsewhere (root)"),
    Command("ingest", "receive many hosts' streams from an MQTT broker and write their delays to one store"),
    Command("replay", "compute delays from recordings, with the same results as live"),
    Command("ping", "run ping in a container and correct each round trip for the container's devices (root)"),
    Command("correct", "correct the output of a tool that has run, with a capture of that time"),
    Command("wrap", "run another tool in a container and correct its output: fping, dig, curl (root)"),
    Command("calibrate", "measure the tracer's own cost, which ping and wrap then subtract (root)"),
    Command("experiment", "compare ping on the host, in a container, and corrected (root)"),
    Command("compare", "compare the sources' figures and costs on the same traffic (root)"),
    Command("report", "show a store or a recording as tables, paths and pictures"),
    Command("serve", "show a store or a recording in the browser, also beside a live run"),
    Command("query", "run SQL over a store"),
    Command("store check", "compare every segment of a store with its checksum, and read all rows"),
    Command("store convert", "write a store's old segments anew, so that Apache Spark reads them"),
    Command("verify-seal", "compare a sealed recording or store with its seal, and name every difference"),
    Command("export perfetto", "write recordings as a Perfetto trace, a timeline of packets"),
    Command("export otlp", "write recordings as OpenTelemetry traces, a trace for each packet"),
    Command("verify", "send numbered packets in scenarios and count how often the matching is right (root)"),
    Command("hooks", "where packets are observed"),
)


def named(words: Sequence[str]) -> str:
    """Return the command, or the group, that the words after `mace` name; "" if they name neither.

    Words that start with a dash are skipped: no option before a command's name has a value.
    """
    names = [word for word in words if not word.startswith("-")][:2]
    known = {command.name for command in COMMANDS} | GROUPS.keys()
    return next((name for n in (2, 1) if (name := " ".join(names[:n])) in known), "")


def within(group: str) -> tuple[str, ...]:
    """Return the words that may follow the name of a group, or `mace` if `group` is "", in the order of the table."""
    if group:
        return tuple(command.name.split()[1] for command in COMMANDS if command.name.startswith(f"{group} "))
    return tuple(dict.fromkeys(command.name.split()[0] for command in COMMANDS))


def meaning(name: str) -> str:
    """Return what a command does, or what a group's commands are, in one line."""
    if name in GROUPS:
        return f"{GROUPS[name]}: {', '.join(within(name))}"
    return next(command.meaning for command in COMMANDS if command.name == name)


def module(name: str) -> str:
    """Return the import name of a command's file."""
    return f"mace.commands.{name.replace(' ', '.').replace('-', '_')}"
