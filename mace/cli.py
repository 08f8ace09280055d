"""The command line: finds the command, parses its options, and runs it.

Results go to stdout, everything else to stderr. With `--json` stdout ends with one JSON object on one line. An
error prints one line on stderr and exits with status 1, wrong usage with 2; `--debug` shows the traceback.

Only the file of the called command is imported; docs/design/021-commands.md says what that saves.
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
"""128 + SIGINT, the status that shells give a command which SIGINT ended."""


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
        # The reader of our standard output, such as `head`, has closed its end.
        return EXIT_ERROR


def _parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments; return them, and the unknown ones for a command that passes these on to a tool.

    Such a command's `Options` has a field `others`. Raises SystemExit for wrong arguments and after help was printed,
    `OutputError` if the help cannot be written.
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
    """Print the shell's completions for the line in `COMP_LINE`, and end the process."""
    import argcomplete  # noqa: PLC0415 (only for this)

    # Splitting at white space is enough: a word with a quotation mark in it names no command.
    words = os.environ.get("COMP_LINE", "").split()[1:]
    argcomplete.autocomplete(parser_for(words))


def parser_for(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for these words after `mace`.

    If the words name a command, the parser has that command with its options, and no other. Otherwise it has the names
    and meanings of every command that could follow.
    """
    parser = argparse.ArgumentParser(
        prog="mace", description="What did a container's virtual network devices add to this packet, device by device?"
    )
    parser.add_argument("--version", action="version", version=f"mace {VERSION}")
    parser.add_argument("--debug", action="store_true", help="log more; show tracebacks")
    _add_commands(parser, "", registry.named(words))
    return parser


def _add_commands(parser: argparse.ArgumentParser, group: str, name: str) -> None:
    """Add the words that may follow `group` ("" stands for `mace`): the one that leads to `name`, or all of them."""
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
