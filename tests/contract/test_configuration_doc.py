"""The table in docs/configuration.md equals contracts.config: every key, default, bounds and meaning.

After a change of contracts.config, `python -m tests.contract.test_configuration_doc` writes the table anew.
"""

import json
import re
from dataclasses import fields

from contracts import config
from tests.places import DOCS

PAGE = DOCS / "configuration.md"
HEAD = "| key | default | allowed | meaning |\n|---|---|---|---|\n"
TABLE = re.compile(r"^\| key .*\n(?:\|.*\n)*", re.MULTILINE)
KINDS = {"str": "string", "int": "whole number", "float": "number", "bool": "`true`, `false`"}


def keys():
    """Return (table, key) of every key of the configuration."""
    return [(name, key) for name, table in config.tables().items() for key in fields(table)]


def toml(value):
    """Return a default in TOML, in which strings, numbers, booleans and lists of strings are written as in JSON."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def allowed(key):
    low, high, choices = (key.metadata[name] for name in ("low", "high", "choices"))
    if choices:
        return ", ".join(f"`{toml(choice)}`" for choice in choices)
    if low is not None:
        return f"{KINDS[key.type]}, {f'at least {low}' if high is None else f'{low} to {high}'}"
    return KINDS.get(key.type, "list of strings")


def table():
    rows = (
        f"| `{name}.{key.name}` | `{toml(key.default)}` | {allowed(key)} | {key.metadata['meaning']} |\n"
        for name, key in keys()
    )
    return HEAD + "".join(rows)


def test_the_table_is_the_code():
    found = TABLE.findall(PAGE.read_text())
    assert found == [table()], "python -m tests.contract.test_configuration_doc writes it anew"


def test_the_defaults_on_the_page_are_the_defaults(tmp_path):
    """A file with all defaults of the page gives the default configuration, so that their types are right, too."""
    text = ""
    for name in dict.fromkeys(name for name, _ in keys()):
        rows = re.findall(rf"^\| `{re.escape(name)}\.(\w+)` \| `([^`]*)` \|", PAGE.read_text(), re.MULTILINE)
        text += f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in rows)
    (tmp_path / "all.toml").write_text(text)
    assert text.count(" = ") == len(keys())
    assert repr(config.load(tmp_path / "all.toml")) == repr(config.Config())


def test_the_examples_on_the_page_can_be_read(tmp_path):
    examples = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        (tmp_path / f"{number}.toml").write_text(example)
        config.load(tmp_path / f"{number}.toml")


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
