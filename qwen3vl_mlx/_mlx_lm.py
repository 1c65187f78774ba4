"""mlx-lm's submodules without its `__init__`, which imports transformers and costs seconds.

`from qwen3vl_mlx._mlx_lm.models.cache import KVCache` runs mlx-lm's own installed file. Nothing is
patched: a later `import mlx_lm` in the same process works as ever, with classes of its own.
"""

from importlib.util import find_spec

_spec = find_spec("mlx_lm")
if _spec is None or _spec.submodule_search_locations is None:
    raise ImportError("mlx-lm is not installed; run: pip install mlx-lm")

__path__ = list(_spec.submodule_search_locations)
