"""A real Chromium without a window, steered by its debugging protocol: what it shows and requests, and its errors."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--disable-quic", "--no-first-run"),
    *("--hide-scrollbars", "--disable-background-networking", "--disable-component-update"),
    "--remote-debugging-port=0",
)
PATIENCE_S = 20.0


class Tab:
    """One page. `requests`: every address that it requested; `errors`: those of scripts, policy and loading."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def listen(self) -> None:
        async for received in self._socket:
            message = received.json()
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            match message.get("method"):
                case "Network.requestWillBeSent":
                    self.requests.append(message["params"]["request"]["url"])
                case "Runtime.exceptionThrown":
                    details = message["params"]["exceptionDetails"]
                    self.errors.append(details.get("exception", {}).get("description", details["text"]))
                case "Log.entryAdded":
                    self.errors.append(message["params"]["entry"]["text"])
                case "Runtime.consoleAPICalled":
                    self.errors.append(str(message["params"]["args"]))

    async def do(self, method: str, **settings: object) -> dict[str, Any]:
        """One command of the protocol and its result."""
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": settings})
        answer = await asyncio.wait_for(self._answers[number], PATIENCE_S)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    async def look(self, *, width: int, height: int = 900, dark: bool = False, touch: bool = False) -> None:
        """Be a screen of this size and scheme."""
        await self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.do("Emulation.setEmulatedMedia", features=[scheme])

    async def cut(self, away: bool) -> None:
        """Take the network away, or give it back."""
        free = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        await self.do("Network.emulateNetworkConditions", offline=away, **free)

    async def value(self, script: str) -> Any:
        """What this expression is in the page."""
        result = await self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until this expression is true."""
        async with asyncio.timeout(PATIENCE_S):
            while not await self.value(script):
                await asyncio.sleep(0.03)

    async def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = await self.do("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browse(address: str, **screen: Any) -> AsyncIterator[Tab]:
    """A new browser that has `address` open."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        silent = asyncio.subprocess.DEVNULL
        arguments = [*QUIET, f"--user-data-dir={profile}", "about:blank"]
        browser = await asyncio.create_subprocess_exec(str(CHROMIUM), *arguments, stdout=silent, stderr=silent)
        try:
            async with aiohttp.ClientSession() as session:
                port = await _port(Path(profile) / "DevToolsActivePort")
                async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    pages = [page for page in await reply.json() if page["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    listener = asyncio.create_task(tab.listen())
                    for domain in ("Page", "Network", "Runtime", "Log"):
                        await tab.do(f"{domain}.enable")
                    await tab.look(**({"width": 1280} | screen))
                    await tab.do("Page.navigate", url=address)
                    yield tab
                    listener.cancel()
        finally:
            with suppress(ProcessLookupError):
                browser.terminate()
            await browser.wait()


async def _port(file: Path) -> int:
    async with asyncio.timeout(PATIENCE_S):
        while not (file.is_file() and (lines := file.read_text().split())):
            await asyncio.sleep(0.03)
    return int(lines[0])
