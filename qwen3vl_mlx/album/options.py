"""Options that `caption` and `watch` share, and the task they make."""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_mlx import question_options
from qwen3vl_mlx.album.describing import Task
from qwen3vl_mlx.album.finding import Selection, checked_pattern
from qwen3vl_mlx.album.template import COUNTING, VARIABLES, read_template
from qwen3vl_mlx.errors import InputError

MAX_TOKENS = 4096
AT_ONCE = 8


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which files are meant."""
    group = parser.add_argument_group("which pictures")
    group.add_argument("-r", "--recursive", action="store_true", help="folders in folders too")
    group.add_argument(
        "--glob",
        action="append",
        default=[],
        metavar="PATTERN",
        help='such as "IMG_*", "*.heic" or "2024/*"; repeat for several, in any case of letters '
        "(default, and for patterns without an ending: names that end as those of JPEG, PNG, WebP, "
        "GIF, BMP, TIFF, AVIF and HEIC do)",
    )
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out files and folders; repeat for several",
    )


def add_question(parser: argparse.ArgumentParser) -> None:
    """What is asked, and where answers go."""
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help='question, or @FILE to read it from there (default: "Describe the image."); '
        "variables in it are filled, see below",
    )
    group.add_argument("--system", metavar="TEXT", help="system message, or @FILE")
    group.add_argument(
        "--schema",
        metavar="JSON",
        help="JSON schema that every answer follows: a file, or the schema itself",
    )
    group.add_argument(
        "--timeout", type=float, metavar="S", help="give up on a picture after S seconds"
    )


def add_output(group: argparse._ArgumentGroup) -> None:
    """Where answers go."""
    group.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        help='NAME.jsonl, NAME.csv, or "sidecar": photo.jpg.txt (photo.jpg.json with --schema) '
        "beside each picture (default: JSON Lines on stdout)",
    )
    group.add_argument(
        "--at-once",
        type=int,
        default=AT_ONCE,
        metavar="N",
        help=f"pictures under way at the same time (default {AT_ONCE})",
    )
    group.add_argument("--quiet", action="store_true", help="on stderr failures only")
    group.add_argument("-v", "--verbose", action="store_true", help="a line for every picture")
    group.add_argument("--debug", action="store_true", help="show tracebacks")


def add_answer(parser: argparse.ArgumentParser) -> None:
    """How answers are made."""
    question_options.add_pixels(parser)
    group = parser.add_argument_group("sampling (defaults: the checkpoint's)")
    question_options.add_sampling(group)
    question_options.add_bounds(group)
    parser.set_defaults(max_tokens=MAX_TOKENS)


def variables_help(*, counting: bool) -> str:
    """A line for each variable of a prompt."""
    known = [name for name in VARIABLES if counting or name not in COUNTING]
    return "\n".join(f"  {{{name}}}".ljust(15) + VARIABLES[name][0] for name in known)


def selection_of(args: argparse.Namespace) -> Selection:
    """What `add_selection` was told. Raises InputError."""
    globs, excludes = (
        tuple(checked_pattern(option, text, recursive=args.recursive) for text in given)
        for option, given in (("--glob", args.glob), ("--exclude", args.exclude))
    )
    return Selection(globs, excludes, args.recursive)


def task_of(args: argparse.Namespace, *, counting: bool) -> Task:
    """What is asked, all checked that can be without the model. Raises InputError.

    counting: whether the prompt may say how many pictures there are.
    """
    from qwen3vl_mlx.asking import check_timeout
    from qwen3vl_mlx.engine.grammar import parse_grammar
    from qwen3vl_mlx.engine.sampling import SamplingParams

    if args.at_once < 1:
        raise InputError(f"--at-once must be at least 1, got {args.at_once}")
    text = _text("--prompt", args.prompt, question_options.default_prompt(1))
    template = read_template(text, counting=counting)
    if not text.strip():
        raise InputError("--prompt is empty")
    pixels = question_options.pixels_of(args) | {"number_images": args.number_images}
    sampling = question_options.sampling_of(args)
    SamplingParams().updated(sampling)
    check_timeout(args.timeout)
    schema = None if args.schema is None else _schema(args.schema)
    if schema is not None:
        parse_grammar(None, {"type": "json_schema", "value": schema})
    system = None if args.system is None else _text("--system", args.system, "")
    asked = {"prompt": text, "system": system, "schema": schema, **pixels}
    settings = _fingerprint(asked | sampling | _model(args))
    return Task(template, settings, system, schema, sampling, pixels, args.timeout)


def silence_pillow() -> None:
    """Keep Pillow's remarks on odd EXIF out of the terminal, before threads read pictures."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _text(option: str, given: str | None, default: str) -> str:
    if given is None:
        return default
    if not given.startswith("@"):
        return given
    return question_options.read_text(option, given[1:]).strip()


def _schema(given: str) -> dict[str, Any]:
    try:
        schema = json.loads(question_options.schema_text(given))
    except (ValueError, RecursionError) as error:
        raise InputError(f"--schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise InputError("--schema must be a JSON object that describes the answer")
    return schema


def _model(args: argparse.Namespace) -> dict[str, Any]:
    """Which model is wanted. Whether a server or this process runs it makes no difference."""
    name = args.model or _default_model(args)
    folder = Path(name).expanduser()
    topology = args.topology and question_options.read_text("--topology", args.topology)
    return {
        "model": str(folder.resolve()) if folder.is_dir() else name,
        "revision": args.revision,
        "quantize": args.quantize,
        "topology": topology,
    }


def _default_model(args: argparse.Namespace) -> str:
    """What answers where no model is named: the server's, if one runs."""
    from qwen3vl_mlx import client, hub
    from qwen3vl_mlx.answering import chosen_server

    default, server = hub.default_model(), chosen_server(args)
    if server is None:
        return default
    served = client.served_models(server)
    return default if default in served else served[0]


def _fingerprint(values: Mapping[str, Any]) -> str:
    """A digest of all that is not left at its default: a later default is none that was chosen."""
    chosen = {
        name: value for name, value in values.items() if value is not None and value is not False
    }
    text = json.dumps(chosen, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
