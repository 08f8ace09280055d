// Views: from the server, or from the file that holds them. Names from hosts are only ever text (textContent).
"use strict";
window.mace = {};
(() => {
  const inside = document.getElementById("mace-data");
  mace.inside = inside ? JSON.parse(inside.textContent) : null;

  const given = (asked) =>
    Object.entries(asked)
      .filter(([, value]) => value !== "" && value !== undefined && value !== null)
      .map(([name, value]) => [name, String(value)])
      .sort(([a], [b]) => (a < b ? -1 : 1));
  const told = (asked) => new URLSearchParams(given(asked)).toString();
  mace.address = (view, asked) => {
    const query = told(asked);
    return `api/${view}${query ? `?${query}` : ""}`;
  };
  mace.hash = (page, asked) => {
    const query = told(asked);
    return `#/${page}${query ? `?${query}` : ""}`;
  };
  // The view in this file; undefined if the file does not hold it.
  mace.held = (view, asked) => held?.get(`${view} ${JSON.stringify(given(asked))}`);
  const held = mace.inside && new Map(Object.entries(mace.inside.views).map(([key, view]) => {
    const at = key.indexOf(" ");
    return [`${key.slice(0, at)} ${JSON.stringify(JSON.parse(key.slice(at)))}`, view];
  }));

  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  mace.view = async (view, asked, signal) => {
    if (mace.inside) {
      const found = mace.held(view, asked);
      if (!found) throw new Error("This file does not hold that view; mace serve shows it from the store.");
      return found;
    }
    for (let attempt = 0; ; attempt += 1) {
      const answer = await fetch(mace.address(view, asked), { signal });
      if (answer.status === 401) {
        location.reload();
        throw new Error("the token is no longer valid");
      }
      const body = await answer.json();
      if (answer.ok) {
        mace.state = Number(answer.headers.get("mace-state"));
        return body;
      }
      if (answer.status !== 503 || attempt === 5) throw new Error(body.error);
      await wait(2000);
    }
  };

  // Calls `changed` after each change of the store. The browser opens the stream again when it ends.
  mace.follow = (changed, failed) => {
    if (mace.inside) return;
    const events = new EventSource("api/events");
    events.onmessage = (event) => {
      if (mace.state !== undefined && JSON.parse(event.data).number !== mace.state) changed();
    };
    events.addEventListener("failure", (event) => failed(JSON.parse(event.data)));
  };

  mace.rows = (view) => {
    const names = Object.keys(view.columns);
    const length = names.length ? view.columns[names[0]].length : 0;
    return Array.from({ length }, (_, i) => Object.fromEntries(names.map((name) => [name, view.columns[name][i]])));
  };

  // Elements with text, attributes and children; nothing is ever parsed as markup.
  mace.node = (tag, attributes = {}, ...children) => {
    const svg = ["svg", "g", "rect", "text", "line", "polyline", "path", "title", "marker", "defs"].includes(tag);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
    return made;
  };

  // Names may hold characters that turn the writing direction or are invisible: they are spelt out, as in MACE's tables.
  const odd = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;
  mace.printable = (name) =>
    String(name).replace(odd, (c) => {
      if ("\n\r\t".includes(c)) return { "\n": "\\n", "\r": "\\r", "\t": "\\t" }[c];
      const code = c.codePointAt(0);
      if (code < 256) return `\\x${code.toString(16).padStart(2, "0")}`;
      return code < 65536 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`;
    });

  const figure = (value, digits) =>
    value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  mace.count = (value) => figure(value, 0);
  mace.rate = (value) => figure(value, value < 100 ? 1 : 0);
  mace.us = (ns) => figure(ns / 1000, 1);
  mace.delay = (ns) => {
    if (ns < 1000) return `${+ns.toPrecision(3)} ns`;
    if (ns < 1e6) return `${+(ns / 1e3).toPrecision(3)} µs`;
    return ns < 1e9 ? `${+(ns / 1e6).toPrecision(3)} ms` : `${+(ns / 1e9).toPrecision(3)} s`;
  };
  mace.time = (ns) => new Date(Number(ns) / 1e6).toISOString().slice(0, 23).replace("T", " ");
})();
