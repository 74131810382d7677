"""A headless Chromium, driven over its debugging pipe (Chrome DevTools Protocol) by the standard library alone."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """The path of a Chromium, or None where none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a Chromium. `events` are what the page has reported: console, exceptions, requests."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp()
        to_read, self.to_chromium = os.pipe()
        self.from_chromium, to_write = os.pipe()
        # Chromium reads its orders from descriptor 3 and answers on descriptor 4.
        command = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", find_chromium(), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.number = 0
        self.pending = b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to_chromium)
        os.close(self.from_chromium)
        shutil.rmtree(self.profile, ignore_errors=True)

    def message(self, deadline: float) -> dict[str, Any]:
        """The next message from the browser."""
        while b"\0" not in self.pending:
            if not select.select([self.from_chromium], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            piece = os.read(self.from_chromium, 2**16)
            if not piece:
                raise ConnectionError("Chromium has ended")
            self.pending += piece
        line, _, self.pending = self.pending.partition(b"\0")
        return json.loads(line)

    def call(self, method: str, seconds: float = 240, **parameters: Any) -> dict[str, Any]:
        """Give an order and wait for its answer; what else arrives meanwhile goes to `events`."""
        self.number += 1
        order: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            order["sessionId"] = self.session
        os.write(self.to_chromium, json.dumps(order).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            message = self.message(deadline)
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def size(self, width: int, height: int = 900) -> None:
        """Set the size of the window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def dark(self, is_dark: bool) -> None:
        """Set what the page is told that its reader prefers."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, address: str) -> None:
        """Go to an address and wait until it is loaded."""
        before = len(self.events)
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")
        del before

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise; RuntimeError where it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", answer))
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 240) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.js(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(expression)
            time.sleep(0.1)

    def screenshot(self, path: Path, selector: str | None = None) -> None:
        """A PNG of the window, or of one element in its full height."""
        options: dict[str, Any] = {}
        if selector is not None:
            box = self.js(
                f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
                "return {x: b.left + scrollX, y: b.top + scrollY, width: b.width, height: b.height}; })()"
            )
            options = {"clip": {**box, "scale": 1}, "captureBeyondViewport": True}
        picture = self.call("Page.captureScreenshot", format="png", **options)["data"]
        path.write_bytes(base64.b64decode(picture))

    def problems(self) -> list[str]:
        """Errors of the console, exceptions, and requests that went anywhere but to the page's own address."""
        found = []
        for event in self.events:
            method = event.get("method")
            parameters = event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"].get("exception", parameters))[:500])
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(str(parameters["args"]))
        return found

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
