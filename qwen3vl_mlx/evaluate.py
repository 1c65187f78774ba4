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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx import cli

if TYPE_CHECKING:
    from qwen3vl_mlx.quant.evaluate import Quality
    from qwen3vl_mlx.quant.examples import Example

_EPILOG = """examples:
  python -m qwen3vl_mlx.evaluate my-4bit --source Qwen/Qwen3-VL-4B-Instruct --images ~/Pictures
  python -m qwen3vl_mlx.evaluate demo-2bit demo-4bit --source demo --tasks 200
  python -m qwen3vl_mlx.evaluate rtn=a/4bit awq=b/4bit --source demo --plot quality.png

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
        nargs="+",
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
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.evaluate") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> None:
    """Measure as `args` say and print. Raises Qwen3VLError."""
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.errors import InputError

    for option, least in (("examples", 2), ("tasks", 0)):
        if (value := vars(args)[option]) < least:
            raise InputError(f"--{option} must be at least {least}, got {value}")
    if args.answers is not None and args.images is None:
        raise InputError("--answers says who answers about --images; give a folder of pictures")
    if args.images is not None and not Path(args.images).expanduser().is_dir():
        raise InputError(f"--images: no folder {args.images}; give one that holds pictures")
    source = hub.resolve(args.source)
    named = [split_label(text) for text in args.checkpoints]
    candidates = [hub.resolve(name) for _, name in named]

    from qwen3vl_mlx.quant.evaluate import check_comparable, check_plot, evaluate, plot

    if args.plot is not None:
        check_plot(Path(args.plot))
    for candidate in candidates:
        check_comparable(source, candidate)
    examples = make_examples(args, source)
    measured = evaluate(source, candidates, examples, questions=args.tasks, progress=True)
    found = [
        replace(quality, name=shown_name(name))
        for quality, (_, name) in zip(measured, named, strict=True)
    ]
    methods = [label for label, _ in named]
    if args.plot is not None:
        plot(lines_of(methods, found), Path(args.plot))
    report = make_report(shown_name(args.source), source, methods, found)
    print(json.dumps(report) if args.json else table(report))


def split_label(text: str) -> tuple[str, str]:
    """`METHOD=CHECKPOINT` to its halves; without a label it is empty. A folder's name wins."""
    match = re.fullmatch(r"([^=/\\]+)=(.+)", text)
    if match is None or Path(text).expanduser().exists():
        return "", text
    return match[1], match[2]


def shown_name(name: str) -> str:
    """A folder's own name, without the path; a Hub id as it is."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def make_examples(args: argparse.Namespace, source: Path) -> list[Example]:
    """What the checkpoints are compared on, laid out by the source's processor."""
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.models.config import read_config
    from qwen3vl_mlx.processing.processor import Processor
    from qwen3vl_mlx.quant.evaluate import check_comparable
    from qwen3vl_mlx.quant.examples import EVALUATION_SEED, demo_examples, folder_examples

    if args.images is None:
        processor = Processor.from_folder(source, read_config(source))
        return demo_examples(processor, args.examples, first_seed=EVALUATION_SEED)
    from qwen3vl_mlx.api import load

    answering = source if args.answers is None else hub.resolve(args.answers)
    check_comparable(source, answering)
    model = load(answering, progress=True)
    return folder_examples(
        model,
        args.images,
        args.examples,
        note=lambda line: print(line, file=sys.stderr),
        progress=True,
    )


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
