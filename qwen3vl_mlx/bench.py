"""`python -m qwen3vl_mlx.bench`: what one picture and one answer cost on this machine.

`--engine` measures conversations and requests at once instead, and `--soak` looks for lost or wrong
answers among many; `--server` and `--server-soak` do the same over HTTP. `--compare-mlx-vlm PYTHON`
lets mlx-vlm do the same work under its own interpreter, turn about with ours so that a busy machine
disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx import cli

if TYPE_CHECKING:
    import mlx.core as mx

    from qwen3vl_mlx.api import Qwen3VL
    from qwen3vl_mlx.bench_measure import Workload

_OURS = "qwen3vl_mlx"
_EPILOG = """measurements, each the median of --runs, after one more run that is not counted:
  import         python -c "import qwen3vl_mlx", the interpreter's own start included
  start          python -m qwen3vl_mlx.generate, from its start to the first text on stdout
  preprocess     a decoded picture to patches
  vision encode  patches to all features of the vision tower, DeepStack included
  first token    prompt and decoded picture to the first token, model loaded
  decode         each token after the first
  peak memory    MLX's peak during the answer, weights included
  max RSS        the process's largest resident memory so far

Decoding is greedy and goes on past end tokens. On a CPU both sides compute in float32, except in
`start`, where each does as its command line does by default.

--start measures `qwen3vl ask`, from the start of its process to the first text, as it loads the
model and as it asks a server that has loaded it.

--engine measures, each with how many answers are as those of the same question asked alone with
caches off: time to the first token of a second question in a conversation, of the same picture in
another one, there also after other words, and of another picture; tokens per second of eight
questions about eight pictures, one after another and at once, for new and for known pictures; and
tokens per pass of the decoder where an answer copies one given before, by prompt lookup.

--soak asks short questions about drawn pictures, some of which are cancelled on the way, and
compares every answer with the one that the same question got alone. The exit status is 1 where
an answer is lost or wrong. It needs a model that knows such pictures: demo.

--server measures what 1, 8 and 32 clients see that stream answers about 128 new pictures from a
server on this machine: time to the first token and between the next, tokens per second of all, and
how many answers are as those of the same server asked one by one. Every measurement starts a fresh
server, as its command does by default.

--server-soak lets clients stream for so many seconds and a third of them leave on the way. The exit
status is 1 where an answer failed or differs from the one asked alone, a request is still there
when all clients are gone, or the server does not stop in good order.
"""
_CAPTIONS = {
    "import_sec": "import",
    "start_sec": "start",
    "preprocess_sec": "preprocess",
    "vision_encode_sec": "vision encode",
    "time_to_first_token_sec": "first token",
    "decode_sec_per_token": "decode",
    "peak_memory_bytes": "peak memory",
    "max_rss_bytes": "max RSS",
}


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Measure a checkpoint on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", default="demo", help='folder, Hub id or "demo" (default: demo)')
    p.add_argument(
        "--pixels",
        type=int,
        metavar="N",
        help="of a picture (default 65,536; with --engine 262,144; with --server as drawn)",
    )
    p.add_argument(
        "--prompt-tokens", type=int, default=32, metavar="N", help="of text, about (default 32)"
    )
    p.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="of the answer (default 64)"
    )
    p.add_argument("--runs", type=int, default=5, metavar="N", help="(default 5)")
    p.add_argument("--start", action="store_true", help="measure what a script waits for")
    p.add_argument("--engine", action="store_true", help="measure caches, batch and speculation")
    p.add_argument("--soak", type=int, metavar="N", help="ask N questions, look at each answer")
    p.add_argument("--server", action="store_true", help="measure what clients of a server see")
    p.add_argument(
        "--server-soak", type=int, metavar="SEC", help="ask a server so long, look at each answer"
    )
    p.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="of the questions of --soak (default 8) and the clients of --server-soak (64)",
    )
    p.add_argument("--no-start", action="store_true", help="leave out import and start")
    p.add_argument("--no-warm-up", action="store_true", help="count the first run too")
    p.add_argument(
        "--compare-mlx-vlm", metavar="PYTHON", help="an interpreter that has mlx-vlm installed"
    )
    cli.add_quantize(p, "quantization: measure a copy converted so")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.bench") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)
    return cli.run(lambda: bench(args), debug=args.debug)


def bench(args: argparse.Namespace) -> None:
    """Measure as `args` say and print. Raises Qwen3VLError."""
    from qwen3vl_mlx import hub
    from qwen3vl_mlx.errors import InputError

    counts = ("pixels", "prompt_tokens", "runs", "soak", "server_soak", "at_once")
    # The first token of an answer is no part of `decode`.
    for option, least in {**dict.fromkeys(counts, 1), "max_tokens": 2}.items():
        if (value := vars(args)[option]) is not None and value < least:
            raise InputError(f"--{option.replace('_', '-')} must be at least {least}, got {value}")
    if args.pixels is None and not args.server:
        args.pixels = 262_144 if args.engine else 65_536
    if args.topology is not None and args.quantize is None:
        raise InputError("--topology holds exceptions to --quantize: give both")
    checkpoint = hub.resolve(args.model)

    from qwen3vl_mlx.api import load
    from qwen3vl_mlx.loading import default_dtype

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # Another server cannot be told to compute in the type that ours does by default.
        dtype = default_dtype() if args.compare_mlx_vlm is not None and args.server else None
        if args.quantize is not None or dtype is not None:
            checkpoint = converted_copy(args, checkpoint, folder / "converted", dtype)
        if args.server_soak is not None:
            soak_server(args, checkpoint)
        elif args.server:
            compare_servers(args, checkpoint)
        elif args.soak is not None:
            soak(args, load(checkpoint))
        elif args.start:
            compare_starts(args, load(checkpoint), checkpoint, folder)
        elif args.engine:
            compare_engines(args, load(checkpoint), checkpoint, folder)
        else:
            compare(args, load(checkpoint), checkpoint, folder)


def compare(args: argparse.Namespace, model: Qwen3VL, checkpoint: Path, folder: Path) -> None:
    """Measure one picture and one answer, and print."""
    from qwen3vl_mlx.bench_measure import Peer, make_workload, measure, start_times
    from qwen3vl_mlx.media import load_image

    workload = make_workload(
        model,
        checkpoint,
        folder,
        pixels=args.pixels,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
    )
    image = load_image(workload.image)
    rounds: dict[str, list[dict[str, Any]]] = {_OURS: []}
    with ExitStack() as stack:
        peer: Peer | None = None
        if args.compare_mlx_vlm is not None:
            peer = Peer(args.compare_mlx_vlm, "bench_peer.py", asdict(workload))
            stack.enter_context(peer)
            rounds[peer.name] = []
        for _ in range(args.runs + (not args.no_warm_up)):
            starts = {} if args.no_start else start_times(sys.executable, _OURS, workload)
            rounds[_OURS].append({**starts, **measure(model, image, workload)})
            if peer is not None:
                starts = {} if args.no_start else start_times(peer.python, "mlx_vlm", workload)
                rounds[peer.name].append({**starts, **peer.measure()})
    report = make_report(workload, rounds, args.runs)
    print(json.dumps(report) if args.json else table(report))


def compare_starts(
    args: argparse.Namespace, model: Qwen3VL, checkpoint: Path, folder: Path
) -> None:
    """Measure what a script waits for, and print."""
    from qwen3vl_mlx import bench_start
    from qwen3vl_mlx.bench_measure import make_workload

    workload = make_workload(
        model,
        checkpoint,
        folder,
        pixels=args.pixels,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
    )
    report = bench_start.compare(workload, folder, args.runs, args.compare_mlx_vlm)
    told = {**asdict(report), "ratios": report.ratios}
    print(json.dumps(told) if args.json else bench_start.table(report))


def compare_engines(
    args: argparse.Namespace, model: Qwen3VL, checkpoint: Path, folder: Path
) -> None:
    """Measure conversations and requests at once, and print."""
    from qwen3vl_mlx import bench_engine
    from qwen3vl_mlx.bench_measure import Peer, another_engine
    from qwen3vl_mlx.engine.engine import EngineOptions

    workload, alone = bench_engine.make_workload(
        model, checkpoint, folder, pixels=args.pixels, max_tokens=args.max_tokens
    )
    guessing = another_engine(model, EngineOptions(speculative="lookup"))
    rounds: dict[str, list[bench_engine.Round]] = {_OURS: []}
    answers = {_OURS: alone}
    with ExitStack() as stack:
        peer: Peer | None = None
        if args.compare_mlx_vlm is not None:
            payload = [asdict(workload), bench_engine.STEPS]
            peer = Peer(args.compare_mlx_vlm, "bench_engine_peer.py", payload)
            stack.enter_context(peer)
            answers[peer.name] = peer.facts["alone"]
        for _ in range(args.runs + (not args.no_warm_up)):
            rounds[_OURS].append(bench_engine.measure(model, guessing, workload, alone))
            if peer is not None:
                for road, found in peer.measure().items():
                    rounds.setdefault(f"{peer.name} {road}", []).append(found)
    report = bench_engine.make_report(workload, rounds, answers, args.runs)
    print(json.dumps(report) if args.json else bench_engine.table(report))


def compare_servers(args: argparse.Namespace, checkpoint: Path) -> None:
    """Measure what clients of servers see, and print."""
    from qwen3vl_mlx import bench_server, bench_server_clients
    from qwen3vl_mlx.processing.tokenizer import Tokenizer

    sides = [bench_server_clients.ours(str(checkpoint))]
    if args.compare_mlx_vlm is not None:
        sides.append(bench_server_clients.mlx_vlm(args.compare_mlx_vlm, str(checkpoint)))
    tokenizer = Tokenizer.from_folder(checkpoint)
    questions = bench_server.make_questions(bench_server.QUESTIONS, args.max_tokens, args.pixels)
    report = bench_server.compare(sides, questions, tokenizer, bench_server.CLIENTS)
    print(json.dumps(report) if args.json else bench_server.table(report))


def soak_server(args: argparse.Namespace, checkpoint: Path) -> None:
    """Ask a server for a while and print what it did. Raises Qwen3VLError for bad answers."""
    from qwen3vl_mlx import bench_server, bench_server_clients, bench_server_soak
    from qwen3vl_mlx.errors import Qwen3VLError

    side = bench_server_clients.ours(str(checkpoint))
    questions = bench_server.make_questions(bench_server_soak.QUESTIONS, args.max_tokens)
    clients = args.at_once or bench_server_soak.CLIENTS
    report = bench_server_soak.soak(side, questions, args.server_soak, clients)
    print(json.dumps(asdict(report)) if args.json else bench_server_soak.table(report))
    if not report.clean:
        raise Qwen3VLError("the server did not do all that it was asked; see above")


def soak(args: argparse.Namespace, model: Qwen3VL) -> None:
    """Ask many questions and print what became of them. Raises Qwen3VLError for bad answers."""
    from qwen3vl_mlx import soak
    from qwen3vl_mlx.errors import Qwen3VLError

    report = soak.soak(model, args.soak, args.at_once or 8)
    print(json.dumps(asdict(report)) if args.json else soak.table(report))
    if not report.clean:
        raise Qwen3VLError(f"{report.lost} answers are lost and {report.wrong} are wrong")


def converted_copy(
    args: argparse.Namespace, checkpoint: Path, target: Path, dtype: mx.Dtype | None
) -> Path:
    """A converted checkpoint that both sides read."""
    from qwen3vl_mlx import conversion, hub
    from qwen3vl_mlx.quant import policy

    source = conversion.open_source(hub.Snapshot(checkpoint))
    assignment = stored = conversion.stored_assignment(source)
    if args.quantize is not None:
        request = policy.Request(args.quantize, topology=args.topology)
        assignment = policy.choose(source.config, request, stored)
    conversion.convert(source, target, assignment, dtype=dtype, progress=True)
    return target


def make_report(
    workload: Workload, rounds: Mapping[str, Sequence[Mapping[str, Any]]], runs: int
) -> dict[str, Any]:
    """The workload and, for each side, median, least and most of the last `runs` rounds."""
    import mlx.core as mx

    report: dict[str, Any] = {
        "model": workload.model,
        "device": str(mx.default_device()),
        "pixels": workload.pixels,
        "prompt_tokens": rounds[_OURS][-1]["prompt_tokens"],
        "max_tokens": workload.max_tokens,
        "runs": runs,
        "sides": {
            name: {
                key: _spread([measured[key] for measured in counted[-runs:]])
                for key in _CAPTIONS
                if key in counted[-1]
            }
            for name, counted in rounds.items()
        },
    }
    if len(rounds) == 2:
        ours, theirs = report["sides"].values()
        report["ratios"] = {key: ours[key]["median"] / theirs[key]["median"] for key in ours}
        last = [counted[-1] for counted in rounds.values()]
        known = len(last[0]["tokens"])
        report["same_tokens"] = (
            last[0]["tokens"] == last[1]["tokens"][:known]
            and last[0]["prompt_tokens"] == last[1]["prompt_tokens"]
        )
    return report


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a line per measurement, a column per side."""
    lines = [
        f"{report['model']} on {report['device']}: picture of {report['pixels']:,} pixels, prompt "
        f"of {report['prompt_tokens']} tokens, answer of {report['max_tokens']}, "
        f"{report['runs']} runs",
        "",
        f"{'':<14}" + "".join(f"{f'{name} (least - most)':>38}" for name in report["sides"]),
    ]
    ratios = report.get("ratios", {})
    for key, caption in _CAPTIONS.items():
        cells = [_cell(key, side[key]) for side in report["sides"].values() if key in side]
        if cells:
            ratio = f"{ratios[key]:>8.2f} x" if key in ratios else ""
            lines.append(f"{caption:<14}" + "".join(f"{cell:>38}" for cell in cells) + ratio)
    if "same_tokens" in report:
        lines += ["", f"same prompt and answer tokens: {'yes' if report['same_tokens'] else 'NO'}"]
    return "\n".join(lines)


def _cell(key: str, spread: Mapping[str, float]) -> str:
    scale, unit = (1e-6, "MB") if key.endswith("_bytes") else (1e3, "ms")
    middle, least, most = (scale * spread[name] for name in ("median", "min", "max"))
    return f"{middle:,.1f} {unit} ({least:,.1f} - {most:,.1f})"


if __name__ == "__main__":
    sys.exit(main())
