// Runs Perfetto's trace processor (WebAssembly) in Node: requests come on stdin, replies go to stdout, both as the
// engine's own stream of TraceProcessorRpcStream messages.
//
//     node drive.js DIRECTORY      which holds engine_bundle.js and the .wasm files of a Perfetto UI
//
// The bundle is made for a browser's worker: it finds here what it would look for there, and nothing of Node's.
"use strict";
const fs = require("node:fs");
const path = require("node:path");

const directory = process.argv[2];
const out = (bytes) => fs.writeSync(1, bytes);

globalThis.self = globalThis;
globalThis.WorkerGlobalScope = function () {};
globalThis.importScripts = () => {};
globalThis.location = { href: "http://localhost/" };
// Synchronous, so that the engine is ready before the first request is read.
globalThis.XMLHttpRequest = class {
  open(_method, address) {
    this.file = path.join(directory, path.basename(address));
  }
  send() {
    const bytes = fs.readFileSync(this.file);
    this.response = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
  }
};
console.log = console.warn = console.error = (...words) => fs.writeSync(2, words.join(" ") + "\n");

const port = {
  postMessage(bytes) {
    for (let at = 0; at < bytes.length; ) {
      at += out(bytes.subarray(at));
    }
  },
};
const source = fs.readFileSync(path.join(directory, "engine_bundle.js"), "utf8");
new Function("process", "require", "module", "exports", source)(undefined, undefined, undefined, undefined);

(async () => {
  globalThis.onmessage({ data: port });
  await new Promise((resolve) => setImmediate(resolve));
  for await (const chunk of fs.createReadStream(null, { fd: 0, highWaterMark: 1 << 20 })) {
    port.onmessage({ data: new Uint8Array(chunk) });
  }
})();
