"""`python -m qwen3vl_mlx.convert`: a checkpoint in any layout to the one wanted here."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_mlx import cli

if TYPE_CHECKING:
    from qwen3vl_mlx.conversion import Report, Source
    from qwen3vl_mlx.quant.apply import Assignment
    from qwen3vl_mlx.quant.calibrate import Calibration
    from qwen3vl_mlx.quant.evaluate import Quality
    from qwen3vl_mlx.quant.policy import Request

_EPILOG = """examples:
  python -m qwen3vl_mlx.convert --model Qwen/Qwen3-VL-8B-Instruct --quantize 4bit
  python -m qwen3vl_mlx.convert --model Qwen/Qwen3-VL-8B-Instruct --plan --memory 16GB
  python -m qwen3vl_mlx.convert --model demo --quantize auto --output demo-auto
  python -m qwen3vl_mlx.convert --model my-vl --quantize 3bit --calibrate ~/Pictures --evaluate
  python -m qwen3vl_mlx.convert --model my-finetune-fp8 --dequantize --output my-finetune
  python -m qwen3vl_mlx.convert --model mlx-community/Qwen3-VL-4B-Instruct-bf16 --to-hf

quantizations: 2bit 3bit 4bit 5bit 6bit 8bit (affine), mxfp4 mxfp8 nvfp4, mixed_2_6 mixed_3_4
mixed_3_5 mixed_3_6 mixed_3_8 mixed_4_6 mixed_4_8, auto, and mistral.rs's names (4, afq4, q4k,
Q8_0 ...). Embeddings and output head get at least 6 bits, the router of experts at least 8, and the
vision tower stays whole unless --quantize-vision says otherwise.

Memory: a few blocks of 16 MB, whatever the model's size. The output appears when it is complete
and has been read back from disk; what an interrupted run leaves is cleared by the next.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Convert and quantize a Qwen3-VL checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help='folder, Hub id or "demo": bf16, fp16, fp32, FP8 blocks, or MLX files',
    )
    p.add_argument("--revision", help="branch, tag or commit of a Hub model")
    p.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="(default: model and recipe, here)"
    )
    p.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    what = p.add_argument_group("what to make of it (default: MLX files, weights as they are)")
    what.add_argument("-q", "--quantize", metavar="NAME", help="quantize to NAME, see below")
    what.add_argument(
        "--group-size", type=int, metavar="N", help="of affine groups: 32, 64 or 128 (default 64)"
    )
    what.add_argument("--topology", metavar="FILE", help="YAML file of exceptions to --quantize")
    what.add_argument(
        "--quantize-vision", action="store_true", help="the vision tower too, where groups fit"
    )
    what.add_argument(
        "--dequantize", action="store_true", help="FP8 or MLX quantized weights to whole ones"
    )
    what.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of what is not quantized (default: as it is)",
    )
    what.add_argument("--to-hf", action="store_true", help="the Hub's layout, for transformers")
    what.add_argument(
        "--shard-size", type=float, default=5.0, metavar="GB", help="of each file (default 5)"
    )
    _add_calibration(p.add_argument_group("calibration: better than rounding, at the same size"))
    _add_plan(p.add_argument_group("auto: the best quantization that fits"))
    out = p.add_argument_group("output")
    out.add_argument(
        "--evaluate",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="compare the result with its source on the pictures in FOLDER, or on drawn scenes, "
        "and write the numbers into its model card",
    )
    out.add_argument("--upload", metavar="REPO", help="upload the result to this Hub repository")
    out.add_argument("--private", action="store_true", help="make that repository private")
    out.add_argument("--json", action="store_true", help="print one JSON object at the end")
    out.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure what matters on the pictures in FOLDER, or on drawn scenes",
    )
    group.add_argument(
        "--examples", type=int, default=32, metavar="N", help="questions to ask (default 32)"
    )
    group.add_argument(
        "--answers",
        metavar="NAME",
        help="the checkpoint whose answers about pictures are used (default: the source, "
        "quantized while loading if it does not fit)",
    )
    group.add_argument(
        "--bits-per-weight",
        type=float,
        metavar="B",
        help="choose settings module by module to cost least at B bits over all parameters; "
        "the whole model must fit in memory",
    )
    group.add_argument("--save-calibration", metavar="FILE", help="a .safetensors file to keep")
    group.add_argument("--calibration", metavar="FILE", help="use one that was kept")


def _add_plan(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--plan", action="store_true", help="print the candidates and stop")
    group.add_argument(
        "--memory", metavar="SIZE", help="plan for a Mac with this much, such as 16GB"
    )
    group.add_argument(
        "--context", type=int, metavar="N", help="tokens of prompt and answer to have room for"
    )
    group.add_argument(
        "--image-tokens", type=int, metavar="N", help="of the largest image to have room for"
    )


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
    show(args, report, measured, uploaded)


def check(args: argparse.Namespace) -> Request:
    """Refuse options that contradict each other, before any work. Raises InputError."""
    from qwen3vl_mlx.errors import InputError
    from qwen3vl_mlx.hub_upload import check_upload
    from qwen3vl_mlx.quant.plan import parse_memory
    from qwen3vl_mlx.quant.policy import AUTO, Request
    from qwen3vl_mlx.quant.recipes import parse_recipe

    name = args.quantize.strip().lower() if args.quantize is not None else None
    if name not in (None, AUTO):
        parse_recipe(args.quantize, 1, group_size=args.group_size)  # whatever the model's layers
    whole = "--to-hf" if args.to_hf else "--dequantize" if args.dequantize else None
    if whole and name is not None:
        raise InputError(f"{whole} writes whole weights: it excludes --quantize")
    check_calibration(args)
    needs = {
        "--calibrate": args.calibrate,
        "--calibration": args.calibration,
        "--group-size": args.group_size,
        "--topology": args.topology,
        "--quantize-vision": args.quantize_vision or None,
    }
    for option, value in needs.items():
        if value is not None and name is None:
            raise InputError(f"{option} says how to quantize: it needs --quantize")
    planned = {
        "--memory": args.memory,
        "--context": args.context,
        "--image-tokens": args.image_tokens,
    }
    for option, value in planned.items():
        if value is not None and name != AUTO and not args.plan:
            raise InputError(f"{option} is for --plan and --quantize auto")
    if name == AUTO and args.group_size is not None:
        raise InputError("auto chooses the group size: leave out --group-size")
    if args.upload is not None:
        check_upload(args.upload)
    if args.private and not args.upload:
        raise InputError("--private is for --upload")
    if not 0 < args.shard_size < math.inf:
        raise InputError(f"--shard-size must be more than 0, got {args.shard_size}")
    return Request(
        args.quantize or AUTO,
        group_size=args.group_size,
        vision=args.quantize_vision,
        topology=args.topology,
        memory=parse_memory(args.memory) if args.memory is not None else None,
        context=args.context,
        image_tokens=args.image_tokens,
    )


def check_calibration(args: argparse.Namespace) -> None:
    """Refuse contradicting options of calibration and evaluation. Raises InputError."""
    from qwen3vl_mlx.errors import InputError

    if args.calibrate is not None and args.calibration is not None:
        raise InputError("--calibrate makes a calibration, --calibration brings one: give one")
    for option, value in (
        ("--bits-per-weight", args.bits_per_weight),
        ("--save-calibration", args.save_calibration),
    ):
        if value is not None and args.calibrate is None:
            raise InputError(f"{option} needs --calibrate")
    if args.calibrate and args.calibrate == args.evaluate:
        raise InputError("--evaluate on the pictures of --calibrate says nothing: give others")
    if args.answers is not None and not (args.calibrate or args.evaluate):
        raise InputError("--answers says who answers about the pictures of a folder: give one")
    if args.examples < 2:
        raise InputError(f"--examples must be at least 2, got {args.examples}")
    for option, folder in (("--calibrate", args.calibrate), ("--evaluate", args.evaluate)):
        if folder and not Path(folder).expanduser().is_dir():
            raise InputError(f"{option}: no folder {folder}; give one that holds pictures")


def show_plan(args: argparse.Namespace, request: Request) -> None:
    """Print the candidates; nothing but config.json is read."""
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.models.config import read_config
    from qwen3vl_mlx.quant import policy
    from qwen3vl_mlx.quant.plan import table, to_dict

    config = read_config(hub.config_folder(args.model, args.revision))
    found = policy.make_plan(config, request)
    print(json.dumps(to_dict(found), indent=2) if args.json else table(found))


def choose(args: argparse.Namespace, request: Request, source: Source) -> Assignment | None:
    """The modules to quantize, told on stderr. Raises InputError."""
    from qwen3vl_mlx import conversion
    from qwen3vl_mlx.quant import policy
    from qwen3vl_mlx.quant.plan import table

    if args.quantize is None:
        whole = args.dequantize or args.to_hf
        return None if whole else conversion.stored_assignment(source)
    if args.quantize.strip().lower() == policy.AUTO:
        print(table(policy.make_plan(source.config, request)), file=sys.stderr)
    assignment = policy.choose(source.config, request)
    print(policy.describe(source.config, request, assignment), file=sys.stderr)
    if source.config.quantization is not None and assignment is not None:
        print(
            "note: the source is quantized already, and its errors stay; better convert the "
            "original",
            file=sys.stderr,
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

    if assignment is None:
        raise InputError("auto leaves this model whole: there is nothing to calibrate")
    if args.calibration is not None:
        found = Calibration.load(args.calibration)
        found.check(source.config)
    else:
        folder = source.snapshot.folder
        examples = make_examples(
            folder,
            args.calibrate or None,
            args.examples,
            first_seed=CALIBRATION_SEED,
            answers=args.answers,
        )
        found = calibrate(
            folder,
            examples,
            assignment.modules,
            target_bits_per_weight=args.bits_per_weight,
            progress=True,
        )
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
        args.examples,
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
