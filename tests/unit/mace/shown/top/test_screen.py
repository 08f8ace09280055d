"""The screen, driven by Textual's pilot: what keys do, and that nothing is lost, told wrong, or drawn across it."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from contracts.errors import StoreError
from contracts.ledger import Ledger
from contracts.schema import Direction
from mace.shown.top import screen
from mace.shown.top.feed import Look
from mace.shown.top.screen import Messages, TopApp
from mace.shown.worst import WorstPackets
from tests.made_minutes import make_minute, moment_after
from tests.nasty_names import NASTY, named_devices

_, _, RESULTS = make_minute(seconds=12, containers=3)
LATER = moment_after(RESULTS)
LOOK = Look(moment_after(RESULTS[:-2]), Ledger(records=10, matched=10), (), kept_s=4.0)


@dataclass
class MadeFeed:
    """A feed of made looks; notes what it was asked."""

    newest: Look = LOOK
    title: str = "host · made"
    is_live: bool = True
    is_over: bool = False
    asked: list = field(default_factory=list)
    refusal: str = ""

    async def look(self):
        self.asked.append("look")
        return self.newest

    async def worst(self, limit, look, chosen):
        found = WorstPackets("host", "run-1")
        for each in RESULTS:
            found.add(each)
        return found.worst(limit, look.moment.since_utc_ns, chosen or (lambda _: True))

    def move(self, seconds, *, to_end=False):
        self.asked.append((seconds, to_end))

    async def record(self):
        if self.refusal:
            raise StoreError(self.refusal)
        return "recording to x.mace"

    async def trace(self):
        return "wrote y.pftrace"


def shown(app):
    return "\n".join(strip.text for strip in app.table._lines)


def lines(app):
    return shown(app).split("\n")


def piloted(work, feed=None, size=(80, 24), messages=None, **how):
    """Run `work(app, pilot)` on a screen that has drawn once."""
    feed = feed or MadeFeed()
    app = TopApp(feed, messages or Messages(), **how)

    async def run():
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: app.table._lines)
            await work(app, pilot)

    asyncio.run(run())
    return app


async def until(pilot, true: Callable[[], object]):
    """Wait until something holds."""
    async with asyncio.timeout(120):
        while not true():
            await pilot.pause(0.01)


def keyed(*keys, **how):
    """Return the screen's text after these keys."""
    found = []

    async def work(app, pilot):
        await pilot.press(*keys)
        found.append(shown(app))

    piloted(work, **how)
    return found[0]


def test_containers_with_their_figures_and_the_ledger():
    told = keyed()
    for name in ("c0", "c1", "c2"):
        assert f"▸ {name} " in told
    assert "container▴" in told
    assert "lost 0 · discarded 0 · records 10: matched 10, others 0" in told
    assert "t: 4 s kept" in told


@pytest.mark.slow
@pytest.mark.parametrize("size", [(80, 24), (40, 10), (200, 60), (20, 4), (1, 1)])
def test_any_size(size):
    async def work(app, pilot):
        for key in ("down", "e", "w", "escape", "l", "escape", "question_mark"):
            await pilot.press(key)
            assert len(app.table._lines) <= size[1]
            assert all(strip.cell_length == size[0] for strip in app.table._lines)

    piloted(work, size=size)


def test_another_size_is_drawn_anew():
    async def work(app, pilot):
        await pilot.press("question_mark")
        await pilot.resize_terminal(100, 30)
        await until(pilot, lambda: len(app.table._lines) == 30)
        assert {strip.cell_length for strip in app.table._lines} == {100}

    piloted(work)


def test_enter_expands_a_container_into_its_path():
    told = keyed("down", "down", "enter")
    assert "▾ c1 " in told
    for device in ("eth0", "vethc1", "br0", "out0", "rem0"):
        assert f"    {device} " in told
    assert "▾" not in keyed("down", "down", "enter", "enter").replace("container▾", "")


def test_keys_sort_by_every_column():
    async def work(app, pilot):
        for name in ("direction▴", "packets/s▾", "p50▾", "p99▾", "max▾", "container▴"):
            await pilot.press("s")
            assert name in lines(app)[1]
        await pilot.press("S", "o")
        assert "max▴" in lines(app)[1]

    piloted(work)


def test_a_filter_is_typed_kept_and_removed():
    async def work(app, pilot):
        await pilot.press("slash", "c", "1")
        assert "filter: c1_" in lines(app)[-1]
        assert "c0" not in shown(app)
        await pilot.press("x", "backspace", "enter")
        assert "filter 'c1' hides 4" in lines(app)[0]
        await pilot.press("escape")
        assert "▸ c0" in shown(app)
        await pilot.press("slash", "q", "escape")
        assert "▸ c0" in shown(app)

    piloted(work)


def test_a_filter_that_matches_nothing_says_so():
    assert "no container's name contains" in keyed("slash", "z", "z", "enter")


def test_the_window_changes():
    for key, window in (("1", "1 s to"), ("2", "10 s to"), ("3", "60 s to")):
        assert window in keyed(key)


def test_a_frozen_table_stays_and_its_ledger_goes_on():
    async def work(app, pilot):
        await pilot.press("f")
        table = lines(app)[1:-4]
        app.table.feed.newest = replace(
            LOOK, moment=LATER, ledger=Ledger(records=99, matched=96, lost=3), losses=("3 lost.",)
        )
        await until(pilot, lambda: "lost 3" in shown(app))
        assert lines(app)[1 : 1 + len(table) - 1] == table[:-1]
        assert "FROZEN" in lines(app)[0]
        await pilot.press("f")
        assert app.table.shown.moment is LATER
        assert "FROZEN" not in shown(app)

    piloted(work)


def style_at(app, text):
    """Return the style of the piece of a line that begins with a text."""
    [strip] = [strip for strip in app.table._lines if strip.text.startswith(text)]
    return next(iter(strip)).style


def test_the_ledger_turns_red_when_something_is_lost():
    async def work(app, pilot):
        assert style_at(app, "lost 0").color is None
        app.table.feed.newest = replace(LOOK, ledger=Ledger(records=9, matched=9, lost=2), losses=("2 were lost.",))
        await until(pilot, lambda: "! lost 2" in shown(app))
        assert style_at(app, "! lost 2").color.name == "red"
        assert "2 were lost." in shown(app)

    piloted(work)


def test_the_worst_packets_hop_by_hop_and_of_the_filtered_containers():
    async def work(app, pilot):
        await pilot.press("w")
        await until(pilot, lambda: "packets with the largest overhead" in shown(app))
        assert "all containers" in shown(app)
        assert "tied by buffer" in shown(app)
        assert "from the first hop" in shown(app)
        await pilot.press("end")
        assert "all containers" not in shown(app)
        await pilot.press("escape", "slash", "c", "2", "enter", "w")
        await until(pilot, lambda: "'c2' in their name" in shown(app))
        assert " of c2," in shown(app)
        assert " of c0," not in shown(app)

    piloted(work)


def test_recordings_and_traces_say_their_file():
    async def work(app, pilot):
        await pilot.press("r")
        await until(pilot, lambda: "recording to x.mace" in shown(app))
        await pilot.press("t")
        await until(pilot, lambda: "wrote y.pftrace" in shown(app))
        app.table.feed.refusal = "the disk is full"
        await pilot.press("r")
        await until(pilot, lambda: "the disk is full" in shown(app))

    piloted(work)


def test_messages_are_lines_of_the_screen():
    async def work(app, pilot):
        app.table.messages.add("one \x1b[31m warning")
        app.table.messages.add("another")
        await until(pilot, lambda: "another (2 messages, l shows all)" in shown(app))
        await pilot.press("l")
        assert "one \\x1b[31m warning" in shown(app)

    piloted(work)


def test_many_messages_are_bounded_and_the_rest_is_counted():
    messages = Messages()
    for number in range(1_000):
        messages.add(str(number))
    assert messages.all()[:2] == ["800 earlier messages", "800"]
    assert messages.newest == "999"


def test_a_look_that_fails_is_a_message():
    class Broken(MadeFeed):
        async def look(self):
            raise StoreError("damaged: half a segment")

    async def work(app, pilot):
        await until(pilot, lambda: "damaged: half a segment" in shown(app))

    piloted(work, feed=Broken())


def test_a_store_is_read_again_only_when_its_time_changes():
    feed = MadeFeed(is_live=False)

    async def work(app, pilot):
        await pilot.press("2", "left")
        await until(pilot, lambda: feed.asked.count("look") == 2)
        await pilot.press("right", "b", "n")
        assert [each for each in feed.asked if each != "look"] == [(-10, False), (10, False), (None, False), (0, True)]
        # Drawings go on, looks do not.
        for _ in range(3):
            await app.table.tick()
        before = feed.asked.count("look")
        await app.table.tick()
        assert feed.asked.count("look") == before
        assert "left right time" in lines(app)[-1] or "w worst" in lines(app)[-1]

    piloted(work, feed=feed)


@pytest.mark.parametrize("keys", [["q"], ["ctrl+c"], ["ctrl+q"], ["slash", "ctrl+c"]])
def test_keys_that_quit(keys):
    async def work(app, pilot):
        await pilot.press(*keys)
        await until(pilot, lambda: not app.is_running or app._exit)

    assert piloted(work).return_code == 0


def test_the_end_of_the_feed_closes_the_screen():
    feed = MadeFeed()

    async def work(app, pilot):
        feed.is_over = True
        await until(pilot, lambda: not app.is_running or app._exit)

    assert piloted(work, feed=feed).return_code == 0


@pytest.mark.slow
def test_names_are_text_in_every_view():
    devices = named_devices(NASTY)
    _, _, results = make_minute(seconds=2, containers=len(NASTY), packets_per_s=300, devices=devices)

    class Nasty(MadeFeed):
        async def worst(self, limit, look, chosen):
            found = WorstPackets("h\x1b[2J", "run-1")
            for each in results:
                found.add(each)
            return found.worst(limit, 0)

    look = replace(LOOK, moment=moment_after(results), on_host_network=("\x1b]0;x\x07",), unseen=("[/]\x1b[2J",))

    async def work(app, pilot):
        for key in ("e", "w", "escape", "l", "escape"):
            await pilot.press(key)
            await pilot.pause()
            assert all(strip.text.isprintable() for strip in app.table._lines), key
        assert "[red]x" in shown(app)

    piloted(work, feed=Nasty(newest=look, title="[b]\x1b[0m"), size=(160, 700))


def test_in_ascii():
    told = keyed("e", ascii_only=True)
    assert told.isascii()
    assert "v c0 " in told


def test_without_colour(monkeypatch):
    """Textual leaves colours out; what they say, words and signs say too."""
    monkeypatch.setenv("NO_COLOR", "1")
    app = TopApp(MadeFeed(), Messages())
    assert app.no_color


@pytest.mark.slow
def test_two_hundred_containers():
    _, _, results = make_minute(seconds=3, containers=200, packets_per_s=1_600)
    feed = MadeFeed(newest=replace(LOOK, moment=moment_after(results)))

    async def work(app, pilot):
        assert len(app.table.view.rows) == 400
        await pilot.press("end")
        assert "c99" in shown(app)
        assert app.table.view.selected.direction is Direction.INGRESS
        await pilot.press("e", "home", "slash", "1", "9", "9", "enter")
        assert len(app.table.view.rows) == 2 + 5 + 6

    piloted(work, feed=feed)


def test_a_terminal_that_takes_nothing_is_not_drawn_to(monkeypatch):
    """A pipe that is full stands for the terminal; looks go on, so that the ledger is right when it takes more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(1 << 16))
    except BlockingIOError:
        pass
    with os.fdopen(writer, "w") as stream:

        async def work(app, pilot):
            monkeypatch.setattr(screen.sys, "__stderr__", stream)
            assert not screen.takes_more()
            before = shown(app)
            app.table.feed.newest = replace(LOOK, ledger=Ledger(records=77, matched=77))
            await until(pilot, lambda: app.table.seen.ledger.records == 77)
            await app.table.tick()
            assert shown(app) == before
            while not screen.takes_more():
                os.read(reader, 1 << 16)
            await app.table.tick()
            assert "records 77" in shown(app)

        piloted(work)
        monkeypatch.undo()
    os.close(reader)
