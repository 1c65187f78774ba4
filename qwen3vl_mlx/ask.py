"""`qwen3vl ask "What is this?" photo.heic`: one question from a script or a Shortcut."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx import cli, question_options
from qwen3vl_mlx.answering import (
    Answerer,
    Question,
    RemoteAnswerer,
    add_source,
    chosen_server,
    load_answerer,
)
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.printing import Printer

if TYPE_CHECKING:
    from qwen3vl_mlx.media import ImageSource

_EPILOG = """examples:
  qwen3vl ask "What is this?" photo.heic
  qwen3vl ask photo.jpg                            describes it
  qwen3vl ask "What changed?" before.png after.png
  cat page.png | qwen3vl ask "Read the text." -
  screencapture -ic && qwen3vl ask --clipboard "What does this error mean?"
  qwen3vl ask --schema receipt.json "What was bought?" receipt.jpg
  qwen3vl ask --regex '[0-9]+[.][0-9]{2}' "What is the total?" receipt.jpg
  pbpaste | qwen3vl ask --prompt - notes.png       the question from stdin

A server that runs on this machine answers at once, without loading the model:
  qwen3vl serve --socket

The answer goes to stdout, everything else to stderr. Exit status: 0 answered, 1 the checkpoint,
the server or the machine failed, 2 bad input, 130 interrupted, 141 the reader closed stdout.
"""

_STARTS = ("http://", "https://", "file:", "data:")
_SUFFIX = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif|hei[cf])$", re.IGNORECASE)


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Ask one question about pictures, or without any.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "words",
        nargs="*",
        metavar="QUESTION|PICTURE",
        help='the question, then paths or URLs of pictures; "-" is a picture on stdin',
    )
    p.add_argument(
        "-i", "--image", action="append", default=[], metavar="PICTURE", help="one more; repeat"
    )
    p.add_argument("-c", "--clipboard", action="store_true", help="the picture on the clipboard")
    p.add_argument(
        "-p", "--prompt", help='the question, where all words are pictures; "-" reads stdin'
    )
    p.add_argument("--system", help="system message")
    out = p.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object at the end")
    out.add_argument("-q", "--quiet", action="store_true", help="nothing but the answer and errors")
    out.add_argument("-v", "--verbose", action="store_true", help="statistics and any reasoning")
    out.add_argument("--debug", action="store_true", help="show tracebacks")
    add_source(p)
    question_options.add_sampling(p.add_argument_group("sampling (defaults: the checkpoint's)"))
    question_options.add_form(
        p.add_argument_group("form of the answer (JSON and grammars hold to the letter)")
    )
    question_options.add_pixels(p)
    p.add_argument("--timeout", type=float, metavar="S", help="end the answer after S seconds")
    return p


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.ask") -> int:
    """Run the command. Returns the exit status."""
    # Options may stand between the words, as in `ask --json "What?" a.png --seed 1 b.png`.
    args = parser(prog).parse_intermixed_args(argv)
    return cli.run(lambda: ask(args), debug=args.debug)


def ask(args: argparse.Namespace) -> None:
    """Ask once, as `args` say. Raises Qwen3VLError."""
    if args.quiet and args.verbose:
        raise InputError("--quiet and --verbose exclude each other")
    question = read_question(args)
    server = chosen_server(args)
    answerer: Answerer
    if server is not None:
        answerer = RemoteAnswerer(server, at_once=1)
    else:
        question = checked(question)  # before the weights: fail early
        answerer = load_answerer(args, at_once=1)
    printer = Printer(
        [Path(name).name for name in (*args.image, *args.words[1:])],
        as_json=args.json,
        verbose=args.verbose,
        quiet=args.quiet,
    )
    try:
        with answerer.stream(question) as chunks:
            for chunk in chunks:
                printer.show(chunk)
        if question.grammar is not None or question.response_format is not None:
            printer.check_whole()
    finally:
        printer.erase_note()
        answerer.close()


def read_question(args: argparse.Namespace) -> Question:
    """What is asked, with stdin and the clipboard read. Raises InputError."""
    words = list(args.words)
    prompt: str | None = args.prompt
    if prompt is None and words and not _is_picture(words[0]):
        prompt = words.pop(0)
    sources = [*args.image, *words]
    if (prompt == "-") + sources.count("-") > 1:
        raise InputError('stdin holds one thing: give "-" once')
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt.strip():
        raise InputError("the question is empty; leave it out to have the picture described")
    images: list[ImageSource] = [_picture(source) for source in sources]
    if args.clipboard:
        from qwen3vl_mlx.media_clipboard import clipboard_image

        images.append(clipboard_image())
    if prompt is None:
        if not images:
            raise InputError("nothing to answer: give a question, a picture or both (see --help)")
        prompt = question_options.default_prompt(len(images))
    elif not images and _SUFFIX.search(prompt):
        raise InputError(
            f"{prompt!r} ends as a picture's name, and no such picture was given; give it as a "
            "word of its own after the question"
        )
    return Question(
        prompt,
        tuple(images),
        args.system,
        question_options.sampling_of(args),
        **question_options.form_of(args),
        **question_options.pixels_of(args),
        number_images=args.number_images,
        timeout=args.timeout,
    )


def _is_picture(word: str) -> bool:
    """Whether a first word is a picture and no question: nobody asks with a file's name.

    One that is not there is a picture too: its error says more than an answer to its name.
    """
    one_word = not any(character.isspace() for character in word)
    if one_word and (word == "-" or word.lower().startswith(_STARTS) or _SUFFIX.search(word)):
        return True
    try:
        return Path(word).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # too long, unknown ~user, a null character
        return False


def _picture(source: str) -> ImageSource:
    """A picture of the command line: stdin read, a path seen to be there. Raises InputError."""
    if source == "-":
        return _from_stdin()
    if source.lower().startswith(_STARTS):
        return source
    path = Path(source)
    try:
        there = path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, unknown ~user, a null character
        there = False
    if not there:
        raise InputError(
            f"no such file: {source[:200]}; the question comes first, then pictures by path or "
            "URL, in quotes where a path has spaces"
        )
    return path


def _from_stdin() -> bytes:
    if sys.stdin.isatty():
        raise InputError('"-" reads a picture from stdin: cat a.png | qwen3vl ask "..." -')
    data = sys.stdin.buffer.read()
    if not data:
        raise InputError('"-": stdin is empty, and a picture was expected there')
    return data


def checked(question: Question) -> Question:
    """The same, with pictures decoded and options seen to be sound. Raises InputError."""
    from dataclasses import replace

    from qwen3vl_mlx.engine.grammar import parse_grammar
    from qwen3vl_mlx.engine.sampling import SamplingParams
    from qwen3vl_mlx.media import load_image

    SamplingParams().updated(question.sampling)
    parse_grammar(question.response_format, question.grammar)
    return replace(question, images=tuple(load_image(image) for image in question.images))


if __name__ == "__main__":
    sys.exit(main())
