"""`python -m qwen3vl_mlx.generate`: one prompt, some pictures, one streamed answer on stdout."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx import cli

if TYPE_CHECKING:
    from qwen3vl_mlx.engine.engine import EngineOptions
    from qwen3vl_mlx.engine.output import Chunk, Usage

DEFAULT_PROMPT = "Describe the image."
DEFAULT_PROMPT_SEVERAL = "Describe the images."

_NOTES = {
    "timeout": "the answer was cut off by --timeout",
    "repetition": "the answer was cut off because it repeated itself",
    "constraint": "the answer ended where it could not follow the grammar any more",
}

_EPILOG = """examples:
  python -m qwen3vl_mlx.generate --image photo.jpg
  python -m qwen3vl_mlx.generate --image a.png --image b.png --prompt "What changed?"
  echo "Read the text." | python -m qwen3vl_mlx.generate --image page.heic --prompt -
  python -m qwen3vl_mlx.generate --model demo --image scene.png --json

The answer goes to stdout, everything else to stderr. Exit status: 0 answered, 1 the checkpoint,
the Hub or the machine failed, 2 bad input, 130 interrupted, 141 the reader closed stdout.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Ask a Qwen3-VL model about pictures, or without any.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model",
        metavar="NAME",
        help='folder, Hub id or "demo" (default: $QWEN3VL_MODEL, else the 4-bit 4B Instruct '
        "model of mlx-community, downloaded once)",
    )
    p.add_argument("--revision", help="branch, tag or commit of a Hub model")
    p.add_argument(
        "-i",
        "--image",
        action="append",
        default=[],
        metavar="IMAGE",
        help="path, URL, data URI or base64; repeat for several, shown in this order",
    )
    p.add_argument(
        "-p",
        "--prompt",
        help='question; "-" reads stdin, as does leaving out both prompt and image '
        "(default: describe the image)",
    )
    p.add_argument("--system", help="system message")
    out = p.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object at the end")
    out.add_argument("-v", "--verbose", action="store_true", help="statistics and any reasoning")
    out.add_argument("--debug", action="store_true", help="show tracebacks")
    cli.add_quantize(p)
    pixels = p.add_argument_group("resolution, per image; 1,024 pixels make one visual token")
    pixels.add_argument("--min-pixels", type=int, metavar="N", help="enlarge to at least this")
    pixels.add_argument(
        "--max-pixels", type=int, metavar="N", help="shrink to at most this (default 2,621,440)"
    )
    pixels.add_argument(
        "--full-resolution", action="store_true", help="up to the checkpoint's own limit"
    )
    pixels.add_argument(
        "--number-images", action="store_true", help='write "Picture N:" before each image'
    )
    _add_sampling(p.add_argument_group("sampling (defaults: the checkpoint's)"))
    _add_form(p.add_argument_group("form of the answer (JSON and grammars hold to the letter)"))
    _add_engine(p.add_argument_group("speed and memory"))
    return p


def _add_sampling(group: argparse._ArgumentGroup) -> None:
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


def _add_form(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument("--schema", metavar="JSON", help="JSON schema: a file, or the schema itself")
    which.add_argument("--json-object", action="store_true", help="any JSON object")
    which.add_argument("--regex", metavar="REGEX", help="a regular expression")
    which.add_argument("--lark", metavar="FILE", help="a Lark grammar")
    group.add_argument(
        "--thinking-budget", type=int, metavar="N", help="close the thought after N tokens"
    )
    group.add_argument(
        "--loop-guard", action="store_true", help="end an answer that repeats itself for ever"
    )
    group.add_argument(
        "--top-logprobs", type=int, metavar="K", help="with --json: K likeliest tokens per step"
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cache-folder",
        metavar="DIR",
        help="keep what was read here: the next question about a picture starts at once",
    )
    guess = group.add_mutually_exclusive_group()
    guess.add_argument(
        "--lookup",
        action="store_true",
        help="guess ahead from what was said before: faster where an answer copies its prompt",
    )
    guess.add_argument(
        "--draft",
        metavar="NAME",
        help="guess ahead with a smaller checkpoint of the family; no guess changes an answer",
    )
    group.add_argument("--kv-bits", type=int, choices=(4, 8), help="keys and values in fewer bits")
    group.add_argument("--timeout", type=float, metavar="S", help="end the answer after S seconds")


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.generate") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: answer(args), debug=args.debug)


def answer(args: argparse.Namespace) -> None:
    """Answer once, as `args` say. Raises Qwen3VLError."""
    from qwen3vl_mlx.errors import InputError
    from qwen3vl_mlx.media import load_image

    if args.full_resolution and args.max_pixels is not None:
        raise InputError("--full-resolution and --max-pixels exclude each other")
    if args.top_logprobs is not None and not args.json:
        raise InputError("--top-logprobs shows in --json only: give both")
    prompt = read_prompt(args.prompt, len(args.image))
    images = [load_image(source) for source in args.image]  # before the weights: fail early

    from qwen3vl_mlx.api import load
    from qwen3vl_mlx.conversation import as_messages
    from qwen3vl_mlx.engine.sampling import SamplingParams

    sampling = {
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
        "top_logprobs": args.top_logprobs,
        "logprobs": None if args.top_logprobs is None else True,
        "loop_guard": args.loop_guard or None,
        "ignore_eos": args.ignore_eos or None,
        "dry_multiplier": args.dry_multiplier,
        "logit_bias": logit_bias(args.logit_bias),
    }
    SamplingParams().updated(sampling)  # before the weights too
    form = answer_form(args)
    model = load(
        args.model,
        quantize=args.quantize,
        topology=args.topology,
        revision=args.revision,
        engine=engine_options(args),
        draft=args.draft,
        progress=True,
    )
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    chunks = model.stream(
        [*system, *as_messages(prompt, images, ())],
        min_pixels=args.min_pixels,
        max_pixels="full" if args.full_resolution else args.max_pixels,
        add_vision_id=args.number_images,
        timeout=args.timeout,
        sampling=sampling,
        **form,
    )
    printer = Printer(args)
    try:
        for chunk in chunks:
            printer.show(chunk)
    finally:
        printer.erase_note()


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """One answer needs no cache in memory, unless the next command is to find it on disk."""
    from qwen3vl_mlx.engine.engine import EngineOptions

    folder = None if args.cache_folder is None else Path(args.cache_folder).expanduser()
    options = EngineOptions(
        kv_bits=args.kv_bits,
        feature_cache_bytes=0,
        cache_folder=folder,
        speculative="lookup" if args.lookup else None,
    )
    return options if folder is not None else replace(options, prefix_cache_bytes=0)


def answer_form(args: argparse.Namespace) -> dict[str, Any]:
    """What the options ask of the answer's text, as `Qwen3VL.stream` takes it."""
    from qwen3vl_mlx.engine.grammar import parse_grammar

    response_format: dict[str, Any] | None = None
    grammar: dict[str, Any] | None = None
    if args.schema is not None:
        is_file = not args.schema.lstrip().startswith("{")
        text = read_text("--schema", args.schema) if is_file else args.schema
        grammar = {"type": "json_schema", "value": text}
    elif args.json_object:
        response_format = {"type": "json_object"}
    elif args.regex is not None:
        grammar = {"type": "regex", "value": args.regex}
    elif args.lark is not None:
        grammar = {"type": "lark", "value": read_text("--lark", args.lark)}
    parse_grammar(response_format, grammar)  # before the weights
    return {"response_format": response_format, "grammar": grammar}


def logit_bias(given: Sequence[str] | None) -> dict[int, float] | None:
    """--logit-bias as the library takes it. Raises InputError naming the option."""
    from qwen3vl_mlx.errors import InputError

    if given is None:
        return None
    try:
        pairs = [text.split("=") for text in given]
        return {int(token): float(value) for token, value in pairs}
    except ValueError as error:
        raise InputError(f"--logit-bias takes ID=X, such as 17=-5, got {given}") from error


def read_text(option: str, name: str) -> str:
    """A text file's content. Raises InputError naming the option."""
    from qwen3vl_mlx.errors import InputError

    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option}: {name} cannot be read: {error}") from error


def read_prompt(given: str | None, num_images: int) -> str:
    """The prompt from the option, stdin, or the default for pictures alone.

    With pictures stdin is read only when asked for: in a shell loop it holds the loop's own input.
    Raises InputError where there is neither prompt nor picture.
    """
    from qwen3vl_mlx.errors import InputError

    prompt = given
    if given == "-" or (given is None and num_images == 0 and _is_piped(sys.stdin)):
        prompt = sys.stdin.read().strip()
    if prompt:
        return prompt
    if given not in (None, "-"):
        raise InputError("--prompt is empty")
    if num_images == 0:
        raise InputError("nothing to answer: give --image, --prompt or both")
    return DEFAULT_PROMPT if num_images == 1 else DEFAULT_PROMPT_SEVERAL


def _is_piped(stream: object) -> bool:
    """Whether stdin is a pipe or a file: a terminal or /dev/null has no prompt to read."""
    try:
        mode = os.fstat(stream.fileno()).st_mode  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


class Printer:
    """Writes chunks as they come: answer to stdout; reasoning, notes and numbers to stderr."""

    def __init__(self, args: argparse.Namespace):
        self.json, self.verbose = args.json, args.verbose
        self.chunks: list[Chunk] = []
        self.waiting = sys.stderr.isatty()
        self.ends_line = True
        if self.waiting:
            names = ", ".join(Path(source).name[:40] for source in args.image) or "the prompt"
            sys.stderr.write(f"Reading {names} ...")
            sys.stderr.flush()

    def erase_note(self) -> None:
        if self.waiting:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self.waiting = False

    def show(self, chunk: Chunk) -> None:
        self.erase_note()
        self.chunks.append(chunk)
        if chunk.reasoning and self.verbose:
            sys.stderr.write(chunk.reasoning)
            sys.stderr.flush()
        if chunk.text and not self.json:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            self.ends_line = chunk.text.endswith("\n")
        if chunk.finish_reason:
            self._end(chunk)

    def _end(self, last: Chunk) -> None:
        from qwen3vl_mlx.engine.output import collect

        completion = collect(self.chunks)
        if self.json:
            print(json.dumps(completion.to_dict(), ensure_ascii=False))
        elif not self.ends_line:
            print(flush=True)
        if not last.reasoning_closed:
            print(
                "note: the answer ended before the model had finished thinking "
                f"({last.finish_reason}); raise --max-tokens",
                file=sys.stderr,
            )
        if last.finish_reason in _NOTES:
            print(f"note: {_NOTES[last.finish_reason]}", file=sys.stderr)
        if self.verbose and last.usage is not None:
            print(f"\n{statistics(last.usage)}", file=sys.stderr)


def statistics(usage: Usage) -> str:
    """Three lines for people."""
    guessed = ""
    if usage.drafted_tokens:
        guessed = f", {usage.accepted_tokens} of {usage.drafted_tokens} guesses right"
    return (
        f"prompt:     {usage.prompt_tokens} tokens, first token after "
        f"{usage.time_to_first_token_sec:.2f} s, {usage.avg_prompt_tok_per_sec:.1f} tokens/s\n"
        f"generation: {usage.completion_tokens} tokens, "
        f"{usage.avg_compl_tok_per_sec:.1f} tokens/s{guessed}\n"
        f"memory:     {usage.peak_memory_bytes / 1e9:.3f} GB at peak"
    )


if __name__ == "__main__":
    sys.exit(main())
