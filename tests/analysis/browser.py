"""Headless Chromium over its DevTools protocol: opens a page, listens to what it logs and asks for, takes pictures."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

PATIENCE = 60.0  # seconds for anything that must happen
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-default-apps --disable-extensions --hide-scrollbars "
    "--disable-dev-shm-usage --remote-debugging-port=0 --remote-allow-origins=* --window-size=1440,900"
).split()


def find() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def needed() -> str:
    """Path of the browser. Without one a test is skipped, but on CI, where it fails."""
    found = find()
    if found is None:
        reason = "no chromium here: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Browser:
    """One page of one browser. Close it, or use it in a ``with`` statement."""

    def __init__(self, program: str, profile: Path) -> None:
        import websocket

        profile.mkdir(parents=True)
        self.events: list[dict] = []
        self._number = 0
        self._session: str | None = None
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port, path = self._wait_for(lambda: self._port(profile))
            self._socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=PATIENCE)
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _port(profile: Path) -> list[str] | None:
        """What the browser writes when it listens: the port, and the path of its socket."""
        with contextlib.suppress(OSError):
            lines = (profile / "DevToolsActivePort").read_text().split()
            return lines if len(lines) == 2 else None
        return None

    def _wait_for(self, ready):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (found := ready()) is not None:
                return found
            if self._process.poll() is not None:
                raise RuntimeError(f"the browser ended with code {self._process.returncode}")
            time.sleep(0.05)
        raise TimeoutError("the browser does not answer")

    def call(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            found = json.loads(self._socket.recv())
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return found["result"]
            self.events.append(found)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; of a promise, what it becomes."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def open(self, address: str) -> None:
        """Load a page, to the end of its ``load`` event."""
        self.call("Page.navigate", url=address)
        end = time.monotonic() + PATIENCE
        script = "location.href.split('?')[0].split('#')[0] + ' ' + document.readyState"
        while self.evaluate(script) != f"{address.split('?')[0].split('#')[0]} complete":
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.05)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def named(self, *methods: str) -> list[dict]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def problems(self) -> list[str]:
        """Errors and warnings that the page has logged, and exceptions that it did not catch."""
        self.evaluate("1")  # everything logged before this answer has arrived with it
        found = [str(event["exceptionDetails"]) for event in self.named("Runtime.exceptionThrown")]
        found += [str(e) for e in self.named("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")]
        return found + [str(e["entry"]) for e in self.named("Log.entryAdded") if e["entry"]["level"] != "verbose"]

    def requests(self) -> list[str]:
        """Addresses that were asked for, but for those whose content is in them."""
        urls = [event["request"]["url"] for event in self.named("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "blob:", "about:"))]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        clip = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        done = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(done["data"]))

    def print_pdf(self, path: Path) -> None:
        done = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        path.write_bytes(base64.b64decode(done["data"]))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._session = None
            self.call("Browser.close")
        with contextlib.suppress(Exception):
            self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
