"""The README.md of a converted checkpoint: where it came from, what was done to it, how to run it.

Only what was given is written: a card holds no number that nobody measured.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_mlx.hub import is_repo_id
from qwen3vl_mlx.models.config import Quantization
from qwen3vl_mlx.quant.apply import Assignment, Shape, Weight

_BEGIN, _END = "<!-- measured -->", "<!-- /measured -->"
_MEASURED = re.compile(f"^{re.escape(_BEGIN)}$.*?^{re.escape(_END)}$", re.DOTALL | re.MULTILINE)
_SHARES = {
    "agreement": "same likeliest next token as the source",
    "accuracy": "demo questions answered rightly",
    "source_accuracy": "demo questions answered rightly by the source",
    "same_answers": "demo questions answered word for word as the source does",
}
_PERPLEXITIES = {
    "perplexity": "perplexity of the answers",
    "source_perplexity": "perplexity of the source",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    name: what to give `--model`: the repository it goes to, or its folder. source: the Hub id or
    folder it was made from; repo_id and commit: of that, where it is of the Hub. Of a folder's path
    only the last part is published. license: as a Hub card spells it (see `source_license`).
    recipe: its name. assignment: None for weights left in `dtype` ("bfloat16"). shapes: of every
    parameter before quantization (`parameter_shapes`). nbytes: of the weight files on disk.
    quality: see `with_quality`; None if nobody measured.
    """

    name: str
    source: str
    recipe: str
    assignment: Assignment | None
    weight: Weight
    shapes: Mapping[str, Shape]
    nbytes: int
    dtype: str
    repo_id: str | None = None
    commit: str | None = None
    license: str | None = None
    quality: Mapping[str, float | None] | None = None


def model_card(facts: CardFacts) -> str:
    """README.md of a converted checkpoint: YAML front matter for the Hub, then Markdown."""
    parts = [
        f"---\n{_front_matter(facts)}\n---",
        f"# {_escaped(_public(facts.name))}",
        _origin(facts),
        _summary(facts),
    ]
    if facts.assignment is not None:
        parts += [_settings(facts, facts.assignment), *_left_whole(facts.assignment)]
    parts += [f"{_BEGIN}\n{_END}", _usage(_public(facts.name))]
    card = "\n\n".join(parts) + "\n"
    return card if facts.quality is None else with_quality(card, facts.quality)


def hub_card(facts: CardFacts) -> str:
    """README.md of a checkpoint in the Hub's layout: what it is, and of which source."""
    name, source = _escaped(_public(facts.name)), _code(_public(facts.source))
    line = f"{source}, whole and in the Hub's layout, for transformers; by qwen3vl_mlx."
    return f"# {name}\n\n{line}\n\n{_summary(facts)}\n"


def with_quality(card: str, quality: Mapping[str, float | None]) -> str:
    """`card` with its section of measurements added, or replaced.

    quality: any of `kl` (mean, nats) with `kl_error`; `agreement`, `accuracy`, `source_accuracy`,
    `same_answers` (shares, 0 to 1); `perplexity`, `source_perplexity`; `examples` and `tokens`
    measured on. Missing or None: not written. Other keys are ignored.
    """
    rows = _measured_rows({key: value for key, value in quality.items() if value is not None})
    lines = [_BEGIN, _END]
    if rows:
        table = _table(("measure", "value"), rows)
        lines[1:1] = ["", "## Measured against the source", "", *_extent(quality), table, ""]
    section = "\n".join(lines)
    if _MEASURED.search(card):
        return _MEASURED.sub(section, card, count=1)
    return f"{card.rstrip()}\n\n{section}\n"


def source_license(folder: Path, repo_id: str | None = None) -> str | None:
    """The licence named by the card of a source checkpoint; Qwen's own are Apache-2.0 without."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, or none that can be read
        metadata = {}
    found = metadata.get("license")
    if isinstance(found, str) and found.strip():
        return found
    return "apache-2.0" if repo_id is not None and repo_id.startswith("Qwen/") else None


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    tags = ["mlx", "qwen3-vl"]
    if facts.assignment is not None:
        default = facts.assignment.default
        tags += [f"{default.bits}-bit", *([] if default.mode == "affine" else [default.mode])]
    is_quantized = facts.assignment is not None and facts.repo_id is not None
    return ModelCardData(
        library_name="mlx",
        license=facts.license,
        base_model=facts.repo_id,
        base_model_relation="quantized" if is_quantized else None,
        pipeline_tag="image-text-to-text",
        tags=tags,
    ).to_yaml()


def _origin(facts: CardFacts) -> str:
    source = _code(_last_part(facts.source))
    if facts.repo_id is not None:
        source = f"[{_escaped(facts.repo_id)}](https://huggingface.co/{facts.repo_id})"
    made = "in MLX format" if facts.assignment is None else "quantized for MLX"
    return f"{source}, {made} by qwen3vl_mlx."


def _summary(facts: CardFacts) -> str:
    rows = [("source", _code(facts.repo_id or _last_part(facts.source)))]
    if facts.commit is not None:
        rows.append(("commit of the source", _code(facts.commit)))
    if facts.assignment is not None:
        rows.append(("recipe", _code(facts.recipe)))
    kept = "type of what is not quantized" if facts.assignment is not None else "type"
    rows += [
        ("parameters", f"{facts.weight.parameters:,}"),
        ("bits per weight, all parameters", f"{facts.weight.bits_per_weight:.2f}"),
        ("size of the weight files", _bytes(facts.nbytes)),
        (kept, _code(facts.dtype)),
    ]
    return _table(("", ""), rows)


def _settings(facts: CardFacts, assignment: Assignment) -> str:
    paths: dict[Quantization, list[str]] = defaultdict(list)
    for path, settings in assignment.modules.items():
        paths[settings].append(path)
    rows, packed = [], 0
    for settings, group in sorted(paths.items(), key=lambda item: (item[0].bits, item[0].mode)):
        parameters = sum(math.prod(facts.shapes[f"{path}.weight"]) for path in group)
        packed += parameters
        what = f"{settings.mode}, {settings.bits} bits, groups of {settings.group_size}"
        last = ", ".join(_code(name) for name in sorted({path.split(".")[-1] for path in group}))
        rows.append((what, last, f"{len(group):,}", f"{parameters:,}"))
    rest = sum(math.prod(shape) for shape in facts.shapes.values()) - packed
    rows.append((_code(facts.dtype), "everything else", "", f"{rest:,}"))
    table = _table(("settings", "which", "modules", "parameters"), rows)
    return f"## Quantization\n\n{table}"


def _left_whole(assignment: Assignment) -> list[str]:
    """A list of what could not be quantized, one line for modules alike: [] or [text]."""
    counts = Counter(
        (re.sub(r"\.\d+(?=\.|$)", ".*", path), reason) for path, reason in assignment.whole.items()
    )
    lines = [
        f"- {_code(path)} ({count:,}): {_escaped(reason)}"
        for (path, reason), count in sorted(counts.items())
    ]
    return ["Left whole, though the recipe names them:\n\n" + "\n".join(lines)] if lines else []


def _usage(name: str) -> str:
    word = shlex.quote(name)
    python = (
        "from qwen3vl_mlx import load\n\n"
        f"model = load({json.dumps(name, ensure_ascii=False)})\n"
        'print(model.generate("Describe the image.", images=["photo.jpg"]).text)'
    )
    return "\n\n".join(
        [
            "## How to run it",
            _fenced("sh", f"python -m qwen3vl_mlx.generate --model {word} --image photo.jpg"),
            _fenced("python", python),
            "It also loads in mlx-vlm:",
            _fenced(
                "sh",
                f"python -m mlx_vlm generate --model {word} --image photo.jpg "
                '--prompt "Describe the image."',
            ),
        ]
    )


def _measured_rows(quality: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = []
    if "kl" in quality:
        error = f" ± {quality['kl_error']:.1g}" if "kl_error" in quality else ""
        label = "KL divergence of next-token distributions, nats per token"
        rows.append((label, f"{quality['kl']:.4g}{error}"))
    rows += [
        (label, f"{100 * quality[key]:.2f} %") for key, label in _SHARES.items() if key in quality
    ]
    rows += [
        (label, f"{quality[key]:.4g}") for key, label in _PERPLEXITIES.items() if key in quality
    ]
    return rows


def _extent(quality: Mapping[str, float | None]) -> list[str]:
    counts = [f"{quality[key]:,.0f} {key}" for key in ("tokens", "examples") if quality.get(key)]
    return [f"Over {' of '.join(counts)}.", ""] if counts else []


def _public(name: str) -> str:
    """A Hub id as it is; of a folder's path the last part."""
    return name if is_repo_id(name) else _last_part(name)


def _last_part(path: str) -> str:
    """The rest of a path is its owner's own business."""
    return _one_line(os.path.basename(os.path.normpath(path)) or path)


def _one_line(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # a file's name may be no text
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~&!$])", r"\\\1", _one_line(text))


def _code(text: str) -> str:
    """A code span that shows `text` as it is."""
    text = _one_line(text)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"  # no line of ours starts with backticks


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    escaped = ((cell.replace("|", "\\|") for cell in cells) for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def _bytes(count: int) -> str:
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / size:,.2f} {unit}"
