// Charts: delay over time, heat map, distributions (uPlot), waterfall and path (SVG).
"use strict";
(() => {
  const { node } = mace;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#A05A2C"];
  const utc = (seconds) => uPlot.tzDate(new Date(seconds * 1e3), "Etc/UTC");
  // Times on an axis, UTC: as precise as the distance of two ticks asks for, with the date where it changes.
  const times = (_, splits, _axis, _space, step) => {
    let day = "";
    return splits.map((seconds) => {
      const [date, time] = new Date(seconds * 1e3).toISOString().slice(0, -1).split("T");
      const shown = step >= 86400 ? "" : time.slice(0, step < 1 ? 12 : step < 60 ? 8 : 5);
      const text = date === day ? shown : `${shown}${shown && "\n"}${date}`;
      day = date;
      return text;
    });
  };
  const powers = (_, splits) => splits.map((v) => (v && Math.abs(Math.log10(v) % 1) < 1e-9 ? mace.delay(v) : null));

  const axes = (more) => {
    const [stroke, grid] = [colour("--text"), { stroke: colour("--line"), width: 1 }];
    return more.map((axis) => ({ stroke, grid, ticks: grid, ...axis }));
  };
  const size = (place, height) => ({ width: Math.max(280, place.clientWidth), height });
  const logarithmic = (low, high) => ({ distr: 3, log: 10, range: () => [low, high] });
  const decades = (values) => {
    let [low, high] = [Infinity, 1];
    for (const v of values) {
      if (v > 0 && v < low) low = v;
      if (v > high) high = v;
    }
    if (low === Infinity) low = 1;
    return [10 ** Math.floor(Math.log10(low)), 10 ** Math.max(Math.ceil(Math.log10(high)), Math.floor(Math.log10(low)) + 1)];
  };

  // Calls `brushed` with the region that was drawn over a chart, then takes the selection away.
  const brush = (both, brushed) => ({
    cursor: { drag: { x: true, y: both, setScale: false, dist: 4 }, y: both },
    hooks: {
      setSelect: [
        (u) => {
          const { left, top, width, height } = u.select;
          if (width < 4) return;
          const region = { from: u.posToVal(left, "x"), to: u.posToVal(left + width, "x") };
          if (both && height >= 4) {
            region.high = u.posToVal(top, "y");
            region.low = u.posToVal(top + height, "y");
          }
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          brushed(region);
        },
      ],
    },
  });

  // One chart per direction: the median as a line, bands to the 90 % and 99 % quantiles, the largest delay as points.
  mace.drawTime = (place, view, zoom) => {
    const rows = mace.rows(view);
    const span = decades(rows.flatMap((row) => [row.p50_ns, row.max_ns]));
    for (const direction of [...new Set(rows.map((row) => row.direction))]) {
      const mine = rows.filter((row) => row.direction === direction);
      const x = [];
      const lines = [[], [], [], []];
      mine.forEach((row, i) => {
        if (i && row.utc_ns - mine[i - 1].utc_ns > 1.5 * view.width_ns) {
          x.push((mine[i - 1].utc_ns + view.width_ns) / 1e9);
          lines.forEach((line) => line.push(null));
        }
        x.push(row.utc_ns / 1e9);
        [row.p50_ns, row.p90_ns, row.p99_ns, row.max_ns].forEach((v, k) => lines[k].push(Math.max(v, 1)));
      });
      const blue = colour("--hot");
      const alone = mine.length < 3;
      const line = (label, extra) => ({ label, value: (_, v) => (v === null ? "" : mace.delay(v)), ...extra });
      place.append(node("h3", {}, direction));
      new uPlot(
        {
          ...size(place, 220),
          tzDate: utc,
          ...brush(false, zoom),
          scales: { y: logarithmic(...span) },
          series: [
            { label: "time, UTC", value: (_, v) => (v === null ? "" : mace.time(v * 1e9)) },
            line("p50", { stroke: colour("--device"), width: 2, points: { show: alone } }),
            line("p90", { stroke: `rgba(${blue}, .7)`, width: 1 }),
            line("p99", { stroke: `rgba(${blue}, .4)`, width: 1 }),
            line("max", { stroke: colour("--focus"), width: 0, points: { show: true, size: 3 } }),
          ],
          bands: [
            { series: [2, 1], fill: `rgba(${blue}, .3)` },
            { series: [3, 2], fill: `rgba(${blue}, .14)` },
          ],
          axes: axes([{ values: times, space: 80 }, { size: 64, values: powers }]),
        },
        [x, ...lines],
        place,
      );
    }
  };

  // One chart per tool and destination: the medians of the round trips, one line each.
  mace.drawRoundTrips = (place, view, rows, names) => {
    const shown = ["tool_rtt", "host_rtt", "host_rtt_lower_bound", "nic_rtt"];
    const key = (row) => JSON.stringify([row.tool, row.destination]);
    for (const group of [...new Set(rows.map(key))]) {
      const mine = rows.filter((row) => key(row) === group);
      const [tool, destination] = JSON.parse(group);
      const drawn = shown.filter((figure) => mine.some((row) => row.figure === figure));
      const x = [...new Set(mine.map((row) => row.utc_ns))].sort((a, b) => a - b);
      const at = new Map(x.map((time, i) => [time, i]));
      const lines = drawn.map(() => x.map(() => null));
      for (const row of mine) if (drawn.includes(row.figure)) lines[drawn.indexOf(row.figure)][at.get(row.utc_ns)] = Math.max(row.p50_ns, 1);
      place.append(node("h3", {}, mace.printable(`${tool}${destination && ` to ${destination}`}: medians`)));
      new uPlot(
        {
          ...size(place, 220),
          tzDate: utc,
          cursor: { drag: { x: false, y: false } },
          scales: { y: logarithmic(...decades(lines.flat().filter((v) => v !== null))) },
          series: [
            { label: "time, UTC", value: (_, v) => (v === null ? "" : mace.time(v * 1e9)) },
            ...drawn.map((figure) => ({
              label: names[figure],
              stroke: palette[shown.indexOf(figure)],
              width: 1.5,
              dash: figure === "host_rtt_lower_bound" ? [6, 4] : undefined,
              points: { show: x.length < 3 },
              value: (_, v) => (v === null ? "" : mace.delay(v)),
            })),
          ],
          axes: axes([{ values: times, space: 80 }, { size: 64, values: powers }]),
        },
        [x.map((time) => time / 1e9), ...lines],
        place,
      );
    }
  };

  // The heat map: a rectangle per stretch of time and row of delays, its opacity the logarithm of the count.
  mace.drawHeat = (place, view, brushed) => {
    const { utc_ns: at, low_ns: low, high_ns: high, count } = view.columns;
    if (!at.length) return;
    const merged = new Map();
    at.forEach((time, i) => {
      const key = `${time} ${low[i]}`;
      const cell = merged.get(key) || { time, low: low[i], high: high[i], count: 0 };
      cell.count += count[i];
      merged.set(key, cell);
    });
    const cells = [...merged.values()];
    const most = Math.max(...cells.map((cell) => cell.count));
    const span = decades(cells.flatMap((cell) => [Math.max(cell.low, 1), cell.high]));
    const [first, last] = [Math.min(...at) / 1e9, (Math.max(...at) + view.width_ns) / 1e9];
    const draw = (u) => {
      const { ctx } = u;
      const hot = colour("--hot");
      ctx.save();
      for (const cell of cells) {
        const [left, right] = [cell.time / 1e9, (cell.time + view.width_ns) / 1e9].map((v) => u.valToPos(v, "x", true));
        const [top, bottom] = [cell.high, Math.max(cell.low, span[0])].map((v) => u.valToPos(v, "y", true));
        ctx.fillStyle = `rgba(${hot}, ${0.12 + (0.88 * Math.log1p(cell.count)) / Math.log1p(most)})`;
        ctx.fillRect(left, top, Math.max(right - left, 1), Math.max(bottom - top, 1));
      }
      ctx.restore();
    };
    const options = brush(true, brushed);
    new uPlot(
      {
        ...size(place, 280),
        tzDate: utc,
        ...options,
        hooks: { ...options.hooks, drawAxes: [draw] },
        legend: { show: false },
        scales: { x: { range: () => [first, last] }, y: logarithmic(...span) },
        series: [{}, { points: { show: false } }],
        axes: axes([{ values: times, space: 80 }, { size: 64, values: powers }]),
      },
      [[first, last], [null, null]],
      place,
    );
    place.append(node("p", { class: "dim" }, `darkest: ${mace.count(most)} packets; each column ${mace.delay(view.width_ns)}`));
  };

  mace.drawDistributions = (place, view) => {
    const groups = new Map();
    for (const row of mace.rows(view)) {
      if (row.segment === "overhead") continue;
      const name = mace.printable(`${row.device}${["delivery", "waiting"].includes(row.segment) ? ` ${row.segment}` : ""}`);
      const key = `${row.host} ${row.container} ${row.netns} ${name} ${row.direction}`;
      const group = groups.get(key) || { name, direction: row.direction, x: [], y: [] };
      if (row.longer_share > 0) {
        group.x.push(Math.max(row.delay_ns, 1));
        group.y.push(row.longer_share);
      }
      groups.set(key, group);
    }
    const drawn = [...groups.values()].filter((group) => group.x.length);
    if (!drawn.length) return;
    const names = [...new Set(drawn.map((group) => group.name))];
    const increasing = (group) => {
      const kept = group.x.map((_, i) => i).filter((i) => i === 0 || group.x[i] > group.x[i - 1]);
      return [kept.map((i) => group.x[i]), kept.map((i) => group.y[i])];
    };
    const [floor] = decades(drawn.flatMap((group) => group.y));
    new uPlot(
      {
        ...size(place, 300),
        cursor: { drag: { x: false, y: false } },
        scales: { x: { time: false, ...logarithmic(...decades(drawn.flatMap((g) => g.x))) }, y: logarithmic(floor, 1) },
        series: [
          { label: "delay", value: (_, v) => (v === null ? "" : mace.delay(v)) },
          ...drawn.map((group) => ({
            label: `${group.name} ${group.direction}`,
            stroke: palette[names.indexOf(group.name) % palette.length],
            dash: group.direction === "ingress" ? [6, 4] : undefined,
            width: 1.5,
            spanGaps: true,
            points: { show: false },
            value: (_, v) => (v === null || v === undefined ? "" : `${+(100 * v).toPrecision(3)} %`),
          })),
        ],
        axes: axes([
          { values: powers },
          { size: 64, values: (_, splits) => splits.map((v) => (v && Math.abs(Math.log10(v) % 1) < 1e-9 ? `${+(100 * v).toPrecision(2)} %` : null)) },
        ]),
      },
      uPlot.join(drawn.map(increasing)),
      place,
    );
  };

  // Bars one after the other, to scale: hops with device, start_ns, length (p50_ns or delay_ns) and counts_as.
  mace.drawBars = (place, hops, length, label) => {
    const total = Math.max(...hops.map((hop) => hop.start_ns + hop[length]), 1);
    const [left, width, row] = [130, Math.max(320, Math.min(900, place.clientWidth)), 22];
    const scale = (width - left - 80) / total;
    const picture = node("svg", { viewBox: `0 0 ${width} ${hops.length * row}`, width, height: hops.length * row, role: "img", "aria-label": label });
    hops.forEach((hop, i) => {
      const name = mace.printable({ delivery: "to the reader", waiting: "waiting for a CPU" }[hop.segment] || hop.device);
      const [x, w] = [left + Math.max(hop.start_ns, 0) * scale, Math.max(hop[length] * scale, 2)];
      picture.append(
        node("text", { x: left - 8, y: i * row + 15, "text-anchor": "end" }, name.length > 17 ? `${name.slice(0, 16)}…` : name, node("title", {}, name)),
        node("rect", { x, y: i * row + 4, width: w, height: row - 8, class: kind(hop) }),
        node("text", { x: x + w + 6, y: i * row + 15 }, mace.us(hop[length])),
      );
    });
    place.append(picture);
  };

  const kind = (hop) => ({ device: "device", outside: "outside", delivery: "delivery", waiting: "delivery" })[hop.segment] || "device";

  // The path as what it is: network namespaces as boxes, devices in them in order, with the median delay at each.
  mace.drawPath = (place, hops, label) => {
    const upright = place.clientWidth < 140 * hops.length;
    const [w, h, gap, pad, head] = [118, 52, upright ? 26 : 24, 10, 22];
    const step = (upright ? h : w) + gap;
    const boxes = [];
    hops.forEach((hop, i) => {
      const last = boxes[boxes.length - 1];
      if (last && last.netns === hop.device_netns) last.to = i;
      else boxes.push({ netns: hop.device_netns, name: hop.role === "inner" ? hop.of : hop.device_netns, from: i, to: i });
    });
    const between = upright ? head + pad : 2 * pad;
    const at = [];
    boxes.forEach((box, b) => {
      for (let i = box.from; i <= box.to; i += 1) at[i] = (upright ? head : pad) + i * step + b * between;
    });
    const long = at[at.length - 1] + (upright ? h : w) + pad;
    const across = upright ? w + 2 * pad + 90 : h + head + pad;
    const [width, height] = upright ? [across, long] : [long, across];
    const picture = node("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
    for (const box of boxes) {
      const [begin, end] = [at[box.from] - (upright ? head : pad), at[box.to] + (upright ? h : w) + pad];
      const area = upright ? { x: 0, y: begin, width: w + 2 * pad, height: end - begin } : { x: begin, y: 0, width: end - begin, height };
      const name = mace.printable(box.name);
      const most = Math.floor((area.width - 12) / 7);
      picture.append(
        node("rect", { ...area, rx: 6, class: "box" }),
        node("text", { x: area.x + 8, y: area.y + 15, class: "dim" }, name.length > most ? `${name.slice(0, most - 1)}…` : name, node("title", {}, `network namespace ${mace.printable(box.netns)}`)),
      );
    }
    hops.forEach((hop, i) => {
      const [x, y] = upright ? [pad, at[i]] : [at[i], head];
      const name = mace.printable(hop.segment === "delivery" ? "reader" : hop.device);
      picture.append(
        node("rect", { x, y, width: w, height: h, rx: 4, class: `node ${kind(hop)}` }),
        node("text", { x: x + w / 2, y: y + 16, "text-anchor": "middle" }, name.length > 15 ? `${name.slice(0, 14)}…` : name, node("title", {}, name)),
        node("text", { x: x + w / 2, y: y + 31, "text-anchor": "middle", class: "dim" }, hop.kind || "hardware"),
        node("text", { x: x + w / 2, y: y + 46, "text-anchor": "middle" }, `${mace.us(hop.p50_ns)} µs`),
      );
      if (i) {
        const [a, b] = [at[i - 1] + (upright ? h : w), at[i]];
        const routed = hops[i - 1].device_netns === hop.device_netns && [hop.role, hops[i - 1].role].includes("outer");
        picture.append(upright ? node("line", { x1: pad + w / 2, y1: a, x2: pad + w / 2, y2: b, class: "arrow" }) : node("line", { x1: a, y1: head + h / 2, x2: b, y2: head + h / 2, class: "arrow" }));
        if (routed) picture.append(node("text", upright ? { x: pad + w / 2 + 6, y: (a + b) / 2 + 4, class: "dim" } : { x: (a + b) / 2, y: head - 6, "text-anchor": "middle", class: "dim" }, "routing, NAT"));
      }
    });
    place.append(picture);
  };

  mace.drawSpark = (points) => {
    const picture = node("svg", { viewBox: "0 0 120 22", width: 120, height: 22, "aria-hidden": "true" });
    if (!points.length) return picture;
    const logs = points.map(([, , p99]) => Math.log(Math.max(p99, 1)));
    const [low, high] = [Math.min(...logs), Math.max(...logs)];
    const end = Math.max(points[points.length - 1][0], 1);
    const place = ([at], i) => `${(2 + (116 * at) / end).toFixed(1)},${(19 - (16 * (logs[i] - low)) / (high - low || 1)).toFixed(1)}`;
    picture.append(node("polyline", { points: points.map(place).join(" "), class: "spark" }));
    return picture;
  };
})();
