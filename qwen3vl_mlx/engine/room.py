"""Memory for requests, which caches give way to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from qwen3vl_mlx.engine.admission import Admission, Cost
from qwen3vl_mlx.engine.feature_cache import FeatureCache
from qwen3vl_mlx.engine.job import Job
from qwen3vl_mlx.engine.prefix_cache import PrefixCache

Caches: TypeAlias = Sequence["FeatureCache | PrefixCache"]  # the least dear first


def make_room(admission: Admission, costs: Sequence[Cost], caches: Caches) -> bool:
    """Whether requests of these costs may run together, after caches have given way."""
    if admission.together(costs) > admission.available:
        return False
    shrink_caches(admission, costs, caches)
    return True


def shrink_caches(admission: Admission, costs: Sequence[Cost], caches: Caches) -> None:
    """Let caches give way to requests of these costs."""
    held = sum(cache.stats.bytes for cache in caches)
    excess = admission.together(costs) + held - admission.available
    for cache in caches:
        if excess > 0:
            before = cache.stats.bytes
            cache.shrink(max(0, before - excess))
            excess -= before - cache.stats.bytes


def who_gives_way(
    admission: Admission, job: Job, reading: Iterable[Job], running: Iterable[Job]
) -> Job | None:
    """Who is put back for `job` to go on, itself before others; None if nobody could go on later.

    Nobody could whose prompt and answer so far are too long to be read anew at once.
    """
    others = [*reversed([*reading]), *reversed([each for each in running if each is not job])]
    fits = (each for each in [job, *others] if admission.fits(each.resumed(admission)))
    return next(fits, None)
