"""docs/metrics.md equals contracts.metrics: every measurement, tag and field, with unit, kind and meaning.

After a change of contracts.metrics, `python -m tests.contract.test_metrics_doc` writes the page's tables anew.
"""

import re

from contracts.ledger import Ledger
from contracts.metrics import MEASUREMENTS, TAGS
from contracts.schema import Grades
from tests.places import DOCS

PAGE = DOCS / "metrics.md"
MARKS = "<!-- catalogue -->\n", "<!-- end of the catalogue -->\n"


def catalogue():
    text = "\n## Tags\n\n| tag | meaning |\n|---|---|\n"
    text += "".join(f"| `{name}` | {meaning} |\n" for name, meaning in TAGS.items())
    for m in MEASUREMENTS.values():
        tags = ", ".join(f"`{tag}`" for tag in m.tags)
        text += f"\n## `{m.name}`\n\n{m.meaning} Time: {m.time[0].lower()}{m.time[1:]}\n\nTags: {tags}.\n\n"
        text += "| field | unit | kind | meaning |\n|---|---|---|---|\n"
        text += "".join(f"| `{f.name}` | {f.unit} | {f.kind} | {f.meaning} |\n" for f in m.fields)
    return text + "\n"


def test_the_page_is_the_catalogue():
    begin, end = MARKS
    found = PAGE.read_text().partition(begin)[2].partition(end)[0]
    assert found == catalogue(), "python -m tests.contract.test_metrics_doc writes it anew"


def test_names_are_good_for_every_database():
    """Names have lower-case letters, digits and underscores: no quoting in InfluxQL, SQL, PromQL or line protocol."""
    names = [*TAGS, *MEASUREMENTS, *(f.name for m in MEASUREMENTS.values() for f in m.fields)]
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)


def test_each_name_has_one_meaning():
    for m in MEASUREMENTS.values():
        names = [f.name for f in m.fields]
        assert len(set(names)) == len(names), m.name
        assert set(m.tags) <= set(TAGS), m.name
        # InfluxQL cannot distinguish a field and a tag of equal names.
        assert not set(m.tags) & set(names), m.name
    assert set(TAGS) == {tag for m in MEASUREMENTS.values() for tag in m.tags}


def test_the_catalogue_has_the_whole_ledger():
    names = {f.name for f in MEASUREMENTS["mace_internal"].fields}
    assert set(Ledger().as_dict()) <= names
    assert {n if n == "told_apart" else f"packets_{n}" for n in Grades().as_dict()} <= names


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + catalogue() + MARKS[1] + rest.partition(MARKS[1])[2])
