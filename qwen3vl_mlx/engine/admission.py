"""What a request may come to use of memory, before it runs, and what would fit instead.

An upper bound: keys and values up to the last token asked for, features of all pictures, and the
largest buffers that come and go. Reads shapes only; no tensor is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen3vl_mlx.engine.kv_cache import KV_BITS, STEP, KVQuantization
from qwen3vl_mlx.engine.vision import MAX_PATCHES
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.models.attention import SCORE_BYTES, has_fused_kernel
from qwen3vl_mlx.models.config import ModelConfig
from qwen3vl_mlx.models.qwen3_vl import Model
from qwen3vl_mlx.processing.prompt import Prompt
from qwen3vl_mlx.quant.plan import (
    PREFILL_CHUNK,
    feature_bytes,
    prefill_bytes,
    this_memory,
    vision_bytes,
)

RESERVE = 2**29  # MLX's kernels and kept buffers, the program itself
UNBOUNDED_TOKENS = 4096  # reserved at first for an answer without a max_tokens of its own
_SHORT_ANSWER = 256  # offered where no single change is enough
_LEAST_IMAGE = 64  # visual tokens of the smallest image that is worth offering
_DRAW_BYTES = 40  # per entry of the vocabulary: logits, weighed, sorted, counted, chosen from
_GROWING = 2  # layers held twice while their slots grow: old ones are freed a little late
_SCORE_COPIES = 2  # scores and their exponentials, where no fused kernel attends


def memory_limit(override: int | None = None) -> int:
    """Bytes the model and its requests may use: the GPU's working set, or the caller's own limit.

    Where no Metal is, what a Mac with as much memory would allow. Raises InputError for a limit
    that is not positive.
    """
    if override is None:
        return this_memory().usable
    if override <= 0:
        raise InputError(f"the memory limit must be a positive number of bytes, got {override}")
    return override


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    named: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return sum(x.nbytes for _, x in named)


@dataclass(frozen=True)
class Demand:
    """What a request asks for, in tokens.

    images: visual tokens of each. videos: frames, and visual tokens of one frame, of each.
    prompt_tokens: visual ones included.
    """

    prompt_tokens: int
    max_tokens: int
    images: tuple[int, ...] = ()
    videos: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, prompt: Prompt, max_tokens: int) -> Demand:
        images, videos = [], []
        for medium in prompt.media:
            if medium.kind == "image":
                images.append(medium.num_tokens)
            else:
                frames = medium.grid_thw[0]
                videos.append((frames, medium.num_tokens // frames))
        return cls(len(prompt.token_ids), max_tokens, tuple(images), tuple(videos))

    @property
    def visual_tokens(self) -> int:
        return sum(self.images) + sum(frames * each for frames, each in self.videos)

    def with_images(self, most: int) -> Demand:
        """The same with no image of more than `most` visual tokens."""
        images = tuple(min(tokens, most) for tokens in self.images)
        saved = sum(self.images) - sum(images)
        return replace(self, images=images, prompt_tokens=self.prompt_tokens - saved)


@dataclass(frozen=True)
class Cost:
    """Bytes one request may come to use.

    cache: keys and values of prompt and answer. features: of all pictures, held until the prompt
    is read. decode: logits and scores of its row. vision, prefill: buffers of the largest pass,
    which come and go. growth: layers held twice while they grow.
    """

    demand: Demand
    cache: int
    features: int
    decode: int
    vision: int
    prefill: int
    growth: int

    @property
    def working(self) -> int:
        """What comes and goes."""
        return self.growth + max(self.vision, self.prefill)

    @property
    def answering(self) -> Cost:
        """The same from when the prompt is read."""
        return replace(self, features=0, vision=0, prefill=0)

    @property
    def total(self) -> int:
        return self.cache + self.features + self.decode + self.working


@dataclass(frozen=True)
class Admission:
    """The memory of one loaded model. Sizes in bytes.

    itemsize: of the model's numbers. chunk: tokens of a prompt read in one pass. fused: whether
    the decoder's attention holds no scores. draft: of a model that reads every request, too; its
    weights are among `weights`.
    """

    config: ModelConfig
    limit: int
    weights: int
    kv_bits: int | None = None
    itemsize: int = 2
    chunk: int = PREFILL_CHUNK
    fused: bool = True
    reserved: int = RESERVE
    draft: Admission | None = None

    @classmethod
    def for_model(
        cls,
        model: Model,
        limit: int,
        kv_bits: int | None = None,
        *,
        chunk: int = PREFILL_CHUNK,
        reserved: int = RESERVE,
    ) -> Admission:
        """For a loaded model on this machine. Raises InputError for kv_bits it cannot have."""
        if kv_bits is not None:
            KVQuantization.of(kv_bits, model.config.text.head_dim)
        dtype = model.language_model.model.norm.weight.dtype
        return cls(
            model.config,
            limit,
            weights_bytes(model),
            kv_bits,
            dtype.size,
            chunk,
            has_fused_kernel(model.config.text.head_dim, dtype),
            reserved,
        )

    def beside(self, draft: Admission) -> Admission:
        """With a draft model, which is loaded, too."""
        return replace(self, weights=self.weights + draft.weights, draft=draft)

    @property
    def available(self) -> int:
        """What requests and caches may share; negative where the weights alone are too large."""
        return self.limit - self.weights - self.reserved

    def reserve(self, max_tokens: int, *, unbounded: bool = False) -> int:
        """Tokens of answer to reserve; unbounded: max_tokens is the room left, not a wish."""
        return min(max_tokens, UNBOUNDED_TOKENS) if unbounded else max_tokens

    def cost(self, prompt: Prompt, max_tokens: int) -> Cost:
        """What a prompt and an answer of `max_tokens` may come to use."""
        return self.estimate(Demand.of(prompt, max_tokens))

    def estimate(self, demand: Demand) -> Cost:
        """`cost`, from numbers alone."""
        own = self._estimate(demand)
        if self.draft is None:
            return own
        # It reads a prompt while the row decodes: what that takes is needed until the end.
        other = self.draft.estimate(demand)
        decode = own.decode + other.decode + other.features + max(other.vision, other.prefill)
        cache, growth = own.cache + other.cache, own.growth + other.growth
        return replace(own, cache=cache, decode=decode, growth=growth)

    def _estimate(self, demand: Demand) -> Cost:
        text, vision = self.config.text, self.config.vision
        slots = _slots(demand.prompt_tokens + demand.max_tokens)
        cache = self._cache_bytes(slots)
        read = min(self.chunk, demand.prompt_tokens)
        prefill = prefill_bytes(text, read, self.itemsize)
        if self.kv_bits is not None:  # a layer's keys and values, unpacked for the fused kernel
            width = text.num_key_value_heads * text.head_dim
            prefill += 2 * width * _slots(demand.prompt_tokens) * self.itemsize
        if not self.fused:
            prefill += _SCORE_COPIES * text.num_attention_heads * 4 * demand.prompt_tokens * read
        return Cost(
            demand,
            cache,
            feature_bytes(vision, demand.visual_tokens, self.itemsize),
            _DRAW_BYTES * text.vocab_size + _SCORE_COPIES * text.num_attention_heads * 4 * slots,
            self._vision_bytes(demand),
            prefill,
            -(-_GROWING * cache // text.num_hidden_layers),
        )

    def together(self, costs: Iterable[Cost]) -> int:
        """Bytes several requests may come to use at once.

        Rows of a batch have as many slots as the longest. One prompt is read at a time, and the
        pictures of one other encoded.
        """
        costs = list(costs)
        if not costs:
            return 0
        longest = max(costs, key=lambda cost: cost.cache)
        batch = len(costs) * (longest.cache + longest.growth)
        own = sum(cost.features + cost.decode for cost in costs)
        passes = [max(cost.vision for cost in costs), max(cost.prefill for cost in costs)]
        return batch + own + (max(passes) if len(costs) == 1 else sum(passes))

    def fits(self, cost: Cost, others: Iterable[Cost] = (), kept: int = 0) -> bool:
        """Whether a request fits beside others and `kept` bytes of caches."""
        return self.together([cost, *others]) + kept <= self.available

    def refuse(self, cost: Cost) -> str | None:
        """Why this request can never run, with numbers and what would fit; None if it can."""
        if self.fits(cost):
            return None
        if self.available <= 0:
            return (
                f"the model's weights take {_gib(self.weights)} GiB and {_gib(self.reserved)} GiB "
                f"are kept free for the program, of {_gib(self.limit)} GiB that may be used: load "
                "a smaller model, or one of fewer bits"
            )
        demand = cost.demand
        seen = cost.features + cost.vision
        pictures = f"pictures {_gib(seen)}, " if seen else ""
        need = self.weights + self.reserved + cost.total
        offers = list(self._offers(demand)) or list(self._last_offers(demand))
        advice = f"it would fit with {', or '.join(offers)}" if offers else "use a smaller model"
        return (
            f"this request may need {_gib(need)} GiB, and {_gib(self.limit)} GiB may be used "
            f"(weights {_gib(self.weights)}, keys and values of {demand.prompt_tokens:,} tokens of "
            f"prompt and {demand.max_tokens:,} of answer {_gib(cost.cache)}, {pictures}"
            f"working memory {_gib(cost.total - cost.cache - seen)}, kept free "
            f"{_gib(self.reserved)}): {advice}"
        )

    def _cache_bytes(self, slots: int) -> int:
        text = self.config.text
        row = text.head_dim * self.itemsize
        if self.kv_bits is not None:
            packing = KVQuantization.of(self.kv_bits, text.head_dim)
            row = packing.bytes_per_row(text.head_dim, self.itemsize)
        return 2 * text.num_hidden_layers * text.num_key_value_heads * row * slots

    def _vision_bytes(self, demand: Demand) -> int:
        """Buffers of the tower's largest pass: one image, or as much as is taken together."""
        if not demand.visual_tokens:
            return 0
        vision = self.config.vision
        together = MAX_PATCHES // vision.spatial_merge_size**2
        frames = [each for _, each in demand.videos]
        largest = max(*demand.images, *frames, min(demand.visual_tokens, together))
        row = vision.num_heads * largest * vision.spatial_merge_size**2 * 4
        scores = min(SCORE_BYTES, row * largest * vision.spatial_merge_size**2)
        return vision_bytes(vision, largest, self.itemsize) + scores  # and their exponentials

    def _offers(self, demand: Demand) -> Iterator[str]:
        """Single changes that are enough."""
        answer = _largest(
            1, demand.max_tokens - 1, lambda n: self._runs(replace(demand, max_tokens=n))
        )
        if answer:
            yield f"max_tokens={answer}"
        if pixels := self._pixels(demand):
            yield f"max_pixels={pixels}"
        for bits in self._fewer_bits():
            if replace(self, kv_bits=bits)._runs(demand):
                yield f"kv_bits={bits}"
                return

    def _last_offers(self, demand: Demand) -> Iterator[str]:
        """All changes at once, and then a shorter prompt."""
        short = replace(demand, max_tokens=min(demand.max_tokens, _SHORT_ANSWER))
        for admission in (self, *(replace(self, kv_bits=bits) for bits in self._fewer_bits())):
            bits = f" and kv_bits={admission.kv_bits}" if admission is not self else ""
            if admission._runs(short):
                yield f"max_tokens={short.max_tokens}{bits}"
                return
            if pixels := admission._pixels(short):
                yield f"max_tokens={short.max_tokens} and max_pixels={pixels}{bits}"
                return
        text = replace(short, images=(), videos=())
        length = _largest(
            1, demand.prompt_tokens - 1, lambda n: self._runs(replace(text, prompt_tokens=n))
        )
        if length:
            kind = "a prompt without pictures" if demand.visual_tokens else "a prompt"
            yield f"{kind} of at most {length:,} tokens and max_tokens={short.max_tokens}"

    def _pixels(self, demand: Demand) -> int:
        """The largest max_pixels with which the request fits; 0 if none does."""
        most = max(demand.images, default=0) - 1
        tokens = _largest(_LEAST_IMAGE, most, lambda n: self._runs(demand.with_images(n)))
        side = self.config.vision.patch_size * self.config.vision.spatial_merge_size
        return tokens * side**2

    def _runs(self, demand: Demand) -> bool:
        return self.fits(self.estimate(demand))

    def _fewer_bits(self) -> list[int]:
        """Packings smaller than this model's own, mildest first."""
        own = self.kv_bits or 8 * self.itemsize
        fits_groups = self.config.text.head_dim % 32 == 0
        return [bits for bits in sorted(KV_BITS, reverse=True) if bits < own and fits_groups]


def _slots(length: int) -> int:
    """Slots of a cache for `length` tokens: whole steps, and one begun in the middle."""
    return -(-length // STEP) * STEP + STEP


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from low to high that fits, where smaller ones always do; 0 if none."""
    if high < low or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**28 else f"{size / 2**30:.3f}"
