"""Writes the page with its data inside: one file that opens from a mail attachment and loads nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from contracts import strict_json
from contracts.errors import MaceError
from mace.shown import views
from mace.shown.page import assets
from mace.shown.views import Asked
from storage.query import Filter, From, StoreReader

MOST_CONTAINERS: Final = 20
"""Most containers whose charts are in the file, the busiest ones: 20 take about 5 MB."""
_SLOWEST: Final = 20
"""Packets of each container that are in the file hop by hop."""
_OF_ALL: Final = ("overview", "sources", "runs")
_OF_CONTAINER: Final = ("path", "time", "heat", "distributions", "devices", "sources")


def key(view: str, **asked: object) -> str:
    """Return the name under which the page looks for a view."""
    return f"{view} {strict_json.dumps(sorted([name, str(value)] for name, value in asked.items()))}"


def write(
    store: StoreReader, where: Filter, source: From, path: Path, *, title: str, tables: str, most: int = MOST_CONTAINERS
) -> None:
    """Write the page of the rows that the filter admits; `tables` is for readers without scripts.

    Raises `StoreError`, and `MaceError` if the file cannot be written.
    """
    store.keep("one page")  # all of its views show one state of the store, read by one connection
    try:
        data = held(store, Asked.like(where, source), most)
    finally:
        store.close()
    try:
        path.write_text(assets.one_file(title, data, tables), encoding="utf-8")
    except OSError as error:
        raise MaceError(f"{path}: cannot write the page: {error.strerror}") from error


def held(store: StoreReader, asked: Asked, most: int) -> dict[str, Any]:
    """Return the JSON values of all views of the page, by `key`."""
    made = {name: views.view(store, name, asked) for name in _OF_ALL}
    found: dict[str, Any] = {key(name): view.as_dict() for name, view in made.items()}
    overview = made["overview"].columns
    packets: dict[tuple[str, str], int] = {}
    for host, container, count in zip(overview["host"], overview["container"], overview["count"], strict=True):
        packets[host, container] = packets.get((host, container), 0) + count
    busiest = sorted(packets, key=lambda place: (-packets[place], place))[:most]
    if len(busiest) < len(packets):
        note = f"The file holds the charts of the {most} busiest of {len(packets):,} containers."
        overview_told = found[key("overview")]
        overview_told["note"] = " ".join(filter(None, (overview_told["note"], note)))
    for host, container in busiest:
        found |= _of_container(store, replace(asked, host=host, container=container))
    return found


def _of_container(store: StoreReader, asked: Asked) -> dict[str, Any]:
    place = {name: value for name, value in (("container", asked.container), ("host", asked.host)) if value}
    found = {key(name, **place): views.view(store, name, asked).as_dict() for name in _OF_CONTAINER}
    trips = views.view(store, "round_trips", asked)
    if trips.about["samples"]:
        found[key("round_trips", **place)] = trips.as_dict()
    slowest = views.view(store, "packets", replace(asked, limit=_SLOWEST))
    found[key("packets", **place, limit=_SLOWEST)] = slowest.as_dict()
    about = {name: value for name, value in slowest.about.items() if name != "found"}
    for path in store.worst(_SLOWEST, asked.filter(0)):
        view = views.packet_view(path)
        view.about |= about
        found[key("packet", host=path.host, packet=path.packet, run=path.run)] = view.as_dict()
    return found
