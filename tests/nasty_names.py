"""Malicious names that imitate markup or terminal commands, and their printable forms."""

from contracts.topology import Device, Role
from tests.made_results import HOST_NETNS, topology

BYTES_255 = "n" * 255

NASTY = [
    # Rich's markup, emoji, links.
    "[red]x", "[/]", "[/red]", "[bold]b[/bold]", "\\[red]", "[link=https://x.example]l[/link]", ":warning:", "[[]]",
    # Formulas of matplotlib, and labels that it hides.
    "$x^$", "$", "$$", "\\$a$", "_hidden", "$\\frac{1}{0}$", "__",
    # Commands to a terminal.
    "\x1b[31mred", "\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "a\rb", "a\nb", "a\tb", "\x7f", "\x08\x08",
    "\x01", "a\x00b",
    # Direction and visibility.
    "\u202eevil", "\u2066a\u2069", "\u200b", "\u2028", "\ufeff", "\x85",
    # Quotes and separators of CSV, JSON, SQL, line protocol and Prometheus.
    'a"b', "a'b", "a,b", "a=b", "a b", "\\,", "\\ ", "\\=", "\\\\", "end\\", 'a\\"', "\\n", ",host=victim",
    "a b=1i 1\\", "#c", "{}", "${HOME}", "%s%n", "';--",
    # Formulas of a spreadsheet.
    "=1+2", "@a", "+a", "-a",
    # HTML.
    "<script>alert(1)</script>", "&lt;", "-->", "]]>", "</pre>",
    # Unicode.
    "é", "日本", "😀", "e\u0301", "\udcff\udc80", BYTES_255, "",
]  # fmt: skip


def named_devices(names):
    """Return a topology like that of `made_results`, with a container and a device for each name.

    For an empty name, device and namespace have the empty name, and the container is called `none`.
    """
    made = []
    for number, name in enumerate(names):
        netns = 4026532000 + number
        made += [
            Device(netns, 2, name, "veth", HOST_NETNS, 10 + number, 0, True, name, name or "none", Role.INNER),
            Device(HOST_NETNS, 10 + number, f"v{number}", "veth", netns, 2, 3, False, "host", "", Role.HOST),
        ]
    return (*made, *topology()[-3:])


def kernel_takes(name):
    """Return whether a device may have this name (dev_valid_name): 1 to 15 bytes, no `/`, `:`, NUL or white space."""
    raw = name.encode("utf-8", "surrogateescape")
    white = b"\t\n\v\f\r \xa0"
    return 0 < len(raw) < 16 and name not in {".", ".."} and not set(raw) & set(b"/:\0%" + white)
