"""OpenAI's own client against the server: one answer per question, in every form it is asked."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from asking import OTHER_TRUTH, QUESTION, TRUTH, about
from clients import (
    ask,
    asking,
    base64_of,
    connect,
    connect_async,
    data_uri,
    image_url,
    joined,
    openai,
    said_by,
    sent,
)
from driving import WORDS
from law import INPUTS, STEPS, TOLERANCE, Messages, full_pass, picture, said, user
from live import Live, live_server
from PIL.Image import Image
from serving import busy

from qwen3vl_mlx import Qwen3VL
from qwen3vl_mlx.demo.scenes import make_scene
from qwen3vl_mlx.server.options import ServerOptions

SEED_SCRIPT = """
from openai import OpenAI
client = OpenAI(api_key="foobar", base_url="http://localhost:1234/v1/")
completion = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": IMAGE}},
        {"type": "text", "text": "What type of flower is this? Give some fun facts."}]}],
    max_tokens=256, frequency_penalty=1.0, top_p=0.1, temperature=0)
print(completion.choices[0].message.content)
"""
SEED_QUESTION = "What type of flower is this? Give some fun facts."
SEED_PARAMS = {"max_tokens": 256, "frequency_penalty": 1.0, "top_p": 0.1, "temperature": 0}

PHOTO = "a flower é.png"
TIMES = (
    "total_prompt_time_sec",
    "total_completion_time_sec",
    "total_time_sec",
    "avg_prompt_tok_per_sec",
    "avg_compl_tok_per_sec",
    "avg_tok_per_sec",
    "time_to_first_token_sec",
    "peak_memory_bytes",
)

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
# Beside law.INPUTS: pictures in other places of a conversation.
PLACES: dict[str, Messages] = {
    "text before": [user("What is this?", picture(1, 96))],
    "text between": [user(picture(1, 96), "and", picture(2, 64, 128), "or this:", picture(3))],
    "system": [{"role": "system", "content": "Be brief."}, user(picture(1, 96), "What?")],
    "tool result": [
        user("Look."),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {**user("Seen:", picture(1, 96)), "role": "tool", "tool_call_id": "call_1"},
        user("What is it?"),
    ],
    "assistant's picture": [
        user("Draw."),
        {**user(picture(1, 96), "There."), "role": "assistant"},
        user("What is it?"),
    ],
    "picture alone": [user(picture(1, 96))],
    "no picture in the last turn": [user(picture(1, 96), "What?"), said("So."), user("And?")],
}


@pytest.fixture(scope="module")
def photo() -> Image:
    """A picture whose answer to the seed's question is another than that without a picture."""
    return make_scene(1, kind="text").draw()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photo: Image) -> Path:
    """A folder with a picture, named as people name them."""
    folder = tmp_path_factory.mktemp("pictures")
    photo.save(folder / PHOTO)
    return folder


@pytest.fixture(scope="module")
def live(demo: Qwen3VL, folder: Path) -> Iterator[Live]:
    options = ServerOptions(image_roots=(folder,), allow_private_urls=True, keep_alive_sec=0.05)
    with live_server(demo, options) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return connect(live)


# The law: one answer per question, the one of a full forward pass.


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Qwen3VL]
) -> Iterator[tuple[Qwen3VL, Live]]:
    model = tiny_model(request.param)
    with live_server(model) as live:
        yield model, live


@pytest.mark.parametrize(
    ("served", "name"),
    [
        *((variant, name) for variant in tiny.VARIANTS for name in INPUTS),
        *(("dense64", name) for name in PLACES),
    ],
    indirect=["served"],
)
def test_through_the_server(served: tuple[Qwen3VL, Live], name: str) -> None:
    model, live = served
    messages = {**INPUTS, **PLACES}[name]
    law = full_pass(model, model.processor.prompt(messages))
    answer = connect(live).chat.completions.create(
        model="default",
        messages=sent(messages),
        max_tokens=STEPS,
        temperature=0,
        logprobs=True,
        logit_bias={str(token): -1e9 for token in range(WORDS, 1024)},
    )
    (choice,) = answer.choices
    tokenizer = model.processor.tokenizer
    entries = choice.logprobs.content
    assert [bytes(entry.bytes) for entry in entries] == list(map(tokenizer.token_bytes, law.tokens))
    assert choice.message.content == tokenizer.decode(law.tokens)
    logits = law.logits[-STEPS:].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # (STEPS, vocab_size)
    expected = logprobs[np.arange(STEPS), law.tokens]
    given = np.array([entry.logprob for entry in entries])
    assert np.abs(given - expected).max() <= TOLERANCE * np.abs(law.logits).max()


@pytest.mark.parametrize("served", ["dense64"], indirect=True)
def test_all_at_once(served: tuple[Qwen3VL, Live]) -> None:
    model, live = served
    asked = {**INPUTS, **PLACES}
    alone = {name: model.generate(asked[name], max_tokens=8).text for name in asked}
    assert len(set(alone.values())) > len(asked) // 2

    async def ask_all() -> list[str]:
        async with connect_async(live) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="default", messages=sent(messages), max_tokens=8
                    )
                    for messages in asked.values()
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask_all()) == list(alone.values())


# The seed's script, and the forms of a picture.


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[Callable[[bool], str]]:
    """`web(secure)`: the folder's URL on a server of this machine, plain or over TLS."""
    servers: list[ThreadingHTTPServer] = []

    def serve(secure: bool) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        if secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http{'s' * secure}://localhost:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def certificate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust a certificate of this machine's own."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no openssl to make a certificate with")
    command = f"""{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost
        -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"""
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "cert.pem"))


def run_seed_script(live: Live, image: str) -> None:
    port = live.url.rpartition(":")[2]
    exec(SEED_SCRIPT.replace("1234", port), {"IMAGE": image})


FORMS: dict[str, Callable[[Path, Image], str]] = {
    "data URI": lambda _, photo: data_uri(photo),
    "base64": lambda _, photo: base64_of(photo),
    "path": lambda path, _: str(path),
    "file": lambda path, _: path.as_uri(),
    "file, not quoted": lambda path, _: f"file://{path}",
}


@pytest.fixture
def seed_answer(demo: Qwen3VL, photo: Image, scene: Image) -> str:
    ask = partial(demo.generate, SEED_QUESTION, **SEED_PARAMS)
    answer = ask(images=[photo]).text
    assert ask(images=[scene]).text != answer != ask().text
    return answer


@pytest.mark.parametrize("form", FORMS)
def test_the_seeds_script(
    live: Live,
    folder: Path,
    photo: Image,
    seed_answer: str,
    form: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_seed_script(live, FORMS[form](folder / PHOTO, photo))
    assert capsys.readouterr().out == seed_answer + "\n"


def test_the_seeds_script_with_a_url(
    live: Live, web: Callable[[bool], str], seed_answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_seed_script(live, f"{web(False)}/{PHOTO}")
    assert capsys.readouterr().out == seed_answer + "\n"


@pytest.mark.usefixtures("certificate")
def test_the_seeds_script_with_a_secure_url(
    live: Live, web: Callable[[bool], str], seed_answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_seed_script(live, f"{web(True)}/{PHOTO}")
    assert capsys.readouterr().out == seed_answer + "\n"


def test_a_certificate_that_nobody_trusts(
    live: Live, client: Any, web: Callable[[bool], str], certificate: None, monkeypatch: Any
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(openai.BadRequestError, match="certificate"):
        ask(client, asking(image_url(f"{web(True)}/{PHOTO}")))


@pytest.mark.parametrize(
    "part",
    [
        lambda uri: image_url(uri),
        lambda uri: {"type": "image_url", "image_url": uri},
        lambda uri: {"type": "image", "image": uri},
        lambda uri: {"type": "input_image", "image_url": uri},
        lambda uri: {"type": "input_image", "image_url": uri, "detail": "auto"},
    ],
)
def test_parts_as_several_apis_write_them(client: Any, scene: Image, part: Any) -> None:
    assert said_by(ask(client, asking(part(data_uri(scene)), QUESTION))) == TRUTH


# An answer whole, and as a stream.


def test_a_completion(client: Any, demo: Qwen3VL, scene: Image) -> None:
    demo.engine.clear_caches()
    asked = asking(image_url(data_uri(scene)), QUESTION)
    answer = ask(client, asked)
    alone = demo.generate(about(scene)).usage
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert choice.message.to_dict() == {"role": "assistant", "content": TRUTH, "refusal": None}
    assert (answer.object, answer.model) == ("chat.completion", "demo")
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        alone.prompt_tokens,
        alone.completion_tokens,
    )
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert usage.completion_tokens_details.reasoning_tokens == 0
    times = usage.to_dict()
    assert set(TIMES) <= set(times)
    assert all(times[name] > 0 for name in TIMES)
    again = ask(client, asked)
    assert again.id != answer.id
    assert again.system_fingerprint == answer.system_fingerprint
    assert again.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


@pytest.mark.parametrize("asked_for", [None, False, True])
def test_a_stream(client: Any, scene: Image, asked_for: bool | None) -> None:
    options = {} if asked_for is None else {"stream_options": {"include_usage": asked_for}}
    asked = asking(image_url(data_uri(scene)), QUESTION)
    whole = ask(client, asked)
    chunks = list(ask(client, asked, stream=True, **options))
    assert joined(chunks) == TRUTH
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    if asked_for:
        *chunks, last = chunks
        assert last.choices == []
        assert last.usage.completion_tokens == whole.usage.completion_tokens
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
        assert set(last.usage.to_dict()) == set(whole.usage.to_dict())
    assert all(chunk.usage is None for chunk in chunks)
    assert all(("usage" in chunk.model_fields_set) == bool(asked_for) for chunk in chunks)
    first, *pieces, end = (chunk.choices[0] for chunk in chunks)
    assert first.delta.to_dict() == {"role": "assistant", "content": "", "refusal": None}
    assert len(pieces) > 5
    assert all(piece.delta.content and piece.delta.role is None for piece in pieces)
    assert {choice.finish_reason for choice in (first, *pieces)} == {None}
    assert (end.finish_reason, end.delta.to_dict()) == ("stop", {})


def lines_of(client: Any, messages: Messages, **fields: Any) -> list[str]:
    raw = client.chat.completions.with_streaming_response
    with raw.create(model="default", messages=messages, stream=True, **fields) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        return list(response.iter_lines())


def test_the_lines_of_a_stream(client: Any) -> None:
    lines = lines_of(client, asking("Hello"), max_tokens=4)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(not line or line.startswith(("data: {", ": ")) for line in lines[:-2])
    assert "".join(line[:1] for line in lines) == "d" * (len(lines) // 2)


def test_a_silent_stream_is_kept_alive(client: Any, demo: Qwen3VL) -> None:
    asked = asking("Hello")
    plain = said_by(ask(client, asked, max_tokens=4))
    with ThreadPoolExecutor() as pool:
        with busy(demo):
            reading = pool.submit(lines_of, client, asked, max_tokens=4)
            time.sleep(0.3)
            assert not reading.done()
        lines = reading.result()
    comments = [line for line in lines if line.startswith(":")]
    assert comments[0] == ": keep-alive"
    assert 3 <= len(comments) <= 8
    assert lines[lines.index(comments[0]) + 1] == ""
    with busy(demo):
        stream = ask(client, asked, max_tokens=4, stream=True)  # clients skip comments
        time.sleep(0.15)
    assert joined(stream) == plain


def test_an_asynchronous_client(live: Live, scene: Image, other_scene: Image) -> None:
    async def converse() -> None:
        async with connect_async(live) as client:
            ask_both = [
                ask(client, asking(image_url(data_uri(image)), QUESTION), stream=streams)
                for image in (scene, other_scene)
                for streams in (False, True)
            ]
            whole, stream, other_whole, other_stream = await asyncio.gather(*ask_both)
            assert (said_by(whole), said_by(other_whole)) == (TRUTH, OTHER_TRUTH)
            assert joined([chunk async for chunk in stream]) == TRUTH
            assert joined([chunk async for chunk in other_stream]) == OTHER_TRUTH

    asyncio.run(converse())
