"""The options of `convert`, and which of them go together."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3vl_mlx.quant.policy import Request

EXAMPLES = 32

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
vision tower stays whole unless --quantize-vision says otherwise; --bits-per-weight weighs all that
anew. A topology file goes before every other rule.

Memory: a few blocks of 16 MB, whatever the model's size; with --calibrate or --evaluate one layer
and the examples, with --bits-per-weight the whole model. Calibrating a real model wants a GPU. The
output appears when it is complete and has been read back from disk; what an interrupted run leaves
is cleared by the next.
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
    group.add_argument("--examples", type=int, metavar="N", help="questions to ask (default 32)")
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
    if args.calibrate and args.evaluate and overlap(Path(args.calibrate), Path(args.evaluate)):
        raise InputError("--evaluate on the pictures of --calibrate says nothing: give others")
    if args.answers is not None and not (args.calibrate or args.evaluate):
        raise InputError("--answers says who answers about the pictures of a folder: give one")
    if args.examples is not None and args.calibrate is None and args.evaluate is None:
        raise InputError("--examples is for --calibrate and --evaluate")
    if args.examples is not None and args.examples < 2:
        raise InputError(f"--examples must be at least 2, got {args.examples}")
    if args.bits_per_weight is not None and not 0 < args.bits_per_weight <= 32:
        raise InputError(f"--bits-per-weight must be 0 to 32, got {args.bits_per_weight}")
    if args.save_calibration is not None:
        kept = Path(args.save_calibration).expanduser()
        if kept.suffix != ".safetensors" or not kept.absolute().parent.is_dir():
            raise InputError(
                f"--save-calibration takes a .safetensors file in a folder, got {kept}"
            )
        if kept.exists() and not args.force:
            raise InputError(f"{kept} is there already; --force replaces it")
    for option, folder in (("--calibrate", args.calibrate), ("--evaluate", args.evaluate)):
        if folder and not Path(folder).expanduser().is_dir():
            raise InputError(f"{option}: no folder {folder}; give one that holds pictures")


def overlap(one: Path, other: Path) -> bool:
    """Whether a folder is another, or within it."""
    a, b = one.expanduser().resolve(), other.expanduser().resolve()
    return a == b or a in b.parents or b in a.parents
