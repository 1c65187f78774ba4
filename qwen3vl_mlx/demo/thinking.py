"""The demo checkpoint as a Thinking model: `python -m qwen3vl_mlx.demo.thinking FOLDER`.

The same weights think one line before they answer when the chat template of the released Thinking
models asks for it. This writes a checkpoint with that template.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen3vl_mlx import cli
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import InputError
from qwen3vl_mlx.publish import new_folder

_TEMPLATE = Path(__file__).with_name("thinking_chat_template.jinja")


def write_twin(folder: Path, source: Path = CHECKPOINT) -> Path:
    """Write `source` with the Thinking template as the new `folder`, and return it.

    Raises InputError where `folder` exists already, OutputError where it cannot be written.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already; name a new folder")
    with new_folder(folder, force=False) as work:
        shutil.copytree(source, work, dirs_exist_ok=True)
        shutil.copyfile(_TEMPLATE, work / "chat_template.jinja")
    return folder


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.demo.thinking"
) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to write")
    args = parser.parse_args(argv)
    return cli.run(lambda: print(write_twin(args.folder)))


if __name__ == "__main__":
    sys.exit(main())
