"""The command line: finds the command, has its file read the options, and runs it.

Results go to stdout, everything else to stderr. With `--json` stdout ends with one JSON object on one line. An
error is one line on stderr and exit status 1, wrong usage 2; `--debug` shows the traceback.

Only the file of the command that is called is imported; docs/design/021-commands.md has what that saves.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from typing import Final

from contracts.errors import MaceError, UsageError
from contracts.version import VERSION
from mace.commands import registry
from mace.commands.console import Console
from mace.commands.options import typed
from mace.commands.registry import GROUPS
from mace.shown import streams
from mace.shown.lines import complaint

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as shells count."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    debug = False
    try:
        args, others = _parsed(sys.argv[1:] if argv is None else argv)
        debug = args.debug
        from mace.shown.logs import log_to_stderr  # noqa: PLC0415 (not for help)

        log_to_stderr(debug=debug)
        command = import_module(registry.module(args.called))
        args.others = others
        return streams.finished(command.run(typed(command.Options, args), Console()))
    except MaceError as error:
        if debug:
            import traceback  # noqa: PLC0415 (hardly ever)

            for told in traceback.format_exc().splitlines():
                complaint(told)
        complaint(f"mace: {error}")
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has seen enough.
        return EXIT_ERROR


def _parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that a command passes on to a tool (its `Options` have a field `others`).

    SystemExit where they are wrong or ask for help, `OutputError` where that cannot be written.
    """
    parser = parser_for(argv)
    try:
        args, others = parser.parse_known_args(argv)
        if others and "others" not in {
            each.name for each in fields(import_module(registry.module(args.called)).Options)
        }:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
    except SystemExit:
        sys.stdout.flush()
        raise
    return args, others


def complete() -> None:
    """Answer a shell that asks what may follow (`_ARGCOMPLETE` is in the environment), and end the process."""
    import argcomplete  # noqa: PLC0415 (only for this)

    # What is typed so far; a word with a quotation mark in it names no command.
    words = os.environ.get("COMP_LINE", "").split()[1:]
    argcomplete.autocomplete(parser_for(words))


def parser_for(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these words behind `mace`.

    It knows the command that they name, with its options, and no other; where they name none, or only a group, it
    knows the names and meanings of all that could follow.
    """
    parser = argparse.ArgumentParser(
        prog="mace", description="What did a container's virtual network devices add to this packet, device by device?"
    )
    parser.add_argument("--version", action="version", version=f"mace {VERSION}")
    parser.add_argument("--debug", action="store_true", help="log more; show tracebacks")
    _add_commands(parser, "", registry.named(words))
    return parser


def _add_commands(parser: argparse.ArgumentParser, group: str, name: str) -> None:
    """The words that may follow `group` ("": `mace`): the one that leads to `name`, or all of them."""
    into = parser.add_subparsers(metavar="COMMAND", required=True)
    words = registry.within(group)
    following = name.removeprefix(group).split()[:1]
    for word in following or words:
        whole = f"{group} {word}".strip()
        meaning = registry.meaning(whole)
        made = into.add_parser(word, help=meaning, description=meaning)
        if not following:
            continue
        if whole in GROUPS:
            _add_commands(made, whole, name)
        else:
            made.set_defaults(called=whole)
            import_module(registry.module(whole)).add(made)
