"""A real Chromium without a screen, driven by the DevTools protocol over a pair of pipes."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue

LIMIT_S = 120
"""Guards against hanging; a busy machine takes a fraction of it."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}


def program():
    """Return the browser's path, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def missing():
    """Return None if a browser starts here, else why not."""
    path = program()
    if path is None:
        return "chromium is not installed"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return None if done.returncode == 0 else f"{path} --version exits {done.returncode}"


_POLLED = """new Promise((done, failed) => {
    const end = Date.now() + LIMIT;
    const look = () => {
        let value = null;
        try { value = CONDITION; } catch { /* the document is not there yet */ }
        if (value) done(value);
        else if (Date.now() > end) failed(new Error(document.body.innerText.slice(0, 400)));
        else setTimeout(look, 30);
    };
    look();
})"""
_GONE = ("navigated", "context was destroyed", "Promise was collected", "Cannot find context", "context with specified")
"""Errors of a document that another has replaced."""


class Browser:
    """One process with many pages, each in a context of its own: no page sees another's cookies."""

    def __init__(self, folder: Path) -> None:
        inner_read, self._write = os.pipe()
        self._read, inner_write = os.pipe()
        flags = (
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
            *("--disable-default-apps", "--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe"),
            f"--user-data-dir={folder}",
        )
        # Chromium reads from descriptor 3 and writes to 4. Copies above 4, so that neither is overwritten by the other.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (inner_read, inner_write)]
        null = os.open(os.devnull, os.O_RDWR)
        copies = [(null, 0), (null, 1), (null, 2), (ends[0], 3), (ends[1], 4)]
        self._pid = os.posix_spawn(
            program(),
            [program(), *flags],
            os.environ | {"HOME": str(folder), "TZ": "America/New_York"},
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in copies],
        )
        for fd in (inner_read, inner_write, null, *ends):
            os.close(fd)
        self._number = 0
        self._lock = threading.Lock()
        self._answers: dict[int, SimpleQueue] = {}
        self._pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def page(self, **view):
        """Return a new page."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, context)
        page.begin(**view)
        return page

    def call(self, method, session=None, **params):
        with self._lock:
            self._number += 1
            number, queue = self._number, SimpleQueue()
            self._answers[number] = queue
            message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
            data = json.dumps(message).encode() + b"\0"
            while data:
                data = data[os.write(self._write, data) :]
        try:
            answer = queue.get(timeout=LIMIT_S)
        except Empty:
            raise TimeoutError(f"{method}: the browser does not answer") from None
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _listen(self):
        rest = b""
        while piece := os.read(self._read, 1 << 16):
            *whole, rest = (rest + piece).split(b"\0")
            for each in whole:
                message = json.loads(each)
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                elif page := self._pages.get(message.get("sessionId")):
                    page.note(message["method"], message["params"])
        for queue in self._answers.values():
            queue.put({"error": "the browser has ended"})

    def close(self):
        try:
            self.call("Browser.close")
        except (RuntimeError, OSError, TimeoutError):
            os.kill(self._pid, signal.SIGKILL)
        else:
            # It closes its end of the pipe when it ends; one that hangs is ended.
            self._reader.join(LIMIT_S)
        if self._reader.is_alive():
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._reader.join(LIMIT_S)
        os.close(self._write)
        os.close(self._read)


class Page:
    """One page."""

    def __init__(self, browser, session, context):
        self._browser, self._session, self._context = browser, session, context
        self.said = []
        """Errors and warnings on the console, uncaught exceptions, failed loads."""
        self.requests = []
        """Every address that was loaded or tried."""

    def call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def begin(self, width=1200, height=900, dark=False):
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def note(self, method, params):
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.said.append(params["exceptionDetails"].get("exception", {}).get("description", str(params)))
        elif method == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}:
            self.said.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
            self.said.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url):
        """Load an address; a hash of the same page is only followed."""
        self.call("Page.navigate", url=url)

    def js(self, expression):
        """Return the value of a JavaScript expression; promises are awaited."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", str(done)))
        return done["result"].get("value")

    def until(self, condition, limit_s=LIMIT_S):
        """Wait until a JavaScript condition holds, in this document or the next, and return its value."""
        end = time.monotonic() + limit_s
        while True:
            try:
                return self.js(_POLLED.replace("CONDITION", condition).replace("LIMIT", str(limit_s * 1000)))
            except RuntimeError as error:
                if not any(said in str(error) for said in _GONE) or time.monotonic() > end:
                    raise RuntimeError(f"never: {condition}: {error}") from error

    def shown(self, url):
        """Load a page of MACE and wait until all of its views are drawn."""
        self.open(url)
        self.until(f"location.href === {json.dumps(url)} && document.body.dataset.shown === location.hash")

    def press(self, key):
        """Press and release a key: a name in KEYS, or a character."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        down = {"type": "keyDown", "key": key, "windowsVirtualKeyCode": code} | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def drag(self, start, end):
        """Drag with the mouse from one point (x, y) of the page to another."""
        steps = (("mouseMoved", start), ("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end))
        for number, (kind, (x, y)) in enumerate(steps):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            buttons = 1 if number in (1, 2) else 0
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, buttons=buttons, **button)

    def picture(self, whole=False):
        """Return a PNG of the view, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            # The picture of what was shown when a test failed.
            folder = Path(os.environ.get("MACE_PICTURES") or tempfile.mkdtemp(prefix="mace-failed-page-"))
            with contextlib.suppress(RuntimeError, TimeoutError):
                (folder / "page.png").write_bytes(self.picture(whole=True))
                error.add_note(f"the page as it was: {folder / 'page.png'}; it said {self.said}")
        self.close()

    def close(self):
        """End the page and its context."""
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)
