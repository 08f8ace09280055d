"""Pages that repeat facts of the code agree with it."""

import importlib
import re

from contracts.hooks import HOOKS
from storage import segments, tables
from tests.places import DOCS, GOLDEN, ROOT


def test_every_hook_is_on_its_page():
    page = (DOCS / "hooks.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\w) \| `(\S+)` \| (\w+) \| (.*) \|$", page, re.MULTILINE)
    assert rows == [(str(int(i.hook)), i.letter, i.tracepoint, i.way.name.lower(), i.meaning) for i in HOOKS]


def test_every_stored_column_is_on_its_page():
    sections = re.split(r"^## `(\w+)`$", (DOCS / "store.md").read_text(), flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    # Wide windows have the columns of windows.
    assert list(found) == [name for name in tables.COLUMNS if name not in segments.DAILY]
    for name, text in found.items():
        rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", text, re.MULTILINE)
        assert rows == [(column.name, column.meaning) for column in getattr(tables, name.upper())]


def test_links_have_a_target():
    for page in [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    assert set(re.findall(r"\]\((\w[\w-]*\.(?:md|ipynb))\)", index)) == {
        path.name for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")) if path.name != "README.md"
    }


def test_functions_that_the_life_of_a_packet_names_exist():
    page = (DOCS / "architecture.md").read_text()
    names = re.findall(r"`((?:contracts|collector|correlator|storage|mace)\.[\w.]+)`", page)
    assert len(names) > 20
    for name in names:
        parts = name.split(".")
        depth = next(n for n in range(len(parts) - 1, 0, -1) if _is_module(".".join(parts[:n])))
        found = importlib.import_module(".".join(parts[:depth]))
        for attribute in parts[depth:]:
            found = getattr(found, attribute)


def _is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_files_that_pages_name_exist():
    folders = "contracts|collector|correlator|storage|mace|kmod|bpf|tests|deploy|dashboards|docs"
    kernel_sides = [*ROOT.glob("kmod/*.md"), *ROOT.glob("bpf/*.md")]
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *GOLDEN.glob("*/README.md"), *kernel_sides]:
        for name in re.findall(rf"`((?:{folders})/[\w/.-]+\.(?:py|md|toml|c|h|mace|ipynb))`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)} names {name}"
