"""`python -m qwen3vl_mlx.evaluate`: what quantization cost a checkpoint, measured on pictures.

Each checkpoint is compared with the source it was made from: KL divergence of the next-token
distributions, agreement of the likeliest token, perplexity, size.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx import cli

if TYPE_CHECKING:
    from qwen3vl_mlx.quant.evaluate import Quality

_EPILOG = """examples:
  python -m qwen3vl_mlx.evaluate my-4bit --source Qwen/Qwen3-VL-4B-Instruct --images ~/Pictures
  python -m qwen3vl_mlx.evaluate demo-2bit demo-4bit --source demo --tasks 200
  python -m qwen3vl_mlx.evaluate rtn=a/4bit awq=b/4bit --source demo --plot quality.png
  python -m qwen3vl_mlx.evaluate --sweep --source demo --tasks 100 --plot quality.png

columns:
  bits       per weight, over all of the checkpoint
  KL         mean KL divergence of the checkpoint's next-token distributions from the
             source's, in nats per answer token, with its standard error
  agreement  share of answer tokens for which both find the same token likeliest
  perplexity of the answers' tokens; the source's own stands above the table
  right      share of the demo's held-out questions answered rightly (--tasks)
  same       share of them answered word for word as the source does (--tasks)

The models run layer by layer and are never in memory in full, except to answer --tasks and, for
the source or --answers, questions about --images.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Compare quantized checkpoints with the one they were made from.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "checkpoints",
        nargs="*",
        metavar="[METHOD=]CHECKPOINT",
        help="folder or Hub id, behind the name of its line in the plot, if you like",
    )
    p.add_argument(
        "--source", required=True, metavar="NAME", help='folder, Hub id or "demo": the original'
    )
    p.add_argument(
        "--images",
        metavar="FOLDER",
        help="ask about the pictures in this folder (default: drawn scenes with known answers)",
    )
    p.add_argument(
        "--answers",
        metavar="NAME",
        help="the checkpoint whose answers about --images are compared; a smaller one, where the "
        "source does not fit into memory (default: the source)",
    )
    p.add_argument(
        "--examples", type=int, default=32, metavar="N", help="questions to compare (default 32)"
    )
    p.add_argument(
        "--tasks",
        type=int,
        default=0,
        metavar="N",
        help="ask N held-out questions too, and judge the answers; only of use to the demo",
    )
    p.add_argument("--plot", metavar="FILE.png", help="draw KL against bits per weight")
    p.add_argument(
        "--card", action="store_true", help="write the numbers into each checkpoint's README.md"
    )
    sweep = p.add_argument_group("sweep: make the checkpoints too, in a temporary folder")
    sweep.add_argument(
        "--sweep",
        nargs="?",
        const="",
        metavar="NAMES",
        help="quantize the source to NAMES (default 2bit,3bit,4bit,mxfp4,nvfp4,6bit,8bit), rounded "
        "to nearest and calibrated on drawn scenes to the same bits per weight",
    )
    sweep.add_argument(
        "--compare-mlx-vlm",
        metavar="PYTHON",
        help="and with mlx-vlm's converter, under an interpreter that has it",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.evaluate") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> None:
    """Measure as `args` say and print. Raises Qwen3VLError."""
    check(args)
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.quant.evaluate import (
        check_comparable,
        check_plot,
        evaluate,
        plot,
        write_card,
    )
    from qwen3vl_mlx.quant.examples import EVALUATION_SEED, make_examples

    source = hub.resolve(args.source)
    if args.plot is not None:
        check_plot(Path(args.plot))
    with ExitStack() as stack:
        if args.sweep is not None:
            temporary = stack.enter_context(TemporaryDirectory(prefix="qwen3vl-"))
            made = sweep(args, source, Path(temporary))
        else:
            named = [split_label(text) for text in args.checkpoints]
            made = [(method, shown_name(name), hub.resolve(name)) for method, name in named]
        for _, _, folder in made:
            check_comparable(source, folder)
        examples = make_examples(
            source,
            args.images,
            args.examples,
            first_seed=EVALUATION_SEED,
            answers=args.answers,
        )
        folders = [folder for _, _, folder in made]
        measured = evaluate(source, folders, examples, questions=args.tasks, progress=True)
    found = [replace(q, name=name) for q, (_, name, _) in zip(measured, made, strict=True)]
    methods = [method for method, _, _ in made]
    if args.plot is not None:
        plot(lines_of(methods, found), Path(args.plot))
    if args.card:
        for folder, quality in zip(folders, found, strict=True):
            write_card(folder, quality)
    report = make_report(shown_name(args.source), source, methods, found)
    print(json.dumps(report) if args.json else table(report))


def check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before any work. Raises InputError."""
    from qwen3vl_mlx.errors import InputError
    from qwen3vl_mlx.quant.recipes import parse_preset

    for option, least in (("examples", 2), ("tasks", 0)):
        if (value := vars(args)[option]) < least:
            raise InputError(f"--{option} must be at least {least}, got {value}")
    if args.answers is not None and args.images is None:
        raise InputError("--answers says who answers about --images; give a folder of pictures")
    if args.images is not None and not Path(args.images).expanduser().is_dir():
        raise InputError(f"--images: no folder {args.images}; give one that holds pictures")
    if args.sweep is None and not args.checkpoints:
        raise InputError("give checkpoints to compare, or --sweep to make some")
    if args.sweep is None and args.compare_mlx_vlm is not None:
        raise InputError("--compare-mlx-vlm is for --sweep")
    if args.card and not all(is_own(split_label(text)[1]) for text in args.checkpoints):
        raise InputError("--card writes into folders of your own, not the Hub's or the demo")
    if args.sweep is not None and (args.checkpoints or args.card):
        raise InputError("--sweep makes its own checkpoints, for the while: give none, nor --card")
    for name in (args.sweep or "").split(",") if args.sweep else ():
        parse_preset(name)


def sweep(args: argparse.Namespace, source: Path, folder: Path) -> list[tuple[str, str, Path]]:
    """Method, name and folder of every checkpoint made from the source."""
    from tqdm import tqdm

    from qwen3vl_mlx import conversion, hub
    from qwen3vl_mlx.quant.examples import CALIBRATION_SEED, make_examples
    from qwen3vl_mlx.quant.sweep import CALIBRATION_EXAMPLES, POINTS, candidates

    points = args.sweep.split(",") if args.sweep else POINTS
    examples = make_examples(source, None, CALIBRATION_EXAMPLES, first_seed=CALIBRATION_SEED)
    made = candidates(
        conversion.open_source(hub.Snapshot(source)),
        folder,
        examples,
        peer=args.compare_mlx_vlm,
        points=points,
    )
    total = len(points) * (3 if args.compare_mlx_vlm is not None else 2)
    shown = tqdm(made, "Quantizing", total, leave=False, disable=not sys.stderr.isatty())
    return [(candidate.method, candidate.name, candidate.folder) for candidate in shown]


def is_own(name: str) -> bool:
    """Whether a checkpoint's name is a folder that the user made."""
    from qwen3vl_mlx.demo import CHECKPOINT

    path = Path(name).expanduser()
    return name != "demo" and path.is_dir() and path.resolve() != CHECKPOINT.resolve()


def split_label(text: str) -> tuple[str, str]:
    """`METHOD=CHECKPOINT` to its halves; without a label it is empty. A folder's name wins."""
    match = re.fullmatch(r"([^=/\\]+)=(.+)", text)
    if match is None or Path(text).expanduser().exists():
        return "", text
    return match[1], match[2]


def shown_name(name: str) -> str:
    """A folder's own name, without the path; a Hub id as it is."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def lines_of(methods: Sequence[str], found: Sequence[Quality]) -> dict[str, list[Quality]]:
    """The plot's lines: results by method."""
    lines: dict[str, list[Quality]] = {}
    for method, quality in zip(methods, found, strict=True):
        lines.setdefault(method, []).append(quality)
    return lines


def make_report(
    name: str, source: Path, methods: Sequence[str], found: Sequence[Quality]
) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
    import mlx.core as mx

    from qwen3vl_mlx.loading import weight_files
    from qwen3vl_mlx.quant.evaluate import stored_weight

    first = found[0].to_dict()
    return {
        "source": {
            "name": name,
            "size_bytes": sum(path.stat().st_size for path in weight_files(source)),
            "bits_per_weight": stored_weight(source).bits_per_weight,
            "perplexity": first["source_perplexity"],
            "accuracy": first["source_accuracy"],
        },
        "device": str(mx.default_device()),
        "examples": first["examples"],
        "tokens": first["tokens"],
        "checkpoints": [
            {"method": method, **quality.to_dict()}
            for method, quality in zip(methods, found, strict=True)
        ],
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a line per checkpoint."""
    source, rows = report["source"], report["checkpoints"]
    asked = source["accuracy"] is not None
    heading = ["checkpoint", "size", "bits", "KL", "", "agreement", "perplexity"]
    cells = [heading + ["right", "same"] * asked]
    for row in rows:
        name = f"{row['method']} {row['name']}".strip()
        line = [
            name,
            _size(row["size_bytes"]),
            f"{row['bits_per_weight']:.2f}",
            _number(row["kl"], 6),
            f"± {_number(row['kl_error'], 6)}",
            _percent(row["agreement"]),
            _number(row["perplexity"]),
        ]
        if asked:
            line += [_percent(row["accuracy"]), _percent(row["same_answers"])]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"source {source['name']}: {_size(source['size_bytes'])}, "
        f"{source['bits_per_weight']:.2f} bits, perplexity {_number(source['perplexity'])}"
        + (f", {_percent(source['accuracy'])} right" if asked else ""),
        f"{report['tokens']} answer tokens of {report['examples']} examples, on {report['device']}",
        "",
    ]
    for first, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _number(value: float | None, digits: int = 4) -> str:
    return "inf" if value is None else f"{value:.{digits}f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(main())
