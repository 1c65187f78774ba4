"""Who answers a command's questions: a server that runs already, or a model loaded here."""

from __future__ import annotations

import argparse
import re
import sys
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qwen3vl_mlx import cli, client
from qwen3vl_mlx.engine.output import Chunk, Completion, collect
from qwen3vl_mlx.errors import ImageError, InputError

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL
    from qwen3vl_mlx.media import ImageSource

_AT_ONCE = 8  # the engine's own default
_LOADING_SEC = 600.0  # a server may be given for its first load
_POLL_SEC = 0.25
_PICTURE = re.compile(r"messages\[\d+\]\.content\[(\d+)\]\.image_url: data URI \([^)]*\)")


@dataclass(frozen=True)
class Question:
    """One question about some pictures.

    sampling: by the names of SamplingParams, None where unset. response_format, grammar, pixels
    and timeout: as `Qwen3VL.stream` takes them.
    """

    prompt: str
    images: tuple[ImageSource, ...] = ()
    system: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    response_format: Mapping[str, Any] | None = None
    grammar: Mapping[str, Any] | None = None
    min_pixels: int | None = None
    max_pixels: int | Literal["full"] | None = None
    number_images: bool = False
    timeout: float | None = None


class Answerer(Protocol):
    """Answers questions from any thread, `at_once` of them together.

    Raises InputError where the question is at fault, QueueFullError where it may be asked again
    later, another Qwen3VLError where nothing can be answered.
    """

    where: str  # for people
    at_once: int

    @property
    def model(self) -> str:
        """Its name."""

    def stream(self, question: Question) -> AbstractContextManager[Iterator[Chunk]]:
        """The answer, chunk by chunk; leaving the context ends the work."""

    def answer(self, question: Question) -> Completion:
        """The whole answer."""

    def close(self) -> None:
        """Free what answers."""


def add_source(parser: argparse.ArgumentParser) -> None:
    """Options that say who answers."""
    group = parser.add_argument_group(
        "who answers",
        "a server on this machine (`qwen3vl serve --socket`) answers at once; without one,\n  or "
        "where it runs another model than the one asked for, the model is loaded",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help='folder, Hub id or "demo" (default: what the server runs; else $QWEN3VL_MODEL, else '
        "the 4-bit 4B Instruct model of mlx-community)",
    )
    group.add_argument("--revision", help="branch, tag or commit of a Hub model")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--server",
        metavar="ADDRESS",
        help=f"a socket's path or http://HOST:PORT (${client.SERVER_VARIABLE} does the same; "
        "default: the socket of `qwen3vl serve --socket`)",
    )
    which.add_argument("--no-server", action="store_true", help="load the model in any case")
    cli.add_quantize(parser)


def chosen_server(args: argparse.Namespace) -> client.Server | None:
    """The server that may answer what `add_source` was given, or None to load the model.

    Raises InputError for options that contradict each other, and where a server that was named
    runs another model.
    """
    loads = [name for name in ("quantize", "topology", "revision") if getattr(args, name)]
    if args.server and loads:
        raise InputError(
            f"--{loads[0]} says how to load a model, and --server that none is loaded; give one"
        )
    if args.no_server or loads:
        return None
    server = client.find_server(args.server)
    if server is None or args.model is None:
        return server
    served = client.served_models(server)
    if args.model in served:
        return server
    if args.server:
        raise InputError(
            f"the server at {server.address} runs {served[0]}, not {args.model}; leave out "
            "--model, or --server to load it here"
        )
    return None


def open_answerer(args: argparse.Namespace, *, at_once: int = _AT_ONCE) -> Answerer:
    """What `chosen_server` finds, or the model loaded here, with a progress bar.

    at_once: questions that will be asked together. Raises Qwen3VLError.
    """
    server = chosen_server(args)
    if server is not None:
        return RemoteAnswerer(server, at_once)
    return load_answerer(args, at_once)


def load_answerer(args: argparse.Namespace, at_once: int) -> LocalAnswerer:
    """Load the model that `add_source` was told. Raises Qwen3VLError."""
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.api import load
    from qwen3vl_mlx.engine.engine import EngineOptions

    # Every question has pictures of its own: what was read for one is of no use to another.
    options = EngineOptions(max_batch=at_once, prefix_cache_bytes=0, feature_cache_bytes=0)
    model = load(
        args.model,
        quantize=args.quantize,
        topology=args.topology,
        revision=args.revision,
        engine=options,
        progress=True,
    )
    return LocalAnswerer(model, args.model or hub.default_model(), at_once)


class LocalAnswerer:
    """A model in this process."""

    def __init__(self, loaded: Qwen3VL, name: str, at_once: int):
        self.loaded = loaded
        self.model = name
        self.where = f"{name}, loaded here"
        self.at_once = at_once

    def stream(self, question: Question) -> AbstractContextManager[Iterator[Chunk]]:
        from qwen3vl_mlx.conversation import as_messages

        system = question.system
        head = [] if system is None else [{"role": "system", "content": system}]
        return closing(
            self.loaded.stream(
                [*head, *as_messages(question.prompt, question.images, ())],
                sampling=question.sampling,
                response_format=question.response_format,
                grammar=question.grammar,
                min_pixels=question.min_pixels,
                max_pixels=question.max_pixels,
                add_vision_id=question.number_images,
                timeout=question.timeout,
            )
        )

    def answer(self, question: Question) -> Completion:
        with self.stream(question) as chunks:
            return collect(chunks)

    def close(self) -> None:
        self.loaded.close()


class RemoteAnswerer:
    """A server of this package. It is asked for its model's name when that is first wanted."""

    def __init__(self, server: client.Server, at_once: int):
        self.server = server
        self.where = f"the server at {server.address}"
        self.at_once = at_once

    @cached_property
    def model(self) -> str:
        return client.served_models(self.server)[0]

    @contextmanager
    def stream(self, question: Question) -> Iterator[Iterator[Chunk]]:
        with ExitStack() as stack:
            yield self._opened(stack, chat_body(question), question.images)

    def _opened(
        self, stack: ExitStack, body: Mapping[str, Any], images: Sequence[ImageSource]
    ) -> Iterator[Chunk]:
        """The answer's stream, as soon as the server has loaded its model."""
        until = time.monotonic() + _LOADING_SEC
        told = not sys.stderr.isatty()
        while True:
            try:
                return stack.enter_context(client.stream_chat(self.server, body))
            except InputError as error:
                raise _renamed(error, images) from error
            except client.ServerLoadingError as error:
                if time.monotonic() > until:
                    raise
                if not told:
                    print(f"\r\033[Knote: {error}", file=sys.stderr)
            told = True
            time.sleep(_POLL_SEC)

    def answer(self, question: Question) -> Completion:
        with self.stream(question) as chunks:
            return collect(chunks)

    def close(self) -> None:
        pass  # it is not ours


def _renamed(error: InputError, images: Sequence[ImageSource]) -> InputError:
    """What a server says of a picture, under the name that it has here."""
    from qwen3vl_mlx.media import describe_source

    found = _PICTURE.match(str(error))
    if found is None:
        return error
    name = describe_source(images[int(found[1])])
    return ImageError(f"{name}{str(error)[found.end() :]}")


def chat_body(question: Question) -> dict[str, Any]:
    """A question as the body of /v1/chat/completions. Raises ImageError."""
    system = question.system
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    parts = [{"type": "image_url", "image_url": {"url": _data_uri(i)}} for i in question.images]
    messages.append(
        {"role": "user", "content": [*parts, {"type": "text", "text": question.prompt}]}
    )
    body = {
        "model": "default",
        "messages": messages,
        **question.sampling,
        "response_format": question.response_format,
        "grammar": question.grammar,
        "min_pixels": question.min_pixels,
        "max_pixels": question.max_pixels,
        "timeout": question.timeout,
    }
    if question.number_images:
        body["chat_template_kwargs"] = {"add_vision_id": True}
    return {name: value for name, value in body.items() if value is not None}


def _data_uri(image: ImageSource) -> str:
    """A picture for the server, which may see neither our files nor our network.

    Encoded pictures are sent as they are: what they say of their orientation is in them.
    """
    from qwen3vl_mlx.media import load_image, read_bytes

    if isinstance(image, (str, bytes, bytearray, memoryview)) or hasattr(image, "__fspath__"):
        data = read_bytes(image)
    else:
        file = BytesIO()
        load_image(image).save(file, "PNG", compress_level=1)
        data = file.getvalue()
    return f"data:application/octet-stream;base64,{b64encode(data).decode()}"
