"""`python -m qwen3vl_mlx.convert`: a checkpoint in any layout to the one wanted here."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx import cli
from qwen3vl_mlx.convert_options import EXAMPLES, check, parser

if TYPE_CHECKING:
    from qwen3vl_mlx.conversion import Report, Source
    from qwen3vl_mlx.quant.apply import Assignment
    from qwen3vl_mlx.quant.calibrate import Calibration
    from qwen3vl_mlx.quant.evaluate import Quality
    from qwen3vl_mlx.quant.policy import Request


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.convert") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: convert(args), debug=args.debug)


def convert(args: argparse.Namespace) -> None:
    """Convert as `args` say. Raises Qwen3VLError."""
    request = check(args)
    if args.plan:
        show_plan(args, request)
        return

    from qwen3vl_mlx import conversion, hub
    from qwen3vl_mlx.publish import check_target

    output = args.output.expanduser() if args.output is not None else None
    if output is not None:  # before a download
        check_target(output, hub.local_folder(args.model, args.revision), force=args.force)
    began = time.perf_counter()
    source = conversion.open_source(hub.snapshot(args.model, args.revision))
    assignment = choose(args, request, source)
    target = output or Path(default_name(args, source, assignment))
    check_target(target, source.snapshot.folder, force=args.force)  # before a calibration
    scaling, assignment = calibration(args, source, assignment)
    report = conversion.convert(
        source,
        target,
        assignment,
        dtype=conversion.DTYPES[args.dtype] if args.dtype else None,
        scaling=scaling,
        to_hf=args.to_hf,
        name=args.upload,
        force=args.force,
        shard_bytes=int(args.shard_size * 1e9),
        progress=True,
    )
    measured = measure(args, source, target) if args.evaluate is not None else None
    uploaded = upload(args, target) if args.upload else None
    seconds = time.perf_counter() - began
    show(args, replace(report, seconds=seconds), measured, uploaded)


def show_plan(args: argparse.Namespace, request: Request) -> None:
    """Print the candidates; nothing but config.json is read."""
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.models.config import read_config
    from qwen3vl_mlx.quant import policy
    from qwen3vl_mlx.quant.plan import table, to_dict

    config = read_config(hub.config_folder(args.model, args.revision))
    found = policy.make_plan(config, request)
    if found.best is None and not args.json:
        print(table(found))
        found.choose()  # says what is missing
    print(json.dumps(to_dict(found), indent=2) if args.json else table(found))


def choose(args: argparse.Namespace, request: Request, source: Source) -> Assignment | None:
    """The modules to quantize, told on stderr. Raises InputError."""
    from qwen3vl_mlx import conversion
    from qwen3vl_mlx.loading import model_itemsize
    from qwen3vl_mlx.quant import policy

    if args.quantize is None:
        whole = args.dequantize or args.to_hf
        return None if whole else conversion.stored_assignment(source)
    itemsize = conversion.DTYPES[args.dtype].size if args.dtype else None
    stored = conversion.stored_assignment(source)
    policy.tell_plan(source.config, request)
    assignment = policy.choose(source.config, request, stored)
    policy.tell(
        source.config,
        request,
        assignment,
        stored,
        itemsize or model_itemsize(source.snapshot.folder),
    )
    return assignment


def calibration(
    args: argparse.Namespace, source: Source, assignment: Assignment | None
) -> tuple[Calibration | None, Assignment | None]:
    """What the weights are quantized with, and the settings it calls for. Raises InputError."""
    if args.calibrate is None and args.calibration is None:
        return None, assignment

    from qwen3vl_mlx.errors import InputError
    from qwen3vl_mlx.quant.apply import overridden
    from qwen3vl_mlx.quant.calibrate import Calibration, calibrate
    from qwen3vl_mlx.quant.examples import CALIBRATION_SEED, make_examples
    from qwen3vl_mlx.quant.sensitivity import check_target_bits

    if assignment is None:
        raise InputError("auto leaves this model whole: there is nothing to calibrate")
    if args.calibration is not None:
        found = Calibration.load(args.calibration)
        found.check(source.config)
        if found.overrides:
            print("note: module by module, the calibration's settings are used", file=sys.stderr)
    else:
        folder = source.snapshot.folder
        if args.bits_per_weight is not None:
            check_target_bits(folder, assignment.modules, assignment.pinned, args.bits_per_weight)
        examples = make_examples(
            folder,
            args.calibrate or None,
            args.examples or EXAMPLES,
            first_seed=CALIBRATION_SEED,
            answers=args.answers,
        )
        found = calibrate(
            folder,
            examples,
            assignment.modules,
            target_bits_per_weight=args.bits_per_weight,
            pinned=assignment.pinned,
            progress=True,
        )
        about = args.calibrate or "drawn scenes"
        print(f"calibrated on {len(examples)} questions about {about}", file=sys.stderr)
        if args.save_calibration is not None:
            found.save(args.save_calibration)
    return found, overridden(assignment, found.overrides, f"{assignment.name}-calibrated")


def measure(args: argparse.Namespace, source: Source, target: Path) -> Quality:
    """Compare the result with its source, and say so in its model card."""
    from qwen3vl_mlx.quant.evaluate import evaluate, write_card
    from qwen3vl_mlx.quant.examples import EVALUATION_SEED, make_examples

    folder = source.snapshot.folder
    examples = make_examples(
        folder,
        args.evaluate or None,
        args.examples or EXAMPLES,
        first_seed=EVALUATION_SEED,
        answers=args.answers,
    )
    (quality,) = evaluate(folder, [target], examples, progress=True)
    write_card(target, quality)
    return quality


def default_name(args: argparse.Namespace, source: Source, assignment: Assignment | None) -> str:
    """`Qwen3-VL-4B-Instruct-4bit`, in the current folder."""
    base = source.name.rsplit("/", 1)[-1]
    if args.to_hf:
        return f"{base}-hf"
    if args.quantize is None or assignment is None:
        return f"{base}-{args.dtype or 'mlx'}"
    vision = "-vision" if args.quantize_vision else ""
    calibrated = "-calibrated" if args.calibrate is not None or args.calibration else ""
    return f"{base}-{assignment.name}{vision}{calibrated}"


def upload(args: argparse.Namespace, target: Path) -> str:
    """Upload the result; where that fails the folder stays. Returns the commit's address."""
    from qwen3vl_mlx.hub_upload import upload as send

    return send(target, args.upload, private=args.private)


def show(
    args: argparse.Namespace, report: Report, measured: Quality | None, uploaded: str | None
) -> None:
    """Print what was made."""
    if args.json:
        quality = measured.to_dict() if measured is not None else None
        print(json.dumps({**report.to_dict(), "quality": quality, "uploaded": uploaded}))
        return
    if report.whole:
        print(f"left whole: {len(report.whole)} modules, {next(iter(report.whole.values()))} ...")
    print(
        f"{report.output}: {cli.size(report.nbytes)}, {report.bits_per_weight:.2f} bits per "
        f"weight, {report.seconds:.1f} s"
    )
    if measured is not None:
        print(
            f"KL to its source {measured.kl:.6f} ± {measured.kl_error:.6f} nats, "
            f"{measured.agreement:.1%} same likeliest token, over {measured.tokens} tokens"
        )
    if uploaded:
        print(f"uploaded: {uploaded}")


if __name__ == "__main__":
    sys.exit(main())
