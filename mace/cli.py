"""The command line: one function a command, and nothing in it that a program could not do without it.

Results go to stdout, everything else to stderr. With `--json` stdout ends with one JSON object on one line. An
error is one line on stderr and exit status 1, wrong usage 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from contracts import config
from contracts.errors import MaceError, UsageError
from contracts.figures import Summary
from contracts.hooks import HOOKS
from contracts.interfaces import StreamSink
from contracts.version import VERSION
from mace import lab, module
from mace.check import statuses
from mace.commands import demo, query
from mace.commands import store as storecheck
from mace.live import publish, sinks
from mace.live.session import Session, Until
from mace.replaying import replay
from mace.shown import export, report, streams, tables
from mace.shown.terminal import Console, PlainTable, complaint, json_line, line, log_to_stderr, output
from mace.tools import correct, ping, wrap
from mace.trials import compare, experiment
from mace.trials.verify import command as verify
from storage.capture import CaptureSink

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as shells count."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    debug = False
    try:
        args = _parsed(argv)
        debug = args.debug
        log_to_stderr(debug=debug)
        return streams.finished(args.function(args))
    except MaceError as error:
        if debug:
            for told in traceback.format_exc().splitlines():
                complaint(told)
        complaint(f"mace: {error}")
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has seen enough.
        return EXIT_ERROR


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. SystemExit where they are wrong or ask for help, `OutputError` where that cannot be written."""
    parser = _parser()
    try:
        args, others = parser.parse_known_args(argv)
        if others and not hasattr(args, "others"):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
    except SystemExit:
        sys.stdout.flush()
        raise
    args.others = others
    return args


# Commands -------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    found = statuses(config.load(args.config))
    if args.json:
        json_line({name: asdict(status) for name, status in found.items()})
        return 0
    table = _table("part", "can run here", "found", "what to do")
    for name, status in found.items():
        table.add_row(name, Text("yes", "green") if status.ok else Text("no", "red"), status.detail, status.remedy)
    output().print(table)
    return 0


def _hooks(args: argparse.Namespace) -> int:
    if args.json:
        rows = [{"id": int(i.hook), "name": i.name, "tracepoint": i.tracepoint, "meaning": i.meaning} for i in HOOKS]
        json_line({"hooks": rows})
        return 0
    table = _table("id", "letter", "tracepoint", "sees the packet", "meaning")
    for info in HOOKS:
        table.add_row(str(int(info.hook)), info.letter, info.tracepoint, info.way.name.lower(), info.meaning)
    output().print(table)
    return 0


def _lab_up(args: argparse.Namespace) -> int:
    made = lab.up(_spec(args, args.name))
    line(f"lab {made.name} is up: {', '.join(made.members)}")
    return 0


def _lab_down(args: argparse.Namespace) -> int:
    removed = lab.down(args.name, force=args.force)
    line(f"lab {args.name}: {'removed' if removed else 'there is none'}")
    return 0


def _lab_list(args: argparse.Namespace) -> int:
    labs = lab.list_labs()
    if args.json:
        json_line({"labs": [asdict(info) for info in labs]})
        return 0
    table = _table("lab", "status", "runtime", "containers", "")
    for info in labs:
        table.add_row(info.name, info.status, info.runtime, ", ".join(info.containers), info.detail)
    output().print(table)
    return 0


def _lab_exec(args: argparse.Namespace) -> int:
    return lab.attach(args.lab).exec(args.member, args.argv[1:] if args.argv[:1] == ["--"] else args.argv)


def _lab_traffic(args: argparse.Namespace) -> int:
    place = lab.attach(args.lab)
    shape = {"count": args.count, "size": args.size, "family": 6 if args.ipv6 else 4}
    result: Any
    if args.kind == "ping":
        result = place.ping(args.sender, args.to, interval_s=1 / args.rate, **shape)
    elif args.kind == "udp":
        result = place.udp(args.sender, args.to, rate_pps=args.rate, **shape)
    else:
        result = place.tcp_requests(args.sender, args.to, rate_pps=args.rate, **shape)
    json_line({key: value for key, value in asdict(result).items() if key != "rtts_ns"})
    return 0


def _module_build(args: argparse.Namespace) -> int:
    line(f"built: {module.build(kdir=args.kdir)}")
    return 0


def _module_load(args: argparse.Namespace) -> int:
    line(f"module {module.NAME}: {module.load(args.parameters)}")
    return 0


def _module_unload(args: argparse.Namespace) -> int:
    del args
    line(f"module {module.NAME}: {module.unload()}")
    return 0


def _module_status(args: argparse.Namespace) -> int:
    found = module.status()
    if args.json:
        json_line(found.as_dict())
    else:
        line(f"module {module.NAME}: {module.show(found)}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    with ExitStack() as leaving:
        place = leaving.enter_context(lab.running(_spec(args, "demo")))
        store = args.store or Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="mace-demo-")))
        session = _session(args, place)
        summary = session.measure(lambda: demo.traffic(place, args.duration, session.say), store=store, tee=_tee(args))
        _show(summary, args)
        if not args.json:
            report.print_typical_paths(store, output())
            session.say(
                f"mace report --store {store} has more"
                if args.store
                else "with --store DIR the rows stay, for mace report"
            )
    return 0


def _run(args: argparse.Namespace) -> int:
    settings = _configured(args, lab.attach(args.lab) if args.lab else None)
    tee: StreamSink | None = _tee(args)
    publisher = None
    if args.publish is not None:
        settings = publish.configured(args, settings, args.publish)
        if args.publish_as == "records":
            publisher = publish.publisher(settings)
            tee = publisher if tee is None else publish.Both([tee, publisher])
    session = Session(settings, Console(stderr=True), quiet=args.json)
    store = None if args.no_store else Path(settings.store.path)
    publishing = publisher.state if publisher is not None else None
    _show(session.measure(_for(args.duration), store=store, tee=tee, publishing=publishing), args)
    if publisher is not None:
        complaint(publish.line(publisher))
    return 0


def _record(args: argparse.Namespace) -> int:
    sink = CaptureSink(args.output, overwrite=args.force)
    lost = _session(args, lab.attach(args.lab) if args.lab else None).record(_for(args.duration), sink)
    if args.json:
        json_line({"file": str(args.output), "records": sink.records, "lost": lost, "bytes": sink.bytes_written})
    else:
        line(f"{args.output}: {sink.records:,} records, {lost:,} lost in the ring, {sink.bytes_written:,} bytes")
    return 0


def _replay(args: argparse.Namespace) -> int:
    session = _session(args, None)
    if session.has_servers:
        # Servers are written to in one go: what they have taken cannot be taken back, or be skipped.
        found = session.replay(replay.recordings(args), store=replay.local_store(args))
    elif replay.in_parts(args):
        store = None if args.store is None else str(args.store)
        found = session.replay_into(store, replay.recorded_files(args), **replay.how(args))
    else:
        found = session.replay(replay.recordings(args))
    _show(found, args)
    return 0


def _correct(args: argparse.Namespace) -> int:
    session = _session(args, None)
    found = correct.corrected(args, session)
    session.deliver(found.round_trips())
    if args.json:
        json_line(found.as_dict())
        return 0
    correct.print_samples(found)
    found.tables(output())
    return 0


def _ping(args: argparse.Namespace) -> int:
    argv, user_clock, stamps_shown = ping.arguments(args.others)
    place = lab.attach(args.lab) if args.lab else None
    capture = _configured(args, place).capture
    netns_fd = ping.open_namespace(args, capture)
    term = None
    try:
        if args.host_path:
            term = ping.probing(args, argv, netns_fd, capture.host_netns).measure(_session(args, place))
        run = ping.Ping(argv, netns_fd, user_clock=user_clock, stamps_shown=stamps_shown, quiet=args.json)
        session = _session(args, place)
        found = run.measure(session, _tee(args))
    finally:
        os.close(netns_fd)
    session.deliver(found.round_trips())
    host_rtt = found.statistics()["host_rtt_ns"]["median"]
    if args.json:
        json_line(found.as_dict() | ({"host_path": term.as_dict(host_rtt)} if term else {}))
    else:
        found.tables(output(), lower_bound=term is None)
        if term:
            line(term.line(host_rtt))
    return run.status


def _wrap(args: argparse.Namespace) -> int:
    place = lab.attach(args.lab) if args.lab else None
    netns_fd = ping.open_namespace(args, _configured(args, place).capture)
    try:
        session = _session(args, place)
        found, status = wrap.measure(args, netns_fd, session, _tee(args))
    finally:
        os.close(netns_fd)
    session.deliver(found.round_trips())
    if args.json:
        json_line(found.as_dict())
    else:
        correct.print_samples(found)
        found.tables(output())
    return status


def _experiment(args: argparse.Namespace) -> int:
    experiment.check(args)
    args.ring_mib = args.ring_mib or experiment.RING_MIB
    if args.again:
        found = experiment.again(args.again, _session(args, None))
    else:
        with lab.running(experiment.spec(args)) as place:
            found = experiment.measure(args, place, _session(args, place))
    if args.png:
        experiment.draw(found, args.png)
    if args.json:
        json_line(found.as_dict())
    else:
        found.tables(output())
    return 0


def _compare(args: argparse.Namespace) -> int:
    compare.chosen(args)
    with lab.running(compare.spec(args)) if args.lab is None else nullcontext(lab.attach(args.lab)) as place:

        def session(source: str) -> Session:
            args.source = source
            # Its figures are of this comparison; nobody's database wants them among those of measurements.
            settings = replace(_configured(args, place), sinks=config.SinksConfig())
            return Session(settings, Console(stderr=True), quiet=args.json)

        found = compare.measure(args, place, session)
    if args.png:
        compare.draw(found, args.png)
    if args.json:
        json_line(found.as_dict())
    else:
        found.tables(output())
    return 0


def _verify(args: argparse.Namespace) -> int:
    return verify.run(args, _configured(args))


# What commands share --------------------------------------------------------------------------------------


def _configured(args: argparse.Namespace, place: lab.Lab | None = None) -> config.Config:
    """The configuration file, then what options say, then what a lab needs."""
    settings = config.load(args.config)
    capture, correlate, store = settings.capture, settings.correlate, settings.store
    if getattr(args, "source", None):
        capture = replace(capture, source=args.source)
    if getattr(args, "ring_mib", None):
        capture = replace(capture, ring_mib=args.ring_mib)
    if getattr(args, "no_rows", False):
        correlate = replace(correlate, rows=False)
    if getattr(args, "store", None):
        store = replace(store, path=str(args.store))
    if place is not None:
        capture = lab.capture_of(capture, place)
    found = sinks.configured(args, settings.sinks)
    return replace(settings, capture=capture, correlate=correlate, store=store, sinks=found)


def _session(args: argparse.Namespace, place: lab.Lab | None) -> Session:
    return Session(_configured(args, place), Console(stderr=True), quiet=args.json)


def _spec(args: argparse.Namespace, name: str) -> lab.Spec:
    return lab.Spec(
        name=name,
        containers=args.containers,
        bridges=args.bridges,
        same_addresses=args.same_addresses,
        runtime=lab.Runtime(args.runtime),
    )


def _tee(args: argparse.Namespace) -> CaptureSink | None:
    return CaptureSink(args.record) if args.record else None


def _for(duration_s: float | None) -> Until:
    return lambda: asyncio.sleep(duration_s) if duration_s else asyncio.Event().wait()


def _show(summary: Summary, args: argparse.Namespace) -> None:
    if args.json:
        json_line(summary.as_dict())
    else:
        tables.show(summary, output())


def _table(*headings: str) -> PlainTable:
    table = PlainTable()
    for heading in headings:
        table.add_column(heading)
    return table


# Options --------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mace", description="What did a container's virtual network devices add to this packet, device by device?"
    )
    parser.add_argument("--version", action="version", version=f"mace {VERSION}")
    parser.add_argument("--debug", action="store_true", help="log more; show tracebacks")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Any, meaning: str, into: Any = commands) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = into.add_parser(name, help=meaning, description=meaning)
        made.set_defaults(function=function)
        return made

    def with_json(to: argparse.ArgumentParser) -> None:
        to.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing shown meanwhile")

    def with_config(to: argparse.ArgumentParser) -> None:
        to.add_argument("--config", type=Path, metavar="FILE", help="TOML; docs/configuration.md has the keys")

    def with_capture(to: argparse.ArgumentParser) -> None:
        to.add_argument("--source", choices=config.SOURCES, help="where live records come from")
        to.add_argument("--ring-mib", type=_at_least(1, int), metavar="N", help="the kernel's ring, MiB per CPU")

    def with_live(to: argparse.ArgumentParser) -> None:
        to.add_argument("--lab", metavar="NAME", help="measure this lab instead of the machine")
        to.add_argument("--duration", type=_at_least(0.1), metavar="S", help="seconds; without it until Ctrl-C")

    def with_tee(to: argparse.ArgumentParser) -> None:
        to.add_argument("--record", type=Path, metavar="FILE", help="write the raw stream to a capture file as well")
        to.add_argument("--no-rows", action="store_true", help="keep windows only, no row per packet")

    def with_topology(to: argparse.ArgumentParser, containers: int) -> None:
        to.add_argument("--containers", type=_at_least(1, int), default=containers, metavar="N", help="how many")
        to.add_argument(
            "--bridges", type=_at_least(1, int), default=1, metavar="N", help="containers take turns on them"
        )
        to.add_argument("--same-addresses", action="store_true", help="the same subnet on each of the bridges")
        to.add_argument(
            "--runtime", choices=[r.value for r in lab.Runtime], default="netns", help="what makes containers"
        )

    one = command("check", _check, "what can run on this machine, and if not, why and what to do")
    with_config(one)
    with_json(one)

    one = command("demo", _demo, "make a test network, send traffic, show what its devices add (root)")
    with_topology(one, containers=2)
    one.add_argument("--duration", type=_at_least(0.1), default=8.0, metavar="S", help="seconds of traffic (default 8)")
    one.add_argument("--store", type=Path, metavar="DIR", help="keep the rows here")
    for group in (with_capture, with_tee, with_config, with_json):
        group(one)

    labs = commands.add_parser("lab", help="test networks: up, down, list, exec, traffic").add_subparsers(
        metavar="COMMAND", required=True
    )
    one = command("up", _lab_up, "make a test network that stays", labs)
    one.add_argument("name", nargs="?", default="lab", metavar="NAME")
    with_topology(one, containers=1)
    one = command("down", _lab_down, "remove a test network, and all that runs in it", labs)
    one.add_argument("name", nargs="?", default="lab", metavar="NAME")
    one.add_argument("--force", action="store_true", help="also one that a running process holds")
    one = command("list", _lab_list, "test networks, those left over by killed runs included", labs)
    with_json(one)
    one = command("exec", _lab_exec, "run a command in a container, or in `host` or `remote`", labs)
    one.add_argument("--lab", default="lab", metavar="NAME")
    one.add_argument("member", metavar="MEMBER")
    one.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    one = command("traffic", _lab_traffic, "send bounded traffic; prints what both ends counted", labs)
    one.add_argument("kind", choices=("ping", "udp", "tcp"), help="tcp: requests and responses over one connection")
    one.add_argument("--lab", default="lab", metavar="NAME")
    one.add_argument("--from", dest="sender", default="c1", metavar="MEMBER")
    one.add_argument("--to", default=lab.REMOTE, metavar="MEMBER")
    one.add_argument("--count", type=_at_least(1, int), default=100, metavar="N")
    one.add_argument("--size", type=_at_least(1, int), default=56, metavar="BYTES", help="of payload")
    one.add_argument("--rate", type=_at_least(0.1), default=100.0, metavar="N", help="a second")
    one.add_argument("--ipv6", action="store_true")

    modules = commands.add_parser("module", help="the kernel module: build, load, unload, status").add_subparsers(
        metavar="COMMAND", required=True
    )
    one = command("build", _module_build, "compile it, by DKMS where that is installed", modules)
    one.add_argument("--kdir", type=Path, metavar="DIR", help="another kernel's build directory")
    one = command("load", _module_load, "put it into the kernel (root)", modules)
    one.add_argument("parameters", nargs="*", metavar="NAME=VALUE")
    command("unload", _module_unload, "take it out of the kernel (root)", modules)
    one = command("status", _module_status, "whether it is loaded, its version, parameters and own cost", modules)
    with_json(one)

    one = command("run", _run, "measure: live records to delays, a table and the store (root)")
    one.add_argument("--store", type=Path, metavar="DIR", help="where rows and windows go")
    one.add_argument("--no-store", action="store_true", help="show only")
    sinks.add_options(one, endpoint=True)
    publish.add_publish_options(one)
    for group in (with_live, with_capture, with_tee, with_config, with_json):
        group(one)

    one = command("record", _record, "write live records to a capture file, to replay later or elsewhere (root)")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    one.add_argument("--force", action="store_true", help="overwrite the file")
    for group in (with_live, with_capture, with_config, with_json):
        group(one)

    one = command("ingest", publish.run_ingest, "many hosts' streams from a MQTT broker to delays and one store")
    publish.add_ingest_options(one)
    one.add_argument("--duration", type=_at_least(0.1), metavar="S", help="seconds; without it until Ctrl-C")
    with_config(one)
    with_json(one)

    one = command("replay", _replay, "capture files to the same answers as live")
    replay.add_options(one)
    sinks.add_options(one, endpoint=False)
    with_config(one)
    with_json(one)

    one = command(
        "ping", _ping, "ping in a container, each round trip also without the time in the container's devices (root)"
    )
    one.allow_abbrev = False
    one.usage = "%(prog)s (--container NAME | --netns NAME | --pid N) [option ...] [ping's arguments] HOST"
    ping.add_options(one)
    sinks.add_options(one, endpoint=False)
    one.add_argument(
        "--host-path", type=_at_least(1, int), metavar="N", help="before, measure the host path term with N probes"
    )
    one.set_defaults(others=[])
    for group in (with_capture, with_config, with_json):
        group(one)

    one = command("correct", _correct, "the same for what a tool has printed, with a capture file of that time")
    correct.add_options(one)
    sinks.add_options(one, endpoint=False)
    with_config(one)
    with_json(one)

    one = command("wrap", _wrap, "the same for a tool that is run in a container now: fping, dig, curl (root)")
    ping.add_options(one)
    wrap.add_options(one)
    sinks.add_options(one, endpoint=False)
    for group in (with_capture, with_config, with_json):
        group(one)

    one = command("experiment", _experiment, "ping on the host, in a container and corrected, side by side (root)")
    experiment.add_options(one)
    for group in (with_capture, with_config, with_json):
        group(one)

    one = command("compare", _compare, "sources side by side on the same traffic, and what each of them costs (root)")
    compare.add_options(one)
    with_config(one)
    with_json(one)

    one = command("report", report.run, "tables, paths and pictures of what a store holds")
    report.add_options(one)
    with_config(one)
    with_json(one)

    one = command("query", query.run, "SQL over what a store holds")
    query.add_options(one)
    with_config(one)
    with_json(one)

    stores = commands.add_parser("store", help="the store's files: check").add_subparsers(
        metavar="COMMAND", required=True
    )
    one = command("check", storecheck.run, "compare every segment with its checksum, and read all of its rows", stores)
    storecheck.add_options(one)
    with_config(one)
    with_json(one)

    exports = commands.add_parser("export", help="what others can look at: perfetto").add_subparsers(
        metavar="FORMAT", required=True
    )
    one = command("perfetto", export.run, "recordings to a Perfetto trace, a timeline of packets", exports)
    export.add_options(one)
    with_config(one)
    with_json(one)

    one = command("verify", _verify, "play scenarios with numbered packets: how often the matching is right (root)")
    verify.add_options(one)
    one.add_argument("--source", choices=config.SOURCES, help="where live records come from")
    with_config(one)
    one.add_argument("--json", action="store_true", help="one JSON object a scenario on stdout")

    one = command("hooks", _hooks, "where packets are observed")
    with_json(one)
    return parser


def _at_least(low: float, kind: type = float) -> Any:
    def parse(text: str) -> float:
        value = kind(text)
        # Written so that nan, which compares false, is refused.
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: expected at least {low:g}")
        return value  # type: ignore[no-any-return]

    parse.__name__ = kind.__name__
    return parse
