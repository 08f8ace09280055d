"""The registry of commands, their files, their help, README's table of commands, and the vocabulary of options."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest

import mace.commands
from collector import files
from contracts import config
from mace import cli, lab
from mace.commands import choices, registry
from mace.commands.options import typed
from mace.replaying import assembly, export
from mace.tools import output
from mace.trials import compare
from mace.trials.experiment import load, plan
from mace.trials.verify import scenarios
from storage import sql
from tests.places import ROOT

NAMES = [command.name for command in registry.COMMANDS]
HEAVY = {"numpy", "pyarrow", "rich", "textual", "duckdb", "collector", "correlator", "storage", "argcomplete"}
"""Modules that no help may import: together 0.8 s of CPU time and 90 MiB."""
IMPORTED = f"""
import contextlib, io, json, sys
from mace import cli
out, status = io.StringIO(), None
with contextlib.redirect_stdout(out):
    try:
        status = cli.main(json.loads(sys.argv[1]))
    except SystemExit as end:
        status = end.code
found = sorted({HEAVY!r} & {{name.partition(".")[0] for name in sys.modules}})
print(json.dumps({{"status": status, "out": out.getvalue(), "heavy": found}}))
"""
ARGUMENTS = {
    "lab exec": ["c1", "true"],
    "lab traffic": ["ping"],
    "record": ["-o", "x.mace"],
    "ping": ["--container", "c1", "203.0.113.2"],
    "correct": ["said.txt", "x.mace"],
    "wrap": ["--pid", "1", "dig"],
    "verify-seal": ["x.mace"],
    "export otlp": ["x.mace", "-o", "x.jsonl"],
    "export perfetto": ["x.mace", "-o", "x.pftrace"],
}
"""Required arguments of commands; other commands have none."""


def started(*argv):
    """Run `mace ARGV` in a process of its own, and return its output and imported modules."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, json.dumps(argv)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(done.stdout)


def parser_of(name):
    """Return the parser of one command."""
    parser = cli.parser_for(name.split())
    for word in name.split():
        [commands] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        parser = commands.choices[word]
    return parser


def options_of(name):
    """Return spelling -> option, for the options that a command's help shows."""
    shown = [each for each in parser_of(name)._actions if each.help != argparse.SUPPRESS]
    return {spelling: each for each in shown for spelling in each.option_strings}


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_every_command_names_its_options_and_imports_little(name):
    found = started(*name.split(), "--help")
    assert (found["status"], found["heavy"]) == (0, [])
    assert found["out"].startswith(f"usage: mace {name} ")
    for spelling in options_of(name):
        assert re.search(rf"^  (-\w, |-\w \w+, )?{spelling}\b", found["out"], re.MULTILINE) or spelling[1] != "-"
    # Every argument says what it is.
    assert not [each for each in parser_of(name)._actions if not each.help]


@pytest.mark.parametrize("group", ["", *registry.GROUPS])
def test_the_help_of_a_group_lists_its_commands(group):
    found = started(*group.split(), "--help")
    assert (found["status"], found["heavy"]) == (0, [])
    listed = re.findall(r"^    ([\w-]+)", found["out"], re.MULTILINE)
    assert listed == list(registry.within(group))


def test_mace_hooks_imports_no_part():
    found = started("hooks")
    assert (found["status"], found["heavy"]) == (0, [])
    assert "net:net_dev_queue" in found["out"]


def test_every_command_is_one_file_and_every_file_a_command():
    shared = {"choices", "console", "options", "registry", "settings"}
    folder = Path(mace.commands.__file__).parent
    found = {" ".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
    named = {name.replace("-", "_") for name in NAMES}
    assert {name for name in found if not name.endswith("__init__")} - shared == named


@pytest.mark.parametrize("name", NAMES)
def test_the_parser_of_everything_says_which_command_was_called(name):
    """No argument of a command has the name under which the parser keeps the command's name."""
    args, _ = cli.parser_for(name.split()).parse_known_args(["--debug", *name.split(), *ARGUMENTS.get(name, [])])
    assert (args.called, args.debug) == (name, True)


@pytest.mark.parametrize("name", NAMES)
def test_options_become_the_dataclass(name):
    """The arguments of a command and the fields of its dataclass have the same names."""
    command = import_module(registry.module(name))
    args = parser_of(name).parse_args(ARGUMENTS.get(name, [])[: None if name != "ping" else -1])
    args.others = ["203.0.113.2"]
    made = typed(command.Options, args)
    assert dataclasses.is_dataclass(made)
    assert command.Options.__dataclass_params__.frozen

    def leaves(kind):
        for field, of in typing.get_type_hints(kind).items():
            yield from leaves(of) if dataclasses.is_dataclass(of) else [field]

    former = {"experiment": {"rounds", "runtime"}, "ping": {"host_path"}}.get(name, set())
    arguments = {each.dest for each in parser_of(name)._actions} - {"help", argparse.SUPPRESS, "csv"} - former
    assert set(leaves(command.Options)) - {"others"} == arguments


def test_an_option_has_one_name_and_kind_in_every_command():
    """An option that selects a container, a store, a file or a format has one name and one kind of value."""
    kinds = {}
    for name in NAMES:
        for spelling, action in options_of(name).items():
            told = action.metavar or (tuple(action.choices) if action.choices else type(action).__name__)
            kinds.setdefault(spelling, {}).setdefault(str(told), []).append(name)
    one = {spelling for spelling, of in kinds.items() if len(of) == 1}
    # Only `query` has the format CSV; `--from` names a lab's member in one command, the source of figures in another.
    assert {spelling: of for spelling, of in kinds.items() if spelling not in one}.keys() == {"--format", "--from"}
    for spelling, metavar in (
        *(("--container", "NAME"), ("--netns", "NAME"), ("--pid", "N"), ("--lab", "NAME")),
        *(("--store", "DIR"), ("--record", "FILE"), ("--output", "FILE"), ("--config", "FILE")),
    ):
        assert kinds[spelling].keys() == {metavar}


@pytest.mark.parametrize("name", [name for name in NAMES if "--json" in options_of(name)])
def test_json_is_short_for_a_format(name):
    options = options_of(name)
    assert options["--json"].dest == options["--format"].dest
    assert options["--json"].const in options["--format"].choices


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("query", "--csv", "--format csv"),
        ("experiment", "--rounds", "--repetitions"),
        ("experiment", "--runtime", "--runtimes"),
        ("ping", "--host-path", "the default; --no-probes sends no probes"),
    ],
)
def test_an_option_that_was_renamed_says_so(name, old, new, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), old])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"mace {name}: error: {old} is now {new}\n")


def test_choices_in_help_equal_those_of_the_parts():
    assert config.SOURCES == choices.SOURCES
    assert tuple(each.value for each in lab.Runtime) == choices.RUNTIMES
    assert tuple(each.value for each in lab.FarEnd) == choices.FAR_ENDS
    assert tuple(each.value for each in lab.Layout) == choices.LAYOUTS
    assert lab.REMOTE == choices.REMOTE
    assert tuple(each.name for each in files.FORMATS) == choices.FILE_FORMATS
    assert choices.PART_MIB << 20 == assembly.PART_BYTES
    assert sql.MEMORY_MIB == choices.QUERY_MEMORY_MIB
    assert tuple(output.READERS) == choices.TOOLS
    assert tuple(plan.PACES) == choices.PACES
    assert tuple(plan.RUNTIMES) == choices.EXPERIMENT_RUNTIMES
    assert load.LOADS == choices.LOADS
    assert compare.KNOWN == choices.COMPARED
    assert tuple(scenarios.BY_NAME) == choices.SCENARIOS
    assert export.FLOW_KEYS == choices.FLOW_KEYS


def test_readmes_table_is_the_registry():
    told = []
    for row in re.findall(r"^\| (`mace .*?) \| ", (ROOT / "README.md").read_text(), re.MULTILINE):
        for span in re.findall(r"`mace ([^`]*)`", row):
            first, _, rest = span.partition(" ")
            words = re.findall(r"[a-z]+", rest) if first in registry.GROUPS else [""]
            inside = [word for word in words if not word or word in registry.within(first)]
            told += [f"{first} {word}".strip() for word in inside]
    assert set(told) == set(NAMES)


# Completion -----------------------------------------------------------------------------------------------


SHELLS = {
    "bash": (
        ["bash", "--norc", "-c"],
        """
eval "$(register-python-argcomplete mace)"
COMP_LINE='{line}' COMP_POINT={length} COMP_TYPE=9 COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_python_argcomplete mace
printf '%s\\n' "${{COMPREPLY[@]}}"
""",
    ),
    # zsh completes only in its line editor: the script sets the editor's variables and prints the offered words.
    "zsh": (
        ["zsh", "-f", "-c"],
        """
autoload -Uz is-at-least compinit && compinit -u -D
eval "$(register-python-argcomplete mace)"
_describe() {{ print -l -- ${{completions[@]}} }}
BUFFER='{line}' CURSOR={length} words=({words}) CURRENT=${{#words}}
_python_argcomplete
""",
    ),
    "fish": (
        ["fish", "--no-config", "-c"],
        """
register-python-argcomplete --shell fish mace | source
complete --do-complete '{line}'
""",
    ),
}
"""Shell -> script that prints the completions of a line, one per line."""


def completed(shell, line, home):
    """Return the completions that a shell offers, without the explanations of zsh and fish."""
    command, script = SHELLS[shell]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = " ".join(f"'{word}'" for word in line.split(" "))
    done = subprocess.run(
        [*command, script.format(line=line, length=len(line), words=words)],
        capture_output=True, text=True, check=False, timeout=120, cwd=home,
        env=os.environ | {"PATH": path, "HOME": str(home), "XDG_CONFIG_HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {re.split(r"[\t:]", told)[0].strip() for told in done.stdout.splitlines()} - {""}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell", ["bash", *(pytest.param(name, marks=pytest.mark.needs(name)) for name in ("zsh", "fish"))]
)
@pytest.mark.parametrize(
    ("line", "wanted", "unwanted"),
    [
        ("mace re", {"record", "replay", "report"}, {"run"}),
        ("mace lab ", {"up", "down", "list", "exec", "traffic"}, {"run"}),
        ("mace run --sto", {"--store"}, {"--source"}),
        ("mace run --source ", {"auto", "kmod", "bpf", "ftrace"}, set()),
        ("mace export perfetto --wo", {"--worst"}, set()),
    ],
)
def test_a_shell_completes(shell, line, wanted, unwanted, tmp_path):
    found = completed(shell, line, tmp_path)
    assert wanted <= found
    assert not unwanted & found
