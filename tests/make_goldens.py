"""Write data/goldens/*.npz: stages of HF runs, thinned, for tests that must do without torch.

python tests/make_goldens.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import hf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from stages import GOLDENS, digest, golden_file, make_prompt, make_scene, write_checkpoint

from qwen3vl_mlx.models.config import read_config
from qwen3vl_mlx.processing.processor import Processor


def golden_arrays(
    model: Any, folder: Path, processor: Processor, case: str
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one case by name. Positions are whole, stages thinned."""
    scene = make_scene(case)
    token_ids = make_prompt(scene, processor).token_ids
    inputs = hf.model_inputs(model, folder, [scene], [token_ids])
    (found,) = hf.run(model, inputs)
    position_ids, rope_deltas = hf.rope_index(model, inputs)
    return {
        "token_ids": token_ids,
        "position_ids": position_ids[:, 0, : len(token_ids)].astype(np.int32),
        "rope_delta": rope_deltas[0].astype(np.int32),
        **{f"stage/{name}": digest(x) for name, x in found.items()},
    }


def main() -> None:
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as root:
        for name, cases in GOLDENS.items():
            folder = write_checkpoint(Path(root) / name, name)
            model = hf.load_hf(folder)
            processor = Processor.from_folder(folder, read_config(folder))
            arrays: dict[str, Any] = {"made_with": np.array(made_with)}
            for case in cases:
                found = golden_arrays(model, folder, processor, case)
                arrays |= {f"{case}/{key}": x for key, x in found.items()}
            golden_file(name).parent.mkdir(exist_ok=True)
            np.savez_compressed(golden_file(name), **arrays)
            print(f"{golden_file(name)}: {golden_file(name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
