"""`python -m qwen3vl_mlx.generate`: one prompt, some pictures, one streamed answer on stdout."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx import cli, question_options

if TYPE_CHECKING:
    from qwen3vl_mlx.engine.engine import EngineOptions

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
    question_options.add_pixels(p)
    question_options.add_sampling(p.add_argument_group("sampling (defaults: the checkpoint's)"))
    form = p.add_argument_group("form of the answer (JSON and grammars hold to the letter)")
    question_options.add_form(form)
    form.add_argument(
        "--top-logprobs", type=int, metavar="K", help="with --json: K likeliest tokens per step"
    )
    _add_engine(p.add_argument_group("speed and memory"))
    return p


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

    pixels = question_options.pixels_of(args)
    if args.top_logprobs is not None and not args.json:
        raise InputError("--top-logprobs shows in --json only: give both")
    prompt = read_prompt(args.prompt, len(args.image))
    images = [load_image(source) for source in args.image]  # before the weights: fail early

    from qwen3vl_mlx.api import load
    from qwen3vl_mlx.conversation import as_messages
    from qwen3vl_mlx.engine.grammar import parse_grammar
    from qwen3vl_mlx.engine.sampling import SamplingParams
    from qwen3vl_mlx.printing import Printer

    sampling = question_options.sampling_of(args) | {
        "top_logprobs": args.top_logprobs,
        "logprobs": None if args.top_logprobs is None else True,
    }
    SamplingParams().updated(sampling)  # before the weights too
    form = question_options.form_of(args)
    parse_grammar(form["response_format"], form["grammar"])  # before the weights
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
        **pixels,
        add_vision_id=args.number_images,
        timeout=args.timeout,
        sampling=sampling,
        **form,
    )
    names = [Path(source).name for source in args.image]
    printer = Printer(names, as_json=args.json, verbose=args.verbose)
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
    return question_options.default_prompt(num_images)


def _is_piped(stream: object) -> bool:
    """Whether stdin is a pipe or a file: a terminal or /dev/null has no prompt to read."""
    try:
        mode = os.fstat(stream.fileno()).st_mode  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


if __name__ == "__main__":
    sys.exit(main())
