"""The examples on the page about the Python API and in the example notebook run and give the output shown."""

import doctest
import json
import re

import pytest

from collector.files import BY_NAME, recording_of
from contracts.records import Batch
from tests.places import GOLDEN_FILES, ROOT

PAGE = ROOT / "docs" / "python-api.md"
NOTEBOOK = ROOT / "docs" / "example.ipynb"


def test_examples_of_the_page(tmp_path, monkeypatch):
    for module in ("pandas", "polars"):
        pytest.importorskip(module)
    monkeypatch.chdir(ROOT)
    examples = doctest.DocTestParser().get_doctest(
        # An example ends with its fence.
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
    """The notebook, executed like in Jupyter, prints the text that is stored in its file."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    again = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(again, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert [_texts(cell) for cell in again.cells] == [_texts(cell) for cell in kept.cells]
    assert any(_pictures(cell) for cell in kept.cells)
    assert str(ROOT) not in json.dumps(kept)


IN_A_NOTEBOOK = """
import asyncio
import mace
from collector.files import PCAP_PAIR, recording_of
from contracts.records import Batch
asyncio.get_running_loop()  # as in every notebook; without one this would show nothing
counts = {}
for name, paths in files.items():
    if len(paths) == 1:
        found = mace.open(paths[0])
        assert found.format == name
        counts[name] = sum(map(len, found.batches()))
        assert found.summary().ledger.records == counts[name]
    else:
        with recording_of(PCAP_PAIR, paths).reader() as reader:
            counts[name] = sum(len(item) for item in reader.items() if isinstance(item, Batch))
stored = mace.open(files["text"][0]).store(work)
assert stored.sql("SELECT max(records) AS most FROM ledger")["most"].to_pylist() == [counts["text"]]
print(counts)
"""


@pytest.mark.slow
def test_every_format_opens_in_a_notebook(tmp_path):
    """Every format opens in a real Jupyter kernel, whose event loop runs during a cell, and gives the same records."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = [f"from pathlib import PosixPath\nfiles = {GOLDEN_FILES}\nwork = {str(tmp_path)!r}", IN_A_NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    counts = {}
    for name, paths in GOLDEN_FILES.items():
        with recording_of(BY_NAME[name], paths).reader() as reader:
            counts[name] = sum(len(item) for item in reader.items() if isinstance(item, Batch))
        assert counts[name] > 0
    assert counts.keys() == BY_NAME.keys() - {"pcap"}
    assert [_texts(cell) for cell in notebook.cells] == [[], [f"{counts}\n"]]


def _texts(cell):
    """Return the text of each output; pieces of one stream are joined, because the kernel divides it at random."""
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
