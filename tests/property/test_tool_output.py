"""Outputs of tools with known samples, in many forms and mixed with other lines, are parsed to these samples."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.schema import NOT_TOLD
from mace.tools.output import read

HOST = "203.0.113.2"
LOST, TIMED, UNTIMED = "lost", "timed", "untimed"
FATES = st.lists(st.sampled_from([TIMED, TIMED, TIMED, LOST, UNTIMED]), min_size=1, max_size=12)
STRANGE = st.lists(
    st.tuples(
        st.integers(0, 40), st.sampled_from(["something", "ping: sendmsg: No buffer space available", "\x1b]0;c1\a"])
    ),
    max_size=3,
)


def rtt_us(n):
    return 80 + 7 * (n % 90)


def mixed(lines, strange):
    """Return the lines with foreign lines at any place, also before the first and after the last."""
    lines = list(lines)
    for at, text in strange:
        lines.insert(min(at, len(lines)), text)
    return lines


def truth(fates):
    """Return index → round trip time, ns, and the indices of requests whose reply has no time."""
    timed = {n: rtt_us(n) * 1_000 for n, fate in enumerate(fates) if fate == TIMED}
    return timed, {n for n, fate in enumerate(fates) if fate == UNTIMED}


def check_ping(lines, strange, runs):
    """Check successive runs of iputils ping (`runs`: lists of fates), numbered on from 1."""
    samples, reader = read(mixed(lines, strange))
    timed, untimed, base = {}, set(), 1
    for fates in runs:
        ours, without = truth(fates)
        timed |= {base + n: rtt_ns for n, rtt_ns in ours.items()}
        untimed |= {base + n for n in without}
        base += len(fates)
    first = ~samples.duplicate
    told = dict(zip(samples.seq[first].tolist(), samples.rtt_ns[first].tolist(), strict=True))
    assert told == {n: timed.get(n, NOT_TOLD) for n in range(1, base)}
    assert int(first.sum()) == base - 1
    assert set(samples.seq[samples.untimed].tolist()) == untimed
    assert (reader.unknown.count, reader.stamps.name) == (len(strange), "ping")


@st.composite
def iputils(draw):
    """Draw the lines of one run of iputils ping, and the fate of each request."""
    fates = draw(FATES)
    fates[0] = TIMED
    stamp = draw(st.booleans())
    source = draw(st.sampled_from([HOST, f"far.example ({HOST})", "2001:db8::2", "far.example (2001:db8::2)"]))
    device = draw(st.sampled_from(["", "from 198.51.100.2 va: ", "from 198.51.100.2 : "]))
    begins = f"PING x (x) {device}56(84) bytes of data."
    if ":" in source:
        more = draw(st.sampled_from([" ", " , flow 0x000ff, ", " from 2001:db8::1 va: "]))
        begins = f"PING x(2001:db8::2){more}56 data bytes"
    lines = [*draw(st.lists(st.sampled_from(["PATTERN: 0xff", "WARNING: pinging broadcast address", ""]), max_size=2))]
    lines.append(begins)
    words = ["icmp_seq", "icmp_seq", "icmp_req"]
    marks = ["", "", "\t(same route)", " (DIFFERENT ADDRESS!)", "\a"]
    aside = [
        [], [], ["RR: \t198.51.100.2", "\t203.0.113.1", ""],
        ["TS: \t53527814 absolute", "\t0", "Unrecorded hops: 2", ""],
        ["wrong data byte #16 should be 0x10 but was 0x11", "#16\t10 11 "],
    ]  # fmt: skip
    errors = damaged = 0
    for n, fate in enumerate(fates):
        at = f"[17{90000000 + n}.123456] " if stamp else ""
        ident = draw(st.sampled_from(["", " ident=7"]))
        head = f"{at}64 bytes from {source}: {draw(st.sampled_from(words))}={n + 1}{ident} ttl=63"
        timed = f"{head} time={rtt_us(n) / 1000:.3f} ms"
        if fate == TIMED:
            lines += [timed + draw(st.sampled_from(marks)), *draw(st.sampled_from(aside))]
            lines += [timed + " (DUP!)"] * draw(st.integers(0, 1))
        elif fate == UNTIMED:
            lines.append(draw(st.sampled_from([head, f"{head} (truncated)", f"{timed} (BAD CHECKSUM!)"])))
            damaged += "CHECKSUM" in lines[-1]
        elif draw(st.booleans()):
            errors += 1
            why = draw(st.sampled_from(["Time to live exceeded", "Destination Host Unreachable"]))
            lines.append(f"{at}From 198.51.100.1 icmp_seq={n + 1} {why}")
        else:
            lines += [f"{at}no answer yet for icmp_seq={n + 1}"] * draw(st.integers(0, 2))
    if fates[-1] != LOST and draw(st.booleans()):
        return lines, fates  # interrupted
    got = sum(fate != LOST for fate in fates) - damaged
    loss = draw(st.sampled_from(["0%", "5e-05%", "1,66667%", "33.3333%"]))
    more = f", +{damaged} corrupted" * bool(damaged) + f", +{errors} errors" * bool(errors)
    lines += ["", f"--- {HOST} ping statistics ---"]
    lines += [f"{len(fates)} packets transmitted, {got} received{more}, {loss} packet loss, time 18ms"]
    lines += ["rtt min/avg/max/mdev = 0.1/0.1/0.1/0.0 ms, pipe 4"]
    return lines, fates


@given(st.lists(iputils(), min_size=1, max_size=3), STRANGE)
@settings(max_examples=50)
def test_ping(runs, strange):
    """Several runs are numbered on; an interrupted run has the samples that it printed."""
    lines = [line for run, _ in runs for line in run]
    check_ping(lines, strange, [fates for _, fates in runs])


@given(st.integers(1, 200))
@settings(max_examples=60)
def test_a_cut_line_gives_no_wrong_sample(length):
    """The last line of a killed run may be cut: its sample has the printed number and time, or is missing."""
    whole = ["PING x (x) 56(84) bytes of data.", f"64 bytes from {HOST}: icmp_seq=1 ttl=63 time=0.100 ms"]
    line = f"[1790000000.123456] 64 bytes from {HOST}: icmp_seq=123 ident=4711 ttl=63 time=12.345 ms (DUP!)"
    samples, reader = read([*whole, line[:length]])
    replied = [n for n, told in enumerate(samples.reply_len.tolist()) if told != NOT_TOLD]
    last = replied[-1]
    assert len(replied) + reader.unknown.count >= 2
    if last:
        assert samples.seq[last] == 123
        assert samples.rtt_ns[last] in (12_345_000, NOT_TOLD)
        assert samples.untimed[last] == (samples.rtt_ns[last] == NOT_TOLD)


def from_zero(fates, word, colon_from, *, blank):
    lines = [f"PING far.example ({HOST}){colon_from}: 56 data bytes"]
    for n, fate in enumerate(fates):
        head = f"64 bytes from {HOST}: {word}={n} ttl=63"
        if fate == TIMED:
            lines.append(f"{head} time={rtt_us(n) / 1000:.3f} ms")
            if n % 5 == 4:
                lines.append(f"{head} time=9.999 ms (DUP!)")
        elif fate == UNTIMED:
            lines.append(head)
        else:
            lines += ["92 bytes from 198.51.100.1: Time to live exceeded"] * (word == "icmp_seq")
    got = sum(fate != LOST for fate in fates)
    lines += [""] * blank
    lines += [
        f"--- {HOST} ping statistics ---",
        f"{len(fates)} packets transmitted, {got} packets received, 3% packet loss",
    ]
    return [*lines, "round-trip min/avg/max = 0.1/0.1/0.1 ms"]


@given(FATES, st.integers(1, 3), st.booleans(), STRANGE)
@settings(max_examples=60)
def test_pings_that_count_from_zero(fates, runs, busybox, strange):
    fates = [TIMED, *fates]
    word, tool = ("seq", "ping of busybox") if busybox else ("icmp_seq", "ping of inetutils")
    lines = from_zero(fates, word, " from 198.51.100.2" if busybox else "", blank=busybox) * runs
    samples, reader = read(mixed(lines, strange))
    (timed, untimed), count = truth(fates), len(fates)
    first = ~samples.duplicate
    assert sorted(samples.seq[first].tolist()) == list(range(count * runs))
    assert sorted(samples.seq[samples.rtt_ns >= 0].tolist()) == sorted(
        [n + count * run for n in timed for run in range(runs)]
        + [n + count * run for n in timed if n % 5 == 4 for run in range(runs)]
    )
    assert set(samples.seq[samples.untimed].tolist()) == {n + count * run for n in untimed for run in range(runs)}
    assert (reader.stamps.name, reader.unknown.count) == (tool, len(strange))


@given(iputils(), st.integers(0, 11))
@settings(max_examples=60)
def test_a_counted_reply_without_a_line_is_no_lost_packet(run, which):
    """With `-q`, `head` or `grep` the summary counts more replies than there are lines."""
    lines, fates = run
    shown = [n for n, fate in enumerate(fates) if fate == TIMED]
    gone = f"q={shown[which % len(shown)] + 1} "  # not `ident=7`
    left = [line for line in lines if not ("bytes from" in line and gone in line)]
    if not any("received" in line for line in lines) or len(shown) < 2:
        return
    samples, _ = read(left)
    number = shown[which % len(shown)] + 1
    assert samples.untimed[samples.seq == number].tolist() == [True]


@given(FATES, st.integers(1, 3), st.sampled_from(["c", "C"]), STRANGE)
@settings(max_examples=60)
def test_fping(fates, runs, summary, strange):
    host, fates = f"far.example ({HOST})", [TIMED, *(LOST if fate == UNTIMED else fate for fate in fates)]
    lines = []
    for _ in range(runs):
        for n, fate in enumerate(fates):
            head, average = f"[1790000000.{n:05d}] {host} : [{n}], ", "(0.1 avg, 0% loss)"
            if fate == TIMED:
                lines.append(f"{head}64 bytes, {rtt_us(n) / 1000:.3f} ms {average}")
                if n % 4 == 3:
                    lines.append(f"{host} : duplicate for [{n}], 64 bytes, 9.99 ms")
            else:
                lines += [
                    "ICMP Time Exceeded from 198.51.100.1 for ICMP Echo sent to 203.0.113.2",
                    f"{head}timed out {average}",
                ]
        got = sum(fate == TIMED for fate in fates)
        times = " ".join("-" if fate == LOST else f"{rtt_us(n) / 1000:.3f}" for n, fate in enumerate(fates))
        lines += [
            "",
            f"{host} : {times}"
            if summary == "C"
            else f"{host} : xmt/rcv/%loss = {len(fates)}/{got}/1%, min/avg/max = 1/1/1",
        ]
    samples, reader = read(mixed(lines, strange))
    first = ~samples.duplicate
    assert sorted(samples.seq[first].tolist()) == list(range(len(fates) * runs))
    told = dict(zip(samples.seq[first].tolist(), samples.rtt_ns[first].tolist(), strict=True))
    (timed, _), count = truth(fates), len(fates)
    assert told == {n: timed.get(n % count, NOT_TOLD) for n in range(count * runs)}
    assert int(samples.duplicate.sum()) == sum(n % 4 == 3 for n in timed) * runs
    assert reader.unknown.count == len(strange)


@given(
    st.lists(st.sampled_from(["UDP", "TCP", "timed out", "msec", "cut"]), min_size=1, max_size=8),
    st.booleans(),
    STRANGE,
)
@settings(max_examples=60)
def test_dig(answers, stats_only, strange):
    """Each answer is a sample, left out, or reported missing, and none of them affects another."""
    answers = ["UDP", *answers]
    lines = []
    for n, answer in enumerate(answers):
        if answer == "timed out":
            lines.append(f";; communications error to {HOST}#53: timed out")
            continue
        lines += [] if stats_only else [";; Truncated, retrying in TCP mode."] * (answer == "TCP")
        lines += (
            []
            if stats_only
            else [
                "; <<>> DiG 9.18.49 <<>> -u a.example",
                ";; Got answer:",
                ";a.example.\t\t\tIN\tA",
                "a.example.\t60\tIN\tA\t192.0.2.7",
            ]
        )
        lines.append(f";; Query time: {rtt_us(n)} {'msec' if answer == 'msec' else 'usec'}")
        if answer == "cut":
            continue
        lines.append(f";; SERVER: {HOST}#53({HOST}) ({'TCP' if answer == 'TCP' else 'UDP'})")
        lines += [";; WHEN: Tue Nov 24 11:13:01 UTC 2026", ";; MSG SIZE  rcvd: 43", ""]
    samples, reader = read(mixed(lines, strange))
    told = dict(zip(samples.seq.tolist(), samples.rtt_ns.tolist(), strict=True))
    wanted = {n: rtt_us(n) * 1_000 for n, answer in enumerate(answers) if answer == "UDP"}
    assert told == wanted | {n: NOT_TOLD for n, answer in enumerate(answers) if answer == "timed out"}
    assert sum(reader.left_out.values()) == sum(answer in ("TCP", "msec", "cut") for answer in answers)
    assert reader.unknown.count == len(strange)


@given(
    st.lists(st.sampled_from(["new", "again", "redirect", "refused", "unresolved"]), min_size=1, max_size=8),
    st.sampled_from(["\n", ""]),
    STRANGE,
)
@settings(max_examples=60)
def test_curl(transfers, end, strange):
    transfers = ["new", *transfers]
    objects = []
    for n, what in enumerate(transfers):
        told = {
            "errormsg": None,
            "http_version": "1.1",
            "local_port": 40_000 + n,
            "num_connects": 1,
            "num_redirects": 0,
        }
        told |= {"remote_ip": HOST, "time_connect": "CONNECTED", "time_namelookup": "LOOKED"}
        told |= {"again": {"num_connects": 0, "time_connect": 0}, "redirect": {"num_redirects": 1}}.get(what, {})
        if what in ("refused", "unresolved"):
            told |= {"errormsg": "Failed", "num_connects": 0, "remote_ip": "", "time_connect": 0, "local_port": 0}
        text = json.dumps(told).replace('"CONNECTED"', f"{(rtt_us(n) + 20) / 1e6:.6f}")
        objects.append(text.replace('"LOOKED"', "0.000000" if what == "unresolved" else "0.000020"))
    samples, reader = read(mixed(end.join(objects).split("\n"), strange))
    assert samples.rtt_ns[samples.rtt_ns >= 0].tolist() == [
        rtt_us(n) * 1_000 for n, w in enumerate(transfers) if w == "new"
    ]
    assert int((samples.rtt_ns < 0).sum()) == transfers.count("refused")
    assert sum(reader.left_out.values()) == sum(what in ("again", "redirect", "unresolved") for what in transfers)
    assert reader.unknown.count == len(strange)
