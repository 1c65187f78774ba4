"""The server's pictures: every form they come in, what is refused and where, and what it costs."""

from __future__ import annotations

import base64
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import FORMATS, SCENE, malformed
from offline import Network, only_loopback
from pictures import UPRIGHT, encode, exif
from reading import PROCESSOR, image, read, uri, user, visuals

from qwen3vl_mlx.asking import Look
from qwen3vl_mlx.errors import (
    ImageError,
    InputError,
    PromptError,
    TooLargeError,
    UnsupportedImageError,
)
from qwen3vl_mlx.media import load_image
from qwen3vl_mlx.processing.image import PixelBudget
from qwen3vl_mlx.processing.processor import DESKTOP_MAX_PIXELS
from qwen3vl_mlx.processing.template import part_kind
from qwen3vl_mlx.server import pictures
from qwen3vl_mlx.server.picture_parts import LOW_DETAIL_PIXELS, Wanted, find_wanted

PNG = encode(SCENE, "PNG")
B64 = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{B64}"
MALFORMED = malformed()
ENCODED = {form: encode(SCENE, form) for form in FORMATS}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
WHERE = r"^messages\[0\]\.content\[0\]\.image_url: "


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return only_loopback(monkeypatch, {})


def expected(data: bytes) -> str:
    return PROCESSOR.visual_input(load_image(data), PROCESSOR.image_budget()).identity


# ---- forms


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": {"url": URI, "detail": "auto"}},
        {"type": "image_url", "image_url": {"url": URI, "detail": None}},
        {"type": "image_url", "image_url": URI},
        {"type": "image", "image": URI},
        {"type": "image", "image_url": URI},
        {"type": "input_image", "image_url": URI, "detail": "auto"},
        {"image": URI},
        image(B64),
        image(f"\n{B64}\n"),
        image("data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)),
    ],
)
def test_forms_of_a_part(part: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, part]},
        {"role": "assistant", "content": None, "reasoning_content": "b"},
    ]
    before = repr(messages)
    answer = read(messages)
    assert repr(messages) == before
    assert [answer[0], answer[2]] == [messages[0], messages[2]]
    assert answer[1]["content"][0] == {"type": "text", "text": "a"}
    (visual,) = visuals(answer)
    assert visual.identity == expected(PNG)
    assert visuals(read(answer)) == [visual]  # what is cut stays


@pytest.mark.parametrize("orientation", list(UPRIGHT))
def test_pictures_are_turned_upright_each_by_itself(orientation: int) -> None:
    turned = encode(SCENE, "JPEG", exif=exif(orientation), quality=95)
    plain = encode(SCENE, "JPEG", quality=95)
    first, second = visuals(read(user(image(uri(turned)), image(uri(plain)))))
    assert first.identity == expected(turned)
    assert second.identity == expected(plain)


def test_videos_are_lists_of_frames() -> None:
    frames = [URI, B64, {"url": URI}, uri(encode(SCENE[::-1], "PNG"))]
    (visual,) = visuals(read(user({"type": "video", "video": frames, "fps": 4})))
    assert visual.kind == "video"
    assert visual.grid_thw[0] == 2
    assert visual.timestamps == (0.125, 0.625)
    frames[1] = "data:,nonsense"
    with pytest.raises(UnsupportedImageError, match=r"^messages\[0\]\.content\[0\]\.video\[1\]: "):
        read(user({"type": "video", "video": frames}))


# ---- sizes


@pytest.mark.parametrize(
    ("others", "look", "most", "budget"),
    [
        ({}, {}, None, (65536, DESKTOP_MAX_PIXELS)),
        ({"detail": "auto"}, {}, None, (65536, DESKTOP_MAX_PIXELS)),
        ({"detail": "low"}, {}, None, (65536, LOW_DETAIL_PIXELS)),
        ({"detail": "high"}, {}, None, (65536, 16777216)),
        ({"detail": "original"}, {}, None, (65536, 16777216)),
        ({}, {"max_pixels": "full"}, None, (65536, 16777216)),
        ({"detail": "low"}, {"max_pixels": "full"}, None, (65536, LOW_DETAIL_PIXELS)),
        ({"detail": "low"}, {"max_pixels": 100_000}, None, (65536, 100_000)),
        ({"detail": "low"}, {"max_pixels": 900_000}, None, (65536, LOW_DETAIL_PIXELS)),
        ({"detail": "high"}, {"max_pixels": 900_000}, None, (65536, 900_000)),
        ({}, {"min_pixels": 80_000, "max_pixels": 90_000}, None, (80_000, 90_000)),
        ({"min_pixels": 5000, "max_pixels": 6000}, {}, None, (5000, 6000)),
        ({"detail": "high", "max_pixels": 6000}, {"max_pixels": 900_000}, None, (6000, 6000)),
        ({}, {}, 300_000, (65536, 300_000)),
        ({"detail": "high"}, {}, 300_000, (65536, 300_000)),
        ({"max_pixels": 500_000}, {}, 300_000, (65536, 300_000)),
        ({}, {"max_pixels": "full"}, 30_000, (30_000, 30_000)),
    ],
)
def test_how_large_pictures_are_shown(
    others: dict[str, Any],
    look: dict[str, Any],
    most: int | None,
    budget: tuple[int, int],
) -> None:
    detail = {key: others[key] for key in others if key == "detail"}
    own = {key: others[key] for key in others if key != "detail"}
    messages = user({**image(URI, **detail), **own})
    ((_, _, wanted),) = find_wanted(messages, PROCESSOR, Look(**look), most)
    assert isinstance(wanted, Wanted)
    assert wanted.budget == PixelBudget(*budget)


def test_low_detail_is_never_more_than_the_default() -> None:
    small = replace(PROCESSOR.settings, image=PixelBudget(4096, 61440))
    ((_, _, wanted),) = find_wanted(
        user(image(URI, detail="low")), replace(PROCESSOR, settings=small), Look(), None
    )
    assert isinstance(wanted, Wanted)
    assert wanted.budget == PixelBudget(4096, 61440)


def test_videos_have_a_budget_for_all_frames() -> None:
    video = {"type": "video", "video": [URI] * 4}
    own = PROCESSOR.settings.video.max_pixels
    for part, most, pixels in (
        (video, None, own),
        ({**video, "max_pixels": 50_000}, None, 50_000),
        (video, 4096, 4 * 4096),
        (video, own, own),
    ):
        ((_, _, wanted),) = find_wanted(user(part), PROCESSOR, Look(), most)
        assert isinstance(wanted, Wanted)
        assert wanted.budget.max_pixels == pixels


# ---- what is refused, and where


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (image(URI, detail="huge"), r"\.image_url: detail is 'huge'"),
        (image(URI, detail=[]), r"\.image_url: detail is \[\]"),
        ({**image(URI), "min_pixels": 0}, r"\.image_url: min_pixels must be a positive"),
        ({**image(URI), "max_pixels": "9"}, r"\.image_url: max_pixels must be a positive"),
        ({**image(URI), "max_pixels": True}, r"\.image_url: max_pixels must be a positive"),
        ({**image(URI), "min_pixels": 99, "max_pixels": 9}, r"\.image_url: min_pixels \(99\)"),
        ({**image(URI), "min_pixels": 9_000_000}, r"\.image_url: min_pixels may be at most 800000"),
        ({"type": "image_url"}, r"\.image_url: the picture is missing or empty"),
        ({"type": "image_url", "image_url": {}}, r"\.image_url: the picture is missing or empty"),
        (image(""), r"\.image_url: the picture is missing or empty"),
        (image(" \n"), r"\.image_url: the picture is of type str"),
        ({"type": "image", "image": 7}, r"\.image: the picture is of type int"),
        ({"type": "image", "image": [URI]}, r"\.image: the picture is of type list"),
        ({"type": "input_image", "file_id": "x"}, r"\.image_url: the picture is missing or empty"),
        ({"type": "video", "video": URI}, r"\.video: a video is a list of its frames"),
        ({"type": "video_url", "video_url": {"url": URI}}, r"\.video_url: a video is a list"),
        ({"type": "video", "video": []}, r"\.video: a video needs at least one frame"),
        ({"type": "video", "video": [URI, 3]}, r"\.video: the picture is of type int"),
        ({"type": "video", "video": [URI], "fps": 0}, r"\.video: fps must be a number above 0"),
        ({"type": "video", "video": [URI], "fps": "2"}, r"\.video: fps must be a number above 0"),
        ({"type": "audio_url", "audio_url": URI}, r" is of unknown type 'audio_url'"),
        (image("ftp://127.0.0.1/a.png"), r"\.image_url: .* scheme cannot be read"),
        (image("javascript:alert(1)"), r"\.image_url: javascript:alert\(1\) is no URL"),
        (image("data:image/png;base64"), r"\.image_url: data URI .* has no comma"),
        (image("data:image/png;base64,A!B"), r"\.image_url: data URI .* not valid base64"),
        (image("data:," + "%" * (2**22 + 1)), r"\.image_url: data URI .* too many % escapes"),
        (image("http://127.0.0.1/a.png"), r"\.image_url: http://127.0.0.1/a.png is refused"),
        (image("http://[::ffff:127.0.0.1]/"), r"\.image_url: http://\[.*\]/ is refused"),
        (
            image("https://localhost/a?key=s3cret"),
            r"\.image_url: https://localhost/a\?\.\.\. is ref",
        ),
        (image("file://elsewhere/a.png"), r"\.image_url: .* names another host"),
    ],
)
def test_refusals_begin_with_the_place(part: dict[str, Any], says: str, network: Network) -> None:
    with pytest.raises(InputError, match=r"^messages\[1\]\.content\[1\]" + says) as caught:
        read(
            [{"role": "system", "content": "a"}, *user({"type": "text", "text": "b"}, part)],
            max_pixels=800_000,
        )
    assert network.connected == []
    assert "s3cret" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_wrong_messages_are_refused_before_anything_is_read(network: Network) -> None:
    for broken in ({"role": "user"}, {"role": "nobody", "content": ""}, "x", *user(7)[:1]):
        with pytest.raises(PromptError, match=r"^messages\[1\]"):
            read([*user(image("http://127.0.0.1/a.png")), broken], allow_private_urls=True)
    assert network.connected == []


@pytest.mark.parametrize("name", list(MALFORMED))
def test_malformed_files(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=WHERE) as caught:
        read(user(image(uri(MALFORMED[name]))))
    assert time.monotonic() - start < 5
    if name.endswith(("Gpixel", "Mpixel", "scans", "segments")):
        assert isinstance(caught.value, TooLargeError)


def test_each_kind_of_fault_has_its_error() -> None:
    for name, kind in (
        ("html", UnsupportedImageError),
        ("empty", UnsupportedImageError),
        ("JPEG half", ImageError),
        ("PNG of 4 Gpixel", TooLargeError),
    ):
        with pytest.raises(ImageError) as caught:
            read(user(image(uri(MALFORMED[name]))))
        assert type(caught.value) is kind


def test_the_frames_of_a_video_are_limited_together() -> None:
    """A frame is held at its full size until all are there, and a large one is a small file."""
    pixels, size = SCENE.shape[0] * SCENE.shape[1], len(PNG)
    video = {"type": "video", "video": [URI] * 8}
    read(user(video), max_image_pixels=4 * pixels, max_download_bytes=2 * size)
    with pytest.raises(TooLargeError, match=r"\.video\[7\]: .* over the limit of 4094"):
        read(user(video), max_image_pixels=4 * pixels - 1)
    with pytest.raises(TooLargeError, match=r"\.video: the frames are over"):
        read(user(video), max_download_bytes=2 * size - 1)


@pytest.mark.parametrize("form", FORMATS)
def test_the_pixel_limit_is_the_server_s(form: str) -> None:
    picture = image(uri(encode(SCENE, form)))
    read(user(picture), max_image_pixels=64 * 64)
    with pytest.raises(TooLargeError, match="64x64 = 4096 pixels, over the limit of 4095"):
        read(user(picture), max_image_pixels=64 * 64 - 1)


def test_pictures_are_counted_with_the_frames_of_videos() -> None:
    messages = user(image(URI), {"type": "video", "video": [URI] * 3}) + user(image(URI))
    read(messages, max_images=5)
    with pytest.raises(InputError, match=r"^messages hold 5 pictures.* takes 4 "):
        read(messages, max_images=4)
    read(read(messages) + user(image(URI)), max_images=1)  # those that were cut before are not


def test_all_pictures_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = user(image(URI), image(uri(encode(SCENE[::-1], "PNG"))))
    total = sum(visual.patches.nbytes for visual in visuals(read(messages)))
    monkeypatch.setattr(pictures, "_MOST_BYTES", total)
    read(messages)
    monkeypatch.setattr(pictures, "_MOST_BYTES", total - 1)
    with pytest.raises(TooLargeError, match=r"^messages hold"):
        read(messages)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([URI, B64, URI[:-90], "http://127.0.0.1/", "/etc/passwd", "low", "high"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["url", "detail", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
TYPES = ["image_url", "image", "input_image", "video", "video_url", "text", "x"]
KEYS = ["image", "image_url", "video", "text", "detail", "fps", "min_pixels", "max_pixels", "x"]


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
        | st.builds(
            lambda kind, rest: {"type": kind, **rest},
            st.sampled_from(TYPES),
            st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
        ),
        max_size=3,
    )
)
def test_whatever_a_part_is_it_is_read_or_refused(parts: list[dict[str, Any]]) -> None:
    refused = "messages[0].content"
    answer = None
    try:
        answer = read(user(*parts))
    except InputError as error:
        refused = str(error)
    assert refused.startswith("messages[0].content")
    if answer is not None:
        assert len(visuals(answer)) == sum(part_kind(part) != "text" for part in parts)


@settings(max_examples=100, deadline=None)
@given(form=st.sampled_from(FORMATS), data=st.data())
def test_damaged_files_are_read_or_refused(form: str, data: st.DataObject) -> None:
    whole = bytearray(ENCODED[form])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(whole) - 1))
        whole[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with suppress(ImageError):
        (visual,) = visuals(read(user(image(uri(bytes(whole)))), max_image_pixels=10**6))
        assert visual.num_tokens
