// The page: reads the address, shows the sections of a page, follows a live run.
"use strict";
(() => {
  const { node, printable } = mace;
  const byId = (id) => document.getElementById(id);
  const SECTIONS_OF = {};
  const RANGES = { "": "all", "1m": "last minute", "10m": "last 10 minutes", "1h": "last hour", "6h": "last 6 hours", "1d": "last day", "7d": "last 7 days", "30d": "last 30 days" };
  let shown = null; // the page that is shown: { name, asked, sections }
  let again = false; // whether the store has changed meanwhile
  let pressed = false; // whether somebody draws over a chart
  let loading = null; // AbortController of the views that are being read

  const route = () => {
    const [name, query] = location.hash.replace(/^#\/?/, "").split("?");
    return { name: name || "overview", asked: Object.fromEntries(new URLSearchParams(query || "")) };
  };
  const go = (name, asked) => {
    location.hash = mace.hash(name === "overview" ? "" : name, asked);
  };
  const only = (asked, ...names) => Object.fromEntries(names.filter((n) => asked[n]).map((n) => [n, asked[n]]));
  const RANGE = ["since", "until", "last"];
  const CONTAINER = ["host", "container", "run", ...RANGE];

  // Tables -----------------------------------------------------------------------------------------------

  const link = (cell, page, asked) => {
    const there = !mace.inside || SECTIONS_OF[page](asked).some((section) => mace.held(section.view, section.asked));
    return there ? { ...cell, href: mace.hash(page === "overview" ? "" : page, asked) } : cell;
  };
  const name = (text) => ({ text: printable(text), kind: "name" });
  const number = (value, text) => ({ value, text, kind: "number" });

  // A table with sortable headings; a cell is { text, value, kind, href, element }.
  const table = (headings, rows, caption, order = {}) => {
    const body = node("tbody");
    const head = node("tr");
    const keyOf = (cell) => cell.value ?? cell.text ?? "";
    const fill = () => {
      const sorted = [...rows];
      if (order.at !== undefined) {
        const sign = order.down ? -1 : 1;
        sorted.sort((a, b) => {
          const [x, y] = [keyOf(a[order.at]), keyOf(b[order.at])];
          return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
        });
      }
      [...head.children].forEach((th, i) => {
        if (i === order.at) th.setAttribute("aria-sort", order.down ? "descending" : "ascending");
        else th.removeAttribute("aria-sort");
      });
      body.replaceChildren(
        ...sorted.map((row) =>
          node("tr", {}, ...row.map((cell) => {
            const inner = cell.element || (cell.href ? node("a", { href: cell.href }, cell.text) : cell.text);
            return node("td", { class: cell.kind }, inner);
          })),
        ),
      );
    };
    headings.forEach((text, i) => {
      const sort = () => {
        order.down = order.at === i ? !order.down : rows.length > 0 && typeof keyOf(rows[0][i]) === "number";
        order.at = i;
        fill();
      };
      head.append(node("th", { scope: "col", class: rows[0]?.[i].kind }, text ? node("button", { type: "button", onclick: sort }, text) : ""));
    });
    fill();
    return node("div", { class: "wide" }, node("table", { "aria-label": caption }, node("thead", {}, head), body));
  };

  const figures = (row) => [
    number(row.count, mace.count(row.count)),
    ...["p50_ns", "p90_ns", "p99_ns", "max_ns"].map((key) => number(row[key], mace.us(row[key]))),
  ];
  const FIGURES = ["packets", "p50, µs", "p90, µs", "p99, µs", "max, µs"];
  const severalHosts = (view) => view.hosts.length > 1;
  const owner = (row, view) => `${severalHosts(view) ? `${row.host}/` : ""}${row.container || row.netns}`;

  // Sections ---------------------------------------------------------------------------------------------
  // A section: { title, view, asked, draw(place, view, state), empty(view) }. `state` lasts as long as the page is shown;
  // a section whose view is `empty` is hidden.

  SECTIONS_OF.overview = (asked) => [
    {
      title: "Time of each packet in the container's devices",
      view: "overview",
      asked: only(asked, "host", "run", ...RANGE),
      draw(place, view, state) {
        state.order ||= {};
        const shownRows = () =>
          mace.rows(view).map((row, i) => [row, i]).filter(([row]) => owner(row, view).toLowerCase().includes((state.text || "").toLowerCase()));
        const made = () =>
          table(
            ["container", "direction", "packets/s", ...FIGURES, "p99 over time"],
            shownRows().map(([row, i]) => [
              link(name(owner(row, view)), "container", { host: row.host, container: row.container, ...only(asked, ...RANGE) }),
              { text: row.direction },
              number(row.rate_per_s, mace.rate(row.rate_per_s)),
              ...figures(row),
              { element: mace.drawSpark(view.spark[i]) },
            ]),
            "containers",
            state.order,
          );
        let shownTable = made();
        const filter = () => {
          state.text = field.value;
          const next = made();
          shownTable.replaceWith(next);
          shownTable = next;
        };
        const field = node("input", { type: "search", value: state.text || "", oninput: filter, "aria-label": "show containers whose name contains" });
        if (mace.rows(view).length > 8) place.append(node("form", { onsubmit: (e) => e.preventDefault() }, "filter", field));
        if (!view.columns.host.length) place.append(node("p", { class: "dim" }, "No packet crossed a container's devices in this time."));
        else place.append(shownTable);
        if (view.on_host_network.length) {
          place.append(node("p", { class: "dim" }, `On the host's own network, with no device to cross: ${view.on_host_network.map(printable).join(", ")}`));
        }
      },
    },
    {
      title: "Sources side by side",
      view: "sources",
      asked: only(asked, "host", "run", ...RANGE),
      draw: drawSources,
    },
    {
      title: "Runs",
      view: "runs",
      asked: only(asked, "host", ...RANGE),
      draw(place, view) {
        place.append(
          table(
            ["run", "host", "source", "began, UTC", "seconds", "packets", "lost", "discarded", "end"],
            mace.rows(view).map((row) => [
              link(name(row.run), "overview", { ...only(asked, ...RANGE), run: row.run }),
              name(row.host),
              { text: row.source },
              { text: mace.time(row.started_utc_ns) },
              number(row.upto_utc_ns - row.started_utc_ns, ((row.upto_utc_ns - row.started_utc_ns) / 1e9).toFixed(1)),
              number(row.packets, mace.count(row.packets)),
              number(row.lost, mace.count(row.lost)),
              number(row.discarded, mace.count(row.discarded)),
              { text: row.closed ? "" : "running or killed" },
            ]),
            "runs",
          ),
        );
      },
    },
  ];

  SECTIONS_OF.container = (asked) => {
    const its = only(asked, ...CONTAINER);
    const chosen = { ...its, ...only(asked, "device", "direction", "segment") };
    const what = asked.device ? `delay at ${printable(asked.device)}` : "overhead";
    const region = (found) => {
      if (mace.inside) return;
      const ns = (seconds) => BigInt(Math.max(0, Math.round(seconds * 1e6))) * 1000n;
      const { last, ...rest } = chosen;
      go("packets", {
        ...rest,
        since: String(ns(found.from)),
        until: String(ns(found.to)),
        ...(found.low ? { low_ns: Math.floor(found.low), high_ns: Math.ceil(found.high) } : {}),
      });
    };
    return [
      { title: "Path of a typical packet", view: "path", asked: its, draw: drawTypical },
      {
        title: `Time: ${what}`,
        view: "time",
        asked: chosen,
        hint: "draw over the chart to zoom",
        draw(place, view) {
          mace.drawTime(place, view, (found) => {
            if (mace.inside) return;
            const { last, ...rest } = route().asked;
            go("container", { ...rest, since: String(Math.round(found.from * 1e6) * 1000), until: String(Math.round(found.to * 1e6) * 1000) });
          });
        },
      },
      {
        title: `Heat map: ${what}`,
        view: "heat",
        asked: chosen,
        hint: "draw over a region for its packets",
        draw(place, view) {
          mace.drawHeat(place, view, region);
          if (!mace.inside) place.append(regionForm(view, region));
        },
      },
      { title: "Distributions, device by device", view: "distributions", asked: its, draw: mace.drawDistributions },
      { title: "Device by device, in the order of the path", view: "devices", asked: its, draw: drawDevices(asked) },
      { title: "Round trips of tools", view: "round_trips", asked: its, draw: drawRoundTrips, empty: (view) => !Object.keys(view.samples).length },
      { title: "Which CPU does the work", view: "cpus", asked: its, draw: drawCpus, empty: (view) => !view.columns.cpu.length },
      { title: "Slowest packets", view: "packets", asked: { ...its, limit: 20 }, draw: drawPackets },
      { title: "Sources side by side", view: "sources", asked: its, draw: drawSources },
    ];
  };

  SECTIONS_OF.packets = (asked) => [{ title: "Packets of the region, slowest first", view: "packets", asked, draw: drawPackets }];

  SECTIONS_OF.packet = (asked) => [
    {
      title: "One packet, hop by hop",
      view: "packet",
      asked,
      draw(place, view) {
        const { packet } = view;
        const overhead = Object.entries(packet.overhead_ns).map(([way, ns]) => `${way} overhead ${mace.us(ns)} µs`);
        place.append(
          node("p", {}, [`packet ${packet.packet} of ${printable(packet.container) || "no container"}`, `${packet.l3_len} bytes`, packet.time, `${packet.outcome}, tied by ${packet.grade}`, ...overhead].join(" · ")),
        );
        const hops = mace.rows(view);
        mace.drawBars(place, hops, "delay_ns", "delays of one packet, hop by hop, µs");
        place.append(
          table(
            ["device", "of", "kind", "direction", "counts as", "from, µs", "delay, µs"],
            hops.map((hop) => [
              name(hop.device),
              name(hop.container || hop.netns),
              { text: hop.kind || "hardware" },
              { text: hop.direction },
              { text: hop.counts_as },
              number(hop.start_ns, mace.us(hop.start_ns)),
              number(hop.delay_ns, mace.us(hop.delay_ns)),
            ]),
            "hops",
          ),
        );
        if (!mace.inside) place.append(traceForm(only(asked, "packet", "run", "host", "near_ns")));
      },
    },
  ];

  function drawPackets(place, view) {
    const rows = mace.rows(view);
    const more = view.found > rows.length ? `, the slowest ${mace.count(rows.length)} shown` : "";
    place.append(node("p", {}, `${mace.count(view.found)} packets${more}`));
    if (!rows.length) return;
    place.append(
      table(
        ["packet", "time, UTC", "container", "direction", "delay, µs", "bytes", "tied by", "end"],
        rows.map((row) => [
          link({ text: row.packet }, "packet", { packet: row.packet, run: row.run, host: row.host, ...(mace.inside ? {} : { near_ns: String(row.utc_ns) }) }),
          { text: row.time.slice(0, -1).replace("T", " ") },
          name(row.container),
          { text: row.direction },
          number(row.delay_ns, mace.us(row.delay_ns)),
          number(row.l3_len, mace.count(row.l3_len)),
          { text: row.grade },
          { text: row.outcome + (row.waited ? ", waited for a neighbour's address" : "") },
        ]),
        "packets",
      ),
    );
  }

  function drawTypical(place, view) {
    const rows = mace.rows(view);
    if (!rows.length) place.append(node("p", { class: "dim" }, "No path: this store has no rows of single packets in this time."));
    for (const direction of [...new Set(rows.map((row) => row.direction))]) {
      const hops = rows.filter((row) => row.direction === direction);
      const first = hops.filter((hop) => hop.host === hops[0].host && hop.netns === hops[0].netns);
      place.append(node("h3", {}, `${direction}: median at each device, of ${mace.count(first[0].count)} packets`));
      const along = node("div", { class: "wide" });
      place.append(along);
      mace.drawPath(along, first, `${direction} path`);
      mace.drawBars(place, first, "p50_ns", `${direction}: medians in a row, µs`);
    }
    if (rows.length) {
      place.append(
        node("p", { class: "dim" }, ...[["device", "added by the container's path"], ["outside", "the host's own packets cross it too"], ["delivery", "from the device to the reader"]].flatMap(([kind, text]) => [node("span", { class: `key ${kind}` }), `${text}  `])),
      );
    }
  }

  function drawDevices(asked) {
    return (place, view) => {
      const rows = mace.rows(view);
      if (!rows.length) return;
      place.append(
        table(
          ["device", "of", "kind", "direction", "counts as", ...FIGURES],
          rows.map((row) => {
            const whole = row.segment === "overhead";
            const cell = name(whole ? "whole path" : row.device);
            const its = { ...only(asked, ...CONTAINER), direction: row.direction, ...(whole ? {} : { device: row.device, segment: row.segment }) };
            return [mace.inside ? cell : link(cell, "container", its), name(owner(row, view)), { text: row.kind || "hardware" }, { text: row.direction }, { text: row.counts_as }, ...figures(row)];
          }),
          "devices",
        ),
      );
    };
  }

  const RTT = { tool_rtt: "tool RTT", host_rtt: "host RTT", host_rtt_lower_bound: "host RTT, lower bound", nic_rtt: "NIC RTT", egress: "egress", ingress: "ingress" };
  function drawRoundTrips(place, view) {
    const rows = mace.rows(view);
    place.append(node("p", {}, `samples: ${Object.entries(view.samples).map(([reason, count]) => `${printable(reason.replaceAll("_", " "))} ${mace.count(count)}`).join(" · ")}`));
    mace.drawRoundTrips(place, view, rows, RTT);
    const whole = mace.rows({ columns: view.whole });
    if (!whole.length) return;
    place.append(
      table(
        ["tool", "destination", "figure", "samples", ...FIGURES.slice(1)],
        whole.map((row) => [name(row.tool), name(row.destination), { text: RTT[row.figure] || row.figure }, ...figures(row)]),
        "round trips",
      ),
    );
  }

  function drawCpus(place, view) {
    const cpu = (of) => (of < 0 ? "?" : String(of));
    const time = (ns) => (ns === null ? { text: "", kind: "number" } : number(ns, mace.us(ns)));
    for (const sentence of view.sentences) place.append(node("p", {}, printable(sentence)));
    place.append(
      table(
        ["device", "direction", "CPU that passed it on", "CPU that ran it", "packets", "run p50, µs", "run p99, µs", "wait p50, µs", "wait p99, µs"],
        mace.rows(view).map((row) => [
          name(row.device),
          { text: row.direction },
          number(row.cpu_queued, cpu(row.cpu_queued)),
          number(row.cpu, cpu(row.cpu)),
          number(row.count, mace.count(row.count)),
          ...[row.run_p50_ns, row.run_p99_ns, row.wait_p50_ns, row.wait_p99_ns].map(time),
        ]),
        "stages",
      ),
    );
  }

  function drawSources(place, view) {
    const rows = mace.rows(view);
    if (view.sources.length < 2) {
      place.append(node("p", { class: "dim" }, `One source: ${view.sources.join(", ") || "none"}. With runs of several sources in a store, their figures stand here side by side.`));
      return;
    }
    const key = (row) => JSON.stringify([row.host, row.container, row.device, row.direction, row.segment]);
    const first = new Map();
    for (const row of rows) if (!first.has(key(row))) first.set(key(row), row);
    place.append(
      table(
        ["container", "direction", "source", ...FIGURES, "p50 difference, µs"],
        rows.map((row) => {
          const base = first.get(key(row));
          const difference = row.p50_ns - base.p50_ns;
          return [name(owner(row, view)), { text: row.direction }, { text: row.source }, ...figures(row), row === base ? { text: "", kind: "number" } : number(difference, `${difference > 0 ? "+" : ""}${mace.us(difference)}`)];
        }),
        "sources",
      ),
    );
  }

  // The heat map's region by keyboard.
  function regionForm(view, region) {
    const { utc_ns: at, low_ns: low, high_ns: high } = view.columns;
    if (!at.length) return "";
    const iso = (ns) => new Date(ns / 1e6).toISOString().slice(0, 23);
    const field = (type, value, label, more) => {
      const input = node("input", { type, value, ...more });
      return [node("label", {}, `${label} `, input), input];
    };
    const [fromLabel, from] = field("datetime-local", iso(Math.min(...at)), "from", { step: "0.001" });
    const [toLabel, to] = field("datetime-local", iso(Math.max(...at) + view.width_ns), "to", { step: "0.001" });
    const [lowLabel, least] = field("number", Math.min(...low) / 1000, "delay from, µs", { min: 0, step: "any" });
    const [highLabel, most] = field("number", Math.max(...high) / 1000, "to, µs", { min: 0, step: "any" });
    const ask = (event) => {
      event.preventDefault();
      region({ from: Date.parse(`${from.value}Z`) / 1e3, to: Date.parse(`${to.value}Z`) / 1e3, low: Number(least.value) * 1000 || 1, high: Number(most.value) * 1000 });
    };
    return node("form", { class: "region", onsubmit: ask }, fromLabel, toLabel, lowLabel, highLabel, node("button", {}, "show packets"));
  }

  // The trace of a packet: a download, or handed to the Perfetto UI in another tab. Only this button opens another origin.
  function traceForm(asked) {
    const address = mace.address("trace", asked);
    const ui = document.querySelector("meta[name=perfetto-ui]").content;
    const { origin, host } = new URL(ui);
    const said = node("span", { role: "status", class: "dim" });
    const hand = async () => {
      const opened = window.open(ui);
      if (!opened) {
        said.textContent = "The browser has blocked the window: download the trace and open it there.";
        return;
      }
      said.textContent = "Reading the trace …";
      const answer = await fetch(address);
      if (!answer.ok) {
        said.textContent = (await answer.json()).error;
        return;
      }
      const buffer = await answer.arrayBuffer();
      // Perfetto's protocol: PING until the UI answers PONG, then the trace.
      const stop = () => {
        clearInterval(ping);
        window.removeEventListener("message", listen);
      };
      const ping = setInterval(() => {
        if (!opened.closed) {
          opened.postMessage("PING", origin);
          return;
        }
        stop();
        said.textContent = "The window of the Perfetto UI was closed before it was ready.";
      }, 50);
      const listen = (event) => {
        if (event.source !== opened || event.origin !== origin || event.data !== "PONG") return;
        stop();
        opened.postMessage({ perfetto: { buffer, title: `MACE packet ${asked.packet}` } }, origin);
        said.textContent = "The Perfetto UI has the trace; the trace does not leave this browser.";
      };
      window.addEventListener("message", listen);
    };
    return node("p", { class: "trace" }, node("a", { href: address, download: "" }, "Perfetto trace of this packet and its neighbours"), " ", node("button", { type: "button", onclick: hand }, `open in ${host}`), " ", said);
  }

  // Every view's data --------------------------------------------------------------------------------------

  const csv = (view) => {
    const names = Object.keys(view.columns);
    const cell = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    return [names, ...mace.rows(view).map((row) => names.map((n) => row[n]))].map((row) => row.map(cell).join(",")).join("\n");
  };
  const downloads = (section) => {
    const links = node("span", { class: "get" });
    if (!mace.inside) {
      for (const format of ["json", "csv", "parquet"]) {
        links.append(node("a", { href: mace.address(section.view, { ...section.asked, format }), download: `mace-${section.view}.${format}` }, format.toUpperCase()));
      }
      return links;
    }
    const save = (format, text) => async () => {
      const blob = new Blob([text(await mace.view(section.view, section.asked))]);
      const link = node("a", { href: URL.createObjectURL(blob), download: `mace-${section.view}.${format}` });
      link.click();
      URL.revokeObjectURL(link.href);
    };
    links.append(
      node("button", { type: "button", onclick: save("json", JSON.stringify) }, "JSON"),
      node("button", { type: "button", onclick: save("csv", csv) }, "CSV"),
    );
    return links;
  };

  const showLedger = (view) => {
    const counts = (all) => Object.entries(all).map(([key, count]) => `${key.replaceAll("_", " ")} ${mace.count(count)}`).join(" · ");
    byId("ledger").replaceChildren(
      node("p", {}, `packets ${mace.count(view.packets)} · ledger: ${counts(view.ledger)}`),
      node("p", {}, `grades: ${counts(view.grades)}`),
      ...(view.note ? [node("p", {}, printable(view.note))] : []),
    );
    byId("ledger").className = view.losses.length ? "lossy" : "";
    byId("losses").replaceChildren(...view.losses.map((text) => node("li", {}, printable(text))));
  };

  // The range of time ----------------------------------------------------------------------------------------

  const showRange = (page) => {
    const { asked } = page;
    const form = byId("range");
    if (mace.inside || page.name === "packet") {
      form.replaceChildren();
      return;
    }
    const { since, until, last, ...rest } = asked;
    const choose = (event) => go(page.name, { ...rest, last: event.target.value });
    const options = Object.entries(RANGES).map(([value, text]) => node("option", { value, selected: (last || "") === value && !since && !until }, text));
    const parts = [];
    if (since || until) {
      const [a, b] = [Number(since), Number(until)];
      const exact = Number.isFinite(a) && Number.isFinite(b) && a < b;
      options.unshift(node("option", { value: "zoom", selected: true, disabled: true }, exact ? `${mace.time(a)} to ${mace.time(b)}` : "chosen"));
      const move = (from, to) => () => {
        const at = (share) => String(Math.max(0, Math.round((a + share * (b - a)) / 1e3)) * 1e3);
        go(page.name, { ...rest, since: at(from), until: at(to) });
      };
      if (exact) {
        for (const [text, label, from, to] of [["◀", "earlier", -0.5, 0.5], ["▶", "later", 0.5, 1.5], ["+", "zoom in", 0.25, 0.75], ["−", "zoom out", -0.5, 1.5]]) {
          parts.push(node("button", { type: "button", onclick: move(from, to), "aria-label": label }, text));
        }
      }
    }
    form.replaceChildren(node("label", {}, "time ", node("select", { onchange: choose }, ...options)), ...parts);
  };

  // Showing a page -------------------------------------------------------------------------------------------

  const heading = (page) => {
    const { asked } = page;
    if (page.name === "container") return [asked.host && shown?.hosts > 1 ? `${asked.host}/${asked.container}` : asked.container || "host", asked.device, asked.direction].filter(Boolean).join(" · ");
    if (page.name === "packets") return `packets of ${asked.container || "all containers"}`;
    if (page.name === "packet") return `packet ${asked.packet}`;
    return asked.run ? `run ${asked.run}` : document.title;
  };

  const fail = (text) => {
    byId("failure").textContent = text;
  };

  // While somebody types in a section or draws over its chart, it stays as it is.
  const keeps = (section, focused) => section.drawn && (pressed || (section.body.contains(focused) && focused.tagName === "INPUT"));

  const draw = (section, view) => {
    section.found = view;
    const before = document.activeElement;
    const focused = section.body.contains(before) ? [before.tagName, before.textContent, before.getAttribute("aria-label")] : null;
    if (keeps(section, before)) return;
    const fresh = node("div", { class: "chart" });
    section.body.closest("section").hidden = Boolean(section.empty?.(view));
    section.body.replaceWith(fresh);
    section.body = fresh;
    section.draw(fresh, view, section.state);
    section.drawn = true;
    if (focused) {
      const same = [...fresh.querySelectorAll(focused[0])].find((each) => each.textContent === focused[1] && each.getAttribute("aria-label") === focused[2]);
      if (same) same.focus();
    }
  };

  // Reads the views of the page one after the other; whoever asks again while that goes on gets the newest state then.
  const refresh = async () => {
    const page = shown;
    loading?.abort();
    loading = new AbortController();
    const { signal } = loading;
    try {
      for (const section of page.sections) {
        const view = await mace.view(section.view, section.asked, signal);
        if (page !== shown || signal.aborted) return;
        showLedger(view);
        byId("live").textContent = view.live && !mace.inside ? "live" : "";
        draw(section, view);
      }
      fail("");
      document.body.dataset.shown = page.key;
      document.body.dataset.turn = String(Number(document.body.dataset.turn || 0) + 1);
    } catch (error) {
      if (!signal.aborted) fail(error.message);
    } finally {
      if (loading?.signal === signal) {
        loading = null;
        // At most one turn a second, however often the store changes.
        if (again) setTimeout(changed, 1000);
        again = false;
      }
    }
  };

  const show = () => {
    const page = route();
    const make = Object.hasOwn(SECTIONS_OF, page.name) ? SECTIONS_OF[page.name] : null;
    page.key = location.hash;
    delete document.body.dataset.shown;
    const main = byId("main");
    if (!make) {
      main.replaceChildren();
      fail("There is no such page.");
      return;
    }
    page.sections = make(page.asked).map((section) => ({ ...section, state: {}, body: node("div", { class: "chart" }, "…") }));
    if (mace.inside) page.sections = page.sections.filter((section) => mace.held(section.view, section.asked));
    const moved = shown !== null;
    shown = page;
    byId("title").textContent = printable(heading(page));
    showRange(page);
    main.replaceChildren(
      ...page.sections.map((section) =>
        node("section", { "data-view": section.view, "aria-label": section.title }, node("h2", {}, section.title, downloads(section), node("span", { class: "dim" }, section.hint && !mace.inside ? section.hint : "")), section.body),
      ),
    );
    if (!page.sections.length) fail("This file does not hold that page; mace serve shows it from the store.");
    if (moved) main.focus();
    refresh();
  };

  const changed = () => {
    if (document.hidden || !shown || shown.name === "packet" || shown.name === "packets" || shown.asked.until) return;
    if (loading) again = true;
    else refresh();
  };

  const redraw = () => shown?.sections.forEach((section) => section.found && draw(section, section.found));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) {
      width = window.innerWidth;
      redraw();
    }
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.addEventListener("visibilitychange", () => changed());
  for (const [event, down] of [["pointerdown", true], ["pointerup", false], ["pointercancel", false]]) {
    window.addEventListener(event, () => {
      pressed = down;
    }, true);
  }
  window.addEventListener("hashchange", show);
  show();
  mace.follow(changed, fail);
})();
