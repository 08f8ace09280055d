"""The page about the Python API and the example notebook do what they show."""

import doctest
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python-api.md"
NOTEBOOK = ROOT / "docs" / "example.ipynb"


def test_examples_of_the_page(tmp_path, monkeypatch):
    for module in ("pandas", "polars"):
        pytest.importorskip(module)
    monkeypatch.chdir(ROOT)
    examples = doctest.DocTestParser().get_doctest(
        # An example ends where its fence does.
        PAGE.read_text().replace("\n```\n", "\n\n\n"),
        {"work": tmp_path},
        PAGE.name,
        str(PAGE),
        0,
    )
    assert len(examples.examples) > 10
    said = []
    doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert not said, "".join(said)


def test_all_that_the_page_names_exists():
    import mace

    text = PAGE.read_text()
    for name in re.findall(r"`mace\.(\w+)`", text):
        assert hasattr(mace, name), name
    table = text[text.index("| of a recording") : text.index("Delays of packets")]
    for name in re.findall(r"`(\w+)(?:\([^)]*\))?`(?:, `\w+\(\)`)? *\|", table):
        assert hasattr(mace.open(ROOT / "docs" / "example.mace"), name), name


@pytest.mark.slow
def test_the_notebook_shows_what_it_computes():
    """Executed as Jupyter does; all text that cells print is as it is kept in the file."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    again = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(again, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert [_texts(cell) for cell in again.cells] == [_texts(cell) for cell in kept.cells]
    assert any(_pictures(cell) for cell in kept.cells)
    assert str(ROOT) not in json.dumps(kept)


def _texts(cell):
    """Text of each output; pieces of one stream are joined, since the kernel sends what is there when it looks."""
    told = []
    for output in cell.get("outputs", []):
        stream, text = output.get("name"), output.get("text", output.get("data", {}).get("text/plain", ""))
        if stream and told and told[-1][0] == stream:
            told[-1] = stream, told[-1][1] + text
        elif "image/png" not in output.get("data", {}):
            told.append((stream, text))
    return [text for _, text in told]


def _pictures(cell):
    return [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
