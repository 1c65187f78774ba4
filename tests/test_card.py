"""The card tells what was given, and nothing else; its front matter is the Hub's."""

from __future__ import annotations

import ast
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_mlx.card import CardFacts, model_card, source_license, with_quality
from qwen3vl_mlx.models.config import Quantization
from qwen3vl_mlx.quant.apply import Assignment, Weight

FOUR, EIGHT = Quantization(64, 4), Quantization(32, 8, "mxfp8")
LAYERS = "language_model.model.layers"
SHAPES = {
    f"{LAYERS}.0.self_attn.q_proj.weight": (128, 64),
    f"{LAYERS}.1.self_attn.q_proj.weight": (128, 64),
    "language_model.model.embed_tokens.weight": (1000, 64),
    "vision_tower.blocks.0.mlp.linear_fc2.weight": (10, 43),
    "vision_tower.blocks.1.mlp.linear_fc2.weight": (10, 43),
    f"{LAYERS}.0.input_layernorm.weight": (64,),
}
QUALITY: dict[str, float | None] = {
    "kl": 0.012364,
    "kl_error": 0.00067,
    "agreement": 0.98765,
    "perplexity": 3.25,
    "source_perplexity": 3.125,
    "tokens": 4321,
    "examples": 64,
    "accuracy": 0.5,
    "source_accuracy": 0.625,
    "same_answers": 0.75,
    "size_bytes": 424242,
}
FACTS = CardFacts(
    name="me/a-model-4bit",
    source="Qwen/Qwen3-VL-4B-Instruct",
    recipe="mixed",
    assignment=Assignment(
        "mixed",
        FOUR,
        {
            f"{LAYERS}.0.self_attn.q_proj": FOUR,
            f"{LAYERS}.1.self_attn.q_proj": FOUR,
            "language_model.model.embed_tokens": EIGHT,
        },
        {
            f"vision_tower.blocks.{i}.mlp.linear_fc2": "groups of 64 do not divide its width, 43"
            for i in range(2)
        },
    ),
    weight=Weight(81308, 59648),
    shapes=SHAPES,
    nbytes=61_250_000,
    dtype="bfloat16",
    repo_id="Qwen/Qwen3-VL-4B-Instruct",
    commit="abcdef0123456789abcdef0123456789abcdef01",
    license="apache-2.0",
)
LOCAL = replace(FACTS, source="/Users/ada/secret plans/my model", repo_id=None, commit=None)


def front_matter(card: str) -> Any:
    data = ModelCard(card).data.to_dict()
    assert data == yaml.safe_load(card.split("---\n")[1])
    return data


def rows(card: str) -> list[list[str]]:
    """Cells of every table row: split at the pipes that are not escaped."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def blocks(card: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks."""
    found = re.finditer(r"^(`{3,})(\w+)\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)
    return [(match[2], match[3]) for match in found]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            FACTS,
            {
                "library_name": "mlx",
                "license": "apache-2.0",
                "base_model": "Qwen/Qwen3-VL-4B-Instruct",
                "base_model_relation": "quantized",
                "pipeline_tag": "image-text-to-text",
                "tags": ["mlx", "qwen3-vl", "4-bit"],
            },
        ),
        (
            replace(LOCAL, license=None, assignment=Assignment("mxfp8", EIGHT, {})),
            {
                "library_name": "mlx",
                "pipeline_tag": "image-text-to-text",
                "tags": ["mlx", "qwen3-vl", "8-bit", "mxfp8"],
            },
        ),
        (
            replace(FACTS, assignment=None, recipe=""),
            {
                "library_name": "mlx",
                "license": "apache-2.0",
                "base_model": "Qwen/Qwen3-VL-4B-Instruct",
                "pipeline_tag": "image-text-to-text",
                "tags": ["mlx", "qwen3-vl"],
            },
        ),
    ],
)
def test_front_matter(facts: CardFacts, expected: dict[str, Any]) -> None:
    assert front_matter(model_card(facts)) == expected


def test_the_facts_are_told() -> None:
    card = model_card(FACTS)
    assert "https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct" in card
    told = rows(card)
    for row in (
        ["source", "`Qwen/Qwen3-VL-4B-Instruct`"],
        ["commit of the source", "`abcdef0123456789abcdef0123456789abcdef01`"],
        ["recipe", "`mixed`"],
        ["parameters", "81,308"],
        ["bits per weight, all parameters", "5.87"],
        ["size of the weight files", "61.25 MB"],
        ["affine, 4 bits, groups of 64", "`q_proj`", "2", "16,384"],
        ["mxfp8, 8 bits, groups of 32", "`embed_tokens`", "1", "64,000"],
        ["`bfloat16`", "everything else", "", "924"],
    ):
        assert row in told
    assert sum(math.prod(shape) for shape in SHAPES.values()) == 16_384 + 64_000 + 924
    whole = r"`vision_tower.blocks.*.mlp.linear_fc2` (2): groups of 64 do not divide its width, 43"
    assert whole in card


def test_an_unquantized_checkpoint_names_no_recipe() -> None:
    card = model_card(replace(FACTS, assignment=None, recipe=""))
    assert "uantized" not in card
    assert "Quantization" not in card
    assert ["type", "`bfloat16`"] in rows(card)


def test_of_a_folder_the_last_part_is_told() -> None:
    card = model_card(replace(LOCAL, name="/Users/ada/secret plans/out"))
    assert "`my model`" in card
    assert "secret" not in card
    assert "Users" not in card
    assert "commit" not in card
    assert "huggingface.co" not in card


def test_how_to_run_it() -> None:
    found = blocks(model_card(FACTS))
    assert found[0] == (
        "sh",
        "python -m qwen3vl_mlx.generate --model me/a-model-4bit --image photo.jpg",
    )
    assert 'load("me/a-model-4bit")' in found[1][1]
    ast.parse(found[1][1])
    assert found[2][1].startswith("python -m mlx_vlm generate --model me/a-model-4bit ")


def test_no_number_is_made_up() -> None:
    """Each number of the card without its snippets is one of the facts."""
    text = re.sub(r"```.*?```", "", model_card(FACTS), flags=re.DOTALL)
    numbers = {n.replace(",", "") for n in re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?", text)}
    counts = {"2", "1", "16384", "64000", "924"}
    settings = {"4", "64", "8", "32", "43"}
    assert numbers - counts - settings == {"81308", "5.87", "61.25"}
    assert "Measured" not in text


def test_measurements() -> None:
    card = model_card(replace(FACTS, quality=QUALITY))
    told = rows(card)
    for row in (
        ["KL divergence of next-token distributions, nats per token", "0.01236 ± 0.0007"],
        ["same likeliest next token as the source", "98.77 %"],
        ["perplexity of the answers", "3.25"],
        ["perplexity of the source", "3.125"],
        ["demo questions answered rightly", "50.00 %"],
        ["demo questions answered rightly by the source", "62.50 %"],
        ["demo questions answered word for word as the source does", "75.00 %"],
    ):
        assert row in told
    assert "Over 4,321 tokens of 64 examples." in card
    assert "424242" not in card
    assert front_matter(card) == front_matter(model_card(FACTS))


def test_measurements_are_added_replaced_and_taken_away() -> None:
    bare = model_card(FACTS)
    full = with_quality(bare, QUALITY)
    assert full == model_card(replace(FACTS, quality=QUALITY))
    assert with_quality(full, QUALITY) == full
    assert with_quality(full, {}) == bare
    other = with_quality(full, {"kl": 7.5})
    assert "| 7.5 |" in other
    assert "0.01236" not in other
    assert "98.77" not in other
    assert other.count("## Measured") == 1


def test_what_was_not_measured_is_not_told() -> None:
    bare = model_card(FACTS)
    assert with_quality(bare, {"kl": None, "agreement": None, "bits_per_weight": 4.5}) == bare
    some = with_quality(bare, {"kl": 0.5, "kl_error": None, "perplexity": None})
    assert [row for row in rows(some) if row not in rows(bare)] == [
        ["measure", "value"],
        ["KL divergence of next-token distributions, nats per token", "0.5"],
    ]


def test_measurements_go_into_a_card_of_another_hand() -> None:
    card = "---\nlicense: mit\n---\n# Mine\n\nText with \\1 and \\g<0>.\n"
    full = with_quality(card, {"kl": 0.5})
    assert full.startswith(card)
    assert with_quality(with_quality(full, {"kl": 0.25}), {"kl": 0.5}) == full


NAMES = st.text(
    st.sampled_from("ab0 /|`*_[]()<>#!\\$&'\"-~\n\r\t.{}é\u2028\udc80"), min_size=1, max_size=20
).filter(lambda name: name.strip(" \n\r\t\u2028./") != "")


@given(NAMES, NAMES, NAMES)
def test_any_path_is_safe(name: str, source: str, recipe: str) -> None:
    """Nothing a path may hold breaks out of its cell, span, block, string or heading."""
    facts = replace(LOCAL, name=name, source=source, recipe=recipe, quality=QUALITY)
    card = model_card(facts)
    card.encode()
    plain = model_card(replace(LOCAL, quality=QUALITY))
    assert front_matter(card) == front_matter(plain)
    assert card.count("\n") == plain.count("\n")
    assert [len(row) for row in rows(card)] == [len(row) for row in rows(plain)]
    shell, python, other = (text for _, text in blocks(card))
    words = shlex.split(shell)
    assert words[:4] == ["python", "-m", "qwen3vl_mlx.generate", "--model"]
    assert words[5:] == ["--image", "photo.jpg"]
    assert words[4] == shlex.split(other)[5]
    ast.parse(python)
    assert with_quality(card, {}).count("## Measured") == card.count("## Measured") - 1


def test_a_heading_is_text() -> None:
    card = model_card(replace(FACTS, name="out/a*b*_c_ [x](y) <b>`d`"))
    assert "# a\\*b\\*\\_c\\_ \\[x\\]\\(y\\) \\<b\\>\\`d\\`\n" in card
    assert "`` a`b` ``" in model_card(replace(LOCAL, source="a`b`"))
    card = model_card(replace(LOCAL, source="a|b"))
    assert "\n`a|b`, quantized" in card
    assert "| `a\\|b` |" in card


@pytest.mark.parametrize(
    ("card", "repo_id", "expected"),
    [
        ("---\nlicense: mit\n---\n# A", None, "mit"),
        ("---\nlicense: mit\n---\n# A", "Qwen/Qwen3-VL-2B-Instruct", "mit"),
        ("# A", None, None),
        ("# A", "someone/finetune", None),
        ("---\ntags: [a]\n---\n", "Qwen/Qwen3-VL-2B-Instruct", "apache-2.0"),
        ("---\nlicense: [mit\n---\n", "someone/finetune", None),
        ("---\nlicense: [mit]\n---\n", None, None),
        ("---\n- license\n---\n", None, None),
        (None, "Qwen/Qwen3-VL-2B-Instruct", "apache-2.0"),
        (None, None, None),
    ],
)
def test_the_licence_of_the_source(
    card: str | None, repo_id: str | None, expected: str | None, tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert source_license(tmp_path, repo_id) == expected
