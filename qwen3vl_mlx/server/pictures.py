"""The pictures of requests: fetched, decoded and cut beside the event loop, within limits."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qwen3vl_mlx.asking import Look
from qwen3vl_mlx.errors import EngineClosedError, InputError, TooLargeError
from qwen3vl_mlx.media import (
    TextKind,
    decode_text,
    describe_source,
    kind_of_text,
    load_image,
    path_of_file_url,
)
from qwen3vl_mlx.media_http import fetch
from qwen3vl_mlx.processing.image import VisionSettings, VisualInput, image_input, video_input
from qwen3vl_mlx.processing.processor import Messages, Processor
from qwen3vl_mlx.processing.template import normalize_messages
from qwen3vl_mlx.server.options import ServerOptions
from qwen3vl_mlx.server.picture_files import read_below
from qwen3vl_mlx.server.picture_parts import Wanted, find_wanted

if TYPE_CHECKING:
    from PIL.Image import Image

_FETCHERS = 16  # downloads at once, of all requests
_FILES = 4  # local files in reading at once, whatever the web does
_DECODERS = 4  # pictures in decoding at once, of all requests; each is held at its full size
_AT_ONCE = 4  # pictures of one request under way: others are to be served too
_KEPT_BYTES = 128 * 2**20  # of cut pictures, for the turns of a conversation
_MOST_BYTES = 2**30  # of one request's cut pictures: 350,000 tokens, more than a context holds

Result = TypeVar("Result")


class Pictures:
    """Reads the pictures of all requests to one server. For one event loop."""

    def __init__(self, options: ServerOptions):
        self._options = options
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch")
        self._files = ThreadPoolExecutor(_FILES, thread_name_prefix="file")
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._kept = _Kept(_KEPT_BYTES)
        self._closed = threading.Event()

    def close(self) -> None:
        """End what is being read; nothing can be read any more."""
        self._closed.set()
        for pool in (self._fetchers, self._files, self._decoders):
            pool.shutdown(wait=False)

    async def read(
        self, messages: Messages, processor: Processor, look: Look
    ) -> list[dict[str, Any]]:
        """Copies of OpenAI messages whose pictures and videos are cut for `processor`'s model.

        A picture is a URL, a data: URI, base64 or a path, or was cut before and stays as it is;
        a video is a list of pictures. Equal ones are read once. A picture's own min_pixels and
        max_pixels win over its `detail`, and that over `look`; look.max_pixels bounds `detail`.
        Raises InputError and its kin, with messages that begin with the picture's place.
        """
        normalize_messages(messages)  # before anything is fetched
        found = list(find_wanted(messages, processor, look, self._options.max_pixels))
        wanted = [picture for _, _, picture in found if isinstance(picture, Wanted)]
        self._check_count(sum(len(each.sources) for each in wanted))
        cut = await self._cut_all(dict.fromkeys(wanted), processor.settings)
        copies = [dict(message) for message in messages]
        for number, index, picture in found:
            visual = cut[picture] if isinstance(picture, Wanted) else picture
            if copies[number]["content"] is messages[number]["content"]:
                copies[number]["content"] = list(messages[number]["content"])
            copies[number]["content"][index] = {"type": visual.kind, visual.kind: visual}
        return copies

    def _check_count(self, count: int) -> None:
        if count > self._options.max_images:
            raise InputError(
                f"messages hold {count} pictures, every frame of a video counted, and this server "
                f"takes {self._options.max_images} in one request; send fewer"
            )

    async def _cut_all(
        self, wanted: dict[Wanted, None], settings: VisionSettings
    ) -> dict[Wanted, VisualInput]:
        """Where one fails, or nobody waits any more, all end."""
        reading = _Reading(settings)
        tasks = [asyncio.create_task(self._cut(each, reading)) for each in wanted]
        try:
            return dict(zip(wanted, await asyncio.gather(*tasks), strict=True))
        finally:
            reading.over.set()
            for task in tasks:
                task.cancel()

    async def _cut(self, wanted: Wanted, reading: _Reading) -> VisualInput:
        async with reading.slots:
            files = await self._read_all(wanted, reading)
            # By what the files hold: the same address may lead to another picture tomorrow.
            digests = tuple(file.digest for file in files)
            key = (wanted.kind, wanted.budget, wanted.fps, reading.settings, digests)
            visual = self._kept.get(key)
            if visual is None:
                visual = await self._in_thread(
                    self._decoders, lambda: self._decoded(files, wanted, reading.settings)
                )
                self._kept.put(key, visual)
        reading.count(visual)
        return visual

    async def _read_all(self, wanted: Wanted, reading: _Reading) -> list[_File]:
        files: list[_File] = []
        most = _AT_ONCE * self._options.max_download_bytes
        for number, source in enumerate(wanted.sources):
            files.append(await self._read(source, wanted.place_of(number), reading))
            if sum(len(file.data) for file in files) > most:
                raise TooLargeError(f"{wanted.place}: the frames are over {most} bytes together")
        return files

    async def _read(self, text: str, place: str, reading: _Reading) -> _File:
        """The bytes of a picture, from wherever they are."""
        kind = kind_of_text(text, on_disk=False)
        pools = {"http": self._fetchers, "file": self._files, "path": self._files}
        pool = pools.get(kind, self._decoders)
        return await self._in_thread(pool, lambda: self._bytes(text, kind, place, reading))

    def _bytes(self, text: str, kind: TextKind, place: str, reading: _Reading) -> _File:
        options = self._options
        name = f"{place}: {describe_source(text, kind)}"
        if kind == "http":
            data = fetch(
                text.strip(),
                name,
                timeout=options.download_timeout,
                max_bytes=options.max_download_bytes,
                max_redirects=options.max_redirects,
                public_only=not options.allow_private_urls,
                wanted=lambda: not (reading.over.is_set() or self._closed.is_set()),
            )
        elif kind in ("file", "path"):
            path = path_of_file_url(text.strip(), name) if kind == "file" else text
            data = read_below(path, options.image_roots, name, options.max_download_bytes)
        else:
            data = decode_text(text, kind, name)
        return _File(name, data, hashlib.sha256(data).digest())

    def _decoded(
        self, files: Sequence[_File], wanted: Wanted, settings: VisionSettings
    ) -> VisualInput:
        most = self._options.max_image_pixels
        left = most if wanted.kind == "image" else 2 * most  # the frames are held all at once
        images: list[Image] = []
        for file in files:
            images.append(load_image(file.data, name=file.name, max_source_pixels=min(most, left)))
            left -= images[-1].width * images[-1].height
        try:
            if wanted.kind == "image":
                visual = image_input(images[0], settings, wanted.budget)
            else:
                visual = video_input(images, wanted.fps, settings, wanted.budget)
        except InputError as error:
            raise type(error)(f"{wanted.place}: {error}") from error
        _ = visual.identity  # computed once, and here: it reads every pixel
        return visual

    async def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        def work_unless_closed() -> Result:  # it may have waited for its turn until then
            self._check_open()
            return work()

        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(pool, work_unless_closed)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise EngineClosedError("the server is shutting down")


@dataclass(frozen=True)
class _File:
    name: str
    data: bytes
    digest: bytes  # sha256


@dataclass
class _Reading:
    """The pictures of one request, on their way."""

    settings: VisionSettings
    over: threading.Event = field(default_factory=threading.Event)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    num_bytes: int = 0

    def count(self, visual: VisualInput) -> None:
        self.num_bytes += visual.patches.nbytes
        if self.num_bytes > _MOST_BYTES:
            raise TooLargeError(
                "messages hold pictures of more pixels than any context takes; send fewer, or "
                "lower max_pixels"
            )


class _Kept:
    """The pictures cut last, `most` bytes of them. For one thread."""

    def __init__(self, most: int):
        self._most = most
        self._num_bytes = 0
        self._pictures: OrderedDict[Hashable, VisualInput] = OrderedDict()

    def get(self, key: Hashable) -> VisualInput | None:
        visual = self._pictures.get(key)
        if visual is not None:
            self._pictures.move_to_end(key)
        return visual

    def put(self, key: Hashable, visual: VisualInput) -> None:
        if key in self._pictures:  # two requests have read it at once
            return
        self._pictures[key] = visual
        self._num_bytes += visual.patches.nbytes
        while self._num_bytes > self._most:
            _, oldest = self._pictures.popitem(last=False)
            self._num_bytes -= oldest.patches.nbytes
