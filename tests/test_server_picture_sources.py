"""How the server reads pictures: URLs, threads, its cache, and what ends it."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from malformed import SCENE
from offline import Network, only_loopback
from pictures import encode
from reading import PROCESSOR, cut, images, uri, visuals

from qwen3vl_mlx.asking import Look
from qwen3vl_mlx.errors import (
    EngineClosedError,
    ImageError,
    InputError,
    TooLargeError,
    UnsupportedImageError,
)
from qwen3vl_mlx.server import body, pictures
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.pictures import Pictures

PNG = encode(SCENE, "PNG")
OTHER = encode(SCENE[::-1], "PNG")


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return only_loopback(monkeypatch, {"pictures.example": ["127.0.0.1"]})


# ---- URLs


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    """Gives a new picture for every request: the first that `web.pictures` has left, then PNG."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.server.asked += 1
            if self.path == "/slow":
                self.server.slow.wait(30)
            if self.path == "/hop":
                self.send_response(302)
                self.send_header("Location", "/a.png")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            body = self.server.pictures.pop(0) if self.server.pictures else PNG
            with suppress(OSError):  # the client may have gone
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.asked, httpd.pictures, httpd.slow = 0, [], threading.Event()
    httpd.url = f"http://pictures.example:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.slow.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_private_urls_are_for_those_who_allow_them(web: Any) -> None:
    with pytest.raises(ImageError, match="is refused"):
        cut(f"{web.url}/a.png")
    assert web.asked == 0
    (there,) = cut(f"{web.url}/a.png", allow_private_urls=True)
    (same,) = cut(uri(PNG))
    assert there.identity == same.identity


def test_the_options_reach_the_download(web: Any) -> None:
    with pytest.raises(TooLargeError, match="larger than the 10 bytes"):
        cut(f"{web.url}/a.png", allow_private_urls=True, max_download_bytes=10)
    with pytest.raises(ImageError, match=r"timed out after 0.2 s"):
        cut(f"{web.url}/slow", allow_private_urls=True, download_timeout=0.2)
    cut(f"{web.url}/hop", allow_private_urls=True, max_redirects=1)
    with pytest.raises(ImageError, match="redirects too often"):
        cut(f"{web.url}/hop", allow_private_urls=True, max_redirects=0)
    web.pictures.append(b"<html>")
    with pytest.raises(UnsupportedImageError):
        cut(f"{web.url}/a.png", allow_private_urls=True)


def test_a_url_is_read_once_in_a_request_and_anew_in_the_next(web: Any) -> None:
    async def run() -> None:
        reader = Pictures(ServerOptions(allow_private_urls=True))
        web.pictures[:] = [PNG, OTHER]
        seen = []
        for _ in range(2):
            copies = await reader.read(images(*[f"{web.url}/a.png"] * 3), PROCESSOR, Look())
            seen.append({copy["content"][0]["image"].identity for copy in copies})
        assert [len(each) for each in seen] == [1, 1]
        assert seen[0] != seen[1]
        assert web.asked == 2
        reader.close()

    asyncio.run(run())


# ---- threads and the cache


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that decoded pictures."""
    threads: list[str] = []
    real = pictures.load_image

    def load_image(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(*args, **options)

    monkeypatch.setattr(pictures, "load_image", load_image)
    return threads


def test_equal_pictures_are_decoded_once_and_never_on_the_loop(decoded: list[str]) -> None:
    async def run() -> None:
        reader = Pictures(ServerOptions())
        same = [uri(PNG), uri(PNG), uri(PNG) + "\n", base64.b64encode(PNG).decode()]
        for turn in range(3):  # a conversation sends its pictures in every turn
            copies = await reader.read(images(*same[: turn + 2]), PROCESSOR, Look())
            assert len({id(copy["content"][0]["image"]) for copy in copies}) == 1
        large = await reader.read(images(uri(PNG)), PROCESSOR, Look(min_pixels=30_000))
        assert large[0]["content"][0]["image"].identity != copies[0]["content"][0]["image"].identity
        reader.close()

    asyncio.run(run())
    assert len(decoded) == 2
    assert all(name.startswith("decode") for name in decoded)


def test_the_cache_is_bounded_by_bytes(decoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = PROCESSOR.visual_input(PNG, PROCESSOR.image_budget()).patches.nbytes
    monkeypatch.setattr(pictures, "_KEPT_BYTES", 2 * one)
    third = encode(SCENE[:, ::-1], "PNG")

    async def run() -> None:
        reader = Pictures(ServerOptions())
        for data in (PNG, OTHER, PNG, third, PNG, OTHER):  # the fourth takes the second's place
            await reader.read(images(uri(data)), PROCESSOR, Look())
        reader.close()

    asyncio.run(run())
    assert len(decoded) == 4


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@pytest.fixture
def fetching(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs in download."""
    urls: list[str] = []
    real = pictures.fetch

    def fetch(url: str, *args: Any, **options: Any) -> bytes:
        urls.append(url)
        try:
            return real(url, *args, **options)
        finally:
            urls.remove(url)

    monkeypatch.setattr(pictures, "fetch", fetch)
    return urls


def test_the_loop_goes_on_while_several_pictures_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[str] = []
    go_on = threading.Event()
    real = pictures.load_image

    def held(*args: Any, **options: Any) -> Any:
        entered.append("")
        assert go_on.wait(10)
        return real(*args, **options)

    monkeypatch.setattr(pictures, "load_image", held)

    async def run() -> None:
        reader = Pictures(ServerOptions())
        many = [uri(encode(SCENE[i:], "PNG")) for i in range(8)]
        task = asyncio.create_task(reader.read(images(*many), PROCESSOR, Look()))
        await until(lambda: len(entered) == 4)
        await asyncio.sleep(0.05)
        assert len(entered) == 4  # at its full size each
        go_on.set()
        assert len(visuals(await task)) == 8
        reader.close()

    asyncio.run(run())


def test_whoever_stops_waiting_frees_the_threads(web: Any, fetching: list[str]) -> None:
    async def run() -> None:
        reader = Pictures(ServerOptions(allow_private_urls=True, download_timeout=60))
        slow = [f"{web.url}/slow#{i}" for i in range(40)]
        task = asyncio.create_task(reader.read(images(*slow), PROCESSOR, Look()))
        await until(lambda: web.asked == 4)
        await asyncio.sleep(0.05)
        assert len(fetching) == 4  # one request does not take all threads there are
        await reader.read(images(uri(PNG), f"{web.url}/a.png"), PROCESSOR, Look())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not fetching)
        assert web.asked == 5
        reader.close()

    asyncio.run(run())


@pytest.mark.parametrize("leave", ["client", "server"])
def test_nobody_waits_for_a_host_that_says_nothing(fetching: list[str], leave: str) -> None:
    async def run() -> None:
        reader = Pictures(ServerOptions(allow_private_urls=True, download_timeout=60))
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"https://pictures.example:{silent.getsockname()[1]}/"
            task = asyncio.create_task(reader.read(images(url), PROCESSOR, Look()))
            await until(lambda: bool(fetching))
            if leave == "client":
                task.cancel()
            else:
                reader.close()
            with pytest.raises((asyncio.CancelledError, ImageError)):
                await task
            await until(lambda: not fetching)
        reader.close()

    asyncio.run(run())


def test_slow_hosts_do_not_keep_files_waiting(
    web: Any, fetching: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)

    async def run() -> None:
        reader = Pictures(
            ServerOptions(allow_private_urls=True, download_timeout=60, image_roots=(tmp_path,))
        )
        slow = [images(*[f"{web.url}/slow#{i}{j}" for j in range(4)]) for i in range(5)]
        tasks = [asyncio.create_task(reader.read(each, PROCESSOR, Look())) for each in slow]
        await until(lambda: len(fetching) == 16)
        file = images(f"{tmp_path}/a.png")
        assert await asyncio.wait_for(reader.read(file, PROCESSOR, Look()), 10)
        assert len(fetching) == 16
        for task in tasks:
            task.cancel()
        reader.close()

    asyncio.run(run())


@pytest.mark.parametrize("size", [100, 2**21])
def test_large_bodies_are_parsed_beside_the_loop(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    real = body.parse_object

    def parse(data: bytes, depth: int) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return real(data, depth)

    async def run() -> None:
        data = json.dumps({"a": "b" * size}).encode()
        app = SimpleNamespace(
            state=SimpleNamespace(serving=SimpleNamespace(options=ServerOptions()))
        )
        request = body.JsonRequest({"type": "http", "app": app})
        request._body = data
        assert await request.json() == {"a": "b" * size}
        assert (threads == [threading.current_thread()]) == (size < 2**20)

    monkeypatch.setattr(body, "parse_object", parse)
    asyncio.run(run())


def test_one_failure_ends_the_rest(web: Any, fetching: list[str]) -> None:
    async def run() -> None:
        reader = Pictures(ServerOptions(allow_private_urls=True, download_timeout=60))
        slow = [f"{web.url}/slow#{i}" for i in range(20)]
        with pytest.raises(InputError, match=r"^messages\[0\]"):
            await reader.read(images(uri(b""), *slow), PROCESSOR, Look())
        await until(lambda: not fetching)
        await asyncio.sleep(0.05)
        assert web.asked < 8
        reader.close()

    asyncio.run(run())


def test_a_closed_reader_says_so_to_all_who_wait(web: Any) -> None:
    async def run() -> None:
        reader = Pictures(ServerOptions(allow_private_urls=True, download_timeout=60))
        task = asyncio.create_task(reader.read(images(f"{web.url}/slow"), PROCESSOR, Look()))
        await until(lambda: web.asked == 1)
        reader.close()
        with pytest.raises(ImageError, match="nobody waits"):
            await task
        with pytest.raises(EngineClosedError):
            await reader.read(images(uri(PNG)), PROCESSOR, Look())

    asyncio.run(run())
