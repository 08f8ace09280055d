"""Every command by name, in the order in which `mace --help` lists them.

`lab up` is the file `lab/up.py` beside this one. It is imported only when the command is called, completed, or asked
for its help; a meaning stands here, so that the list of commands needs none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple


class Command(NamedTuple):
    """One row of the table."""

    name: str
    """One word, or the name of a group and one word."""
    meaning: str


GROUPS: Final = {
    "lab": "test networks",
    "module": "the kernel module",
    "store": "the store's files",
    "export": "what others can look at",
}
"""First words of names of two words, and what their commands are about."""

COMMANDS: Final = (
    Command("check", "what can run on this machine, and if not, why and what to do"),
    Command("demo", "make a test network, send traffic, show what its devices add (root)"),
    Command("lab up", "make a test network that stays"),
    Command("lab down", "remove a test network, and all that runs in it"),
    Command("lab list", "test networks, those left over by killed runs included"),
    Command("lab exec", "run a command in a container, or in `host` or `remote`"),
    Command("lab traffic", "send bounded traffic; prints what both ends counted"),
    Command("module build", "compile it, by DKMS where that is installed"),
    Command("module load", "put it into the kernel (root)"),
    Command("module unload", "take it out of the kernel (root)"),
    Command("module status", "whether it is loaded, its version, parameters and own cost"),
    Command("run", "measure: live records to delays, a table and the store (root)"),
    Command("record", "write live records to a capture file, to replay later or elsewhere (root)"),
    Command("ingest", "many hosts' streams from a MQTT broker to delays and one store"),
    Command("replay", "capture files to the same answers as live"),
    Command("ping", "ping in a container, each round trip also without the time in the container's devices (root)"),
    Command("correct", "the same for what a tool has printed, with a capture file of that time"),
    Command("wrap", "the same for a tool that is run in a container now: fping, dig, curl (root)"),
    Command("experiment", "ping on the host, in a container and corrected, side by side (root)"),
    Command("compare", "sources side by side on the same traffic, and what each of them costs (root)"),
    Command("report", "tables, paths and pictures of what a store holds"),
    Command("query", "SQL over what a store holds"),
    Command("store check", "compare every segment with its checksum, and read all of its rows"),
    Command("export perfetto", "recordings to a Perfetto trace, a timeline of packets"),
    Command("verify", "play scenarios with numbered packets: how often the matching is right (root)"),
    Command("hooks", "where packets are observed"),
)


def named(words: Sequence[str]) -> str:
    """The command, or the group, that the words behind `mace` name; "" if they name neither.

    The options before a command's name take no values.
    """
    names = [word for word in words if not word.startswith("-")][:2]
    known = {command.name for command in COMMANDS} | GROUPS.keys()
    return next((name for n in (2, 1) if (name := " ".join(names[:n])) in known), "")


def within(group: str) -> tuple[str, ...]:
    """What may stand behind the name of a group, or with "" behind `mace`: words, in order."""
    if group:
        return tuple(command.name.split()[1] for command in COMMANDS if command.name.startswith(f"{group} "))
    return tuple(dict.fromkeys(command.name.split()[0] for command in COMMANDS))


def meaning(name: str) -> str:
    """Of a command or a group, in a line."""
    if name in GROUPS:
        return f"{GROUPS[name]}: {', '.join(within(name))}"
    return next(command.meaning for command in COMMANDS if command.name == name)


def module(name: str) -> str:
    """Import name of a command's file."""
    return f"mace.commands.{name.replace(' ', '.')}"
