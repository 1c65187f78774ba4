"""What all commands that ask a question share: sampling, resolution, form of the answer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3vl_mlx.errors import InputError


def add_pixels(parser: argparse.ArgumentParser) -> None:
    """How large pictures are shown to the model."""
    group = parser.add_argument_group("resolution, per image; 1,024 pixels make one visual token")
    group.add_argument("--min-pixels", type=int, metavar="N", help="enlarge to at least this")
    group.add_argument(
        "--max-pixels", type=int, metavar="N", help="shrink to at most this (default 2,621,440)"
    )
    group.add_argument(
        "--full-resolution", action="store_true", help="up to the checkpoint's own limit"
    )
    group.add_argument(
        "--number-images", action="store_true", help='write "Picture N:" before each image'
    )


def pixels_of(args: argparse.Namespace) -> dict[str, Any]:
    """min_pixels and max_pixels as the library takes them. Raises InputError."""
    if args.full_resolution and args.max_pixels is not None:
        raise InputError("--full-resolution and --max-pixels exclude each other")
    return {
        "min_pixels": args.min_pixels,
        "max_pixels": "full" if args.full_resolution else args.max_pixels,
    }


def add_sampling(group: argparse._ArgumentGroup) -> None:
    """Which tokens are chosen, and where the answer ends."""
    group.add_argument("--max-tokens", type=int, metavar="N", help="end the answer after N tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="over prompt and answer"
    )
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="over the answer")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="over the answer")
    group.add_argument(
        "--dry-multiplier", type=float, metavar="X", help="DRY: against repeated phrases (0.8)"
    )
    group.add_argument(
        "--logit-bias", action="append", metavar="ID=X", help="add X to a token's logit; repeat"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on to --max-tokens, past the answer's end"
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; repeat")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed, the same answer")


def add_form(group: argparse._ArgumentGroup) -> None:
    """What the answer's text must be, and bounds of the thought before it."""
    which = group.add_mutually_exclusive_group()
    which.add_argument("--schema", metavar="JSON", help="JSON schema: a file, or the schema itself")
    which.add_argument("--json-object", action="store_true", help="any JSON object")
    which.add_argument("--regex", metavar="REGEX", help="a regular expression")
    which.add_argument("--lark", metavar="FILE", help="a Lark grammar")
    add_bounds(group)


def add_bounds(group: argparse._ArgumentGroup) -> None:
    """Where a thought, or an answer that goes astray, is ended."""
    group.add_argument(
        "--thinking-budget", type=int, metavar="N", help="close the thought after N tokens"
    )
    group.add_argument(
        "--loop-guard", action="store_true", help="end an answer that repeats itself for ever"
    )


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The wishes of `add_sampling` and `add_bounds` by the names of SamplingParams.

    None where unset. Raises InputError.
    """
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "frequency_penalty": args.frequency_penalty,
        "presence_penalty": args.presence_penalty,
        "stop": args.stop,
        "seed": args.seed,
        "thinking_budget": args.thinking_budget,
        "loop_guard": args.loop_guard or None,
        "ignore_eos": args.ignore_eos or None,
        "dry_multiplier": args.dry_multiplier,
        "logit_bias": logit_bias(args.logit_bias),
    }


def logit_bias(given: Sequence[str] | None) -> dict[int, float] | None:
    """--logit-bias as the library takes it. Raises InputError naming the option."""
    if given is None:
        return None
    try:
        pairs = [text.split("=") for text in given]
        return {int(token): float(value) for token, value in pairs}
    except ValueError as error:
        raise InputError(f"--logit-bias takes ID=X, such as 17=-5, got {given}") from error


def form_of(args: argparse.Namespace) -> dict[str, Any]:
    """response_format and grammar of `add_form`, as `Qwen3VL.stream` takes them.

    Raises InputError for files that cannot be read; the grammar itself is not read yet.
    """
    response_format: dict[str, Any] | None = None
    grammar: dict[str, Any] | None = None
    if args.schema is not None:
        grammar = {"type": "json_schema", "value": schema_text(args.schema)}
    elif args.json_object:
        response_format = {"type": "json_object"}
    elif args.regex is not None:
        grammar = {"type": "regex", "value": args.regex}
    elif args.lark is not None:
        grammar = {"type": "lark", "value": read_text("--lark", args.lark)}
    return {"response_format": response_format, "grammar": grammar}


def schema_text(given: str) -> str:
    """--schema: a file's text, or the schema itself. Raises InputError."""
    return given if given.lstrip().startswith("{") else read_text("--schema", given)


def read_text(option: str, name: str) -> str:
    """A text file's content. Raises InputError naming the option."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option}: {name} cannot be read: {error}") from error


def default_prompt(num_images: int) -> str:
    """What is asked about pictures that come without a question."""
    return "Describe the image." if num_images == 1 else "Describe the images."
