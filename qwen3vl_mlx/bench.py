"""`python -m qwen3vl_mlx.bench`: what one picture and one answer cost on this machine.

`--compare-mlx-vlm PYTHON` lets mlx-vlm do the same work under its own interpreter, turn about with
ours so that a busy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
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
        "--pixels", type=int, default=65536, metavar="N", help="of the picture (default 65,536)"
    )
    p.add_argument(
        "--prompt-tokens", type=int, default=32, metavar="N", help="of text, about (default 32)"
    )
    p.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="of the answer (default 64)"
    )
    p.add_argument("--runs", type=int, default=5, metavar="N", help="(default 5)")
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

    # The first token of an answer is no part of `decode`.
    for option, least in (("pixels", 1), ("prompt_tokens", 1), ("max_tokens", 2), ("runs", 1)):
        if (value := vars(args)[option]) < least:
            raise InputError(f"--{option.replace('_', '-')} must be at least {least}, got {value}")
    if args.topology is not None and args.quantize is None:
        raise InputError("--topology holds exceptions to --quantize: give both")
    checkpoint = hub.resolve(args.model)

    from qwen3vl_mlx.api import load
    from qwen3vl_mlx.bench_measure import make_workload, measure, start_times
    from qwen3vl_mlx.media import load_image

    rounds: dict[str, list[dict[str, Any]]] = {_OURS: []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.quantize is not None:
            checkpoint = quantized_copy(args, checkpoint, folder / "quantized")
        model = load(checkpoint)
        workload = make_workload(
            model,
            checkpoint,
            folder,
            pixels=args.pixels,
            prompt_tokens=args.prompt_tokens,
            max_tokens=args.max_tokens,
        )
        image = load_image(workload.image)
        peer: Peer | None = None
        if args.compare_mlx_vlm is not None:
            peer = stack.enter_context(Peer(args.compare_mlx_vlm, workload))
            rounds[peer.name] = []
        for _ in range(args.runs + (not args.no_warm_up)):
            starts = {} if args.no_start else start_times(sys.executable, _OURS, workload)
            rounds[_OURS].append({**starts, **measure(model, image, workload)})
            if peer is not None:
                starts = {} if args.no_start else start_times(peer.python, "mlx_vlm", workload)
                rounds[peer.name].append({**starts, **peer.measure()})
    report = make_report(workload, rounds, args.runs)
    print(json.dumps(report) if args.json else table(report))


def quantized_copy(args: argparse.Namespace, checkpoint: Path, target: Path) -> Path:
    """A converted checkpoint that both sides read."""
    from qwen3vl_mlx import conversion, hub
    from qwen3vl_mlx.quant import policy

    source = conversion.open_source(hub.Snapshot(checkpoint))
    request = policy.Request(args.quantize, topology=args.topology)
    stored = conversion.stored_assignment(source)
    assignment = policy.choose(source.config, request, stored)
    conversion.convert(source, target, assignment, progress=True)
    return target


class Peer:
    """mlx-vlm in a process of its own, loaded once, measuring one round at a time."""

    def __init__(self, python: str, workload: Workload):
        # As text: a script's own folder comes first in sys.path, and would hide modules there.
        script = Path(__file__).with_name("bench_peer.py").read_text(encoding="utf-8")
        self.python = python
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                [python, "-c", script, json.dumps(asdict(workload))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
            )
        except OSError as error:
            from qwen3vl_mlx.errors import InputError

            raise InputError(f"--compare-mlx-vlm: {python} cannot be run: {error}") from error
        self.name = f"mlx-vlm {self._reply()['version']}"

    def measure(self) -> dict[str, Any]:
        """One round: see `bench_measure.Measured`."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            reply: dict[str, Any] = json.loads(line)
            return reply
        from qwen3vl_mlx.bench_measure import last_line
        from qwen3vl_mlx.errors import Qwen3VLError

        self.process.wait()
        self.errors.seek(0)
        raise Qwen3VLError(f"mlx-vlm under {self.python} failed: {last_line(self.errors.read())}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


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
