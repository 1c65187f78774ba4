"""`qwen3vl caption`: a question about every picture of a folder, answers in one file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qwen3vl_mlx import cli
from qwen3vl_mlx.album import options
from qwen3vl_mlx.answering import add_source

_EPILOG = """variables of --prompt, empty where a picture does not say ({{{{ and }}}} are braces):
{variables}

examples:
  qwen3vl caption ~/Pictures --recursive --out captions.jsonl
  qwen3vl caption scans --schema receipt.json --out receipts.csv --temperature 0
  qwen3vl caption photos --prompt "Taken {{date}} in {{folder}}. Describe it." --out sidecar

A line of results has file (named from the folder given), caption or data (with --schema) or error,
model, finish_reason, prompt_tokens, completion_tokens, seconds, width, height, taken, camera, gps,
path, size, modified, sha256 and settings, as far as they are known, in the order in which answers
come. CSV has these columns always, and one for each property of a schema.

However a run ends, the same command goes on from there: what --out holds is not asked again. A
picture whose content has changed is, and so are all of them with another prompt, system message,
schema, model, sampling or resolution; a new line is added then, and old ones stay. A record is in
the file at once, and handed to the disk: kill -9 loses nothing, a power failure one record at most.
Sidecars are known by .qwen3vl-captions.jsonl in the folder, and replaced only where unedited.

Hidden files and folders, and Photos libraries within a folder, are left out; a Photos library given
as FOLDER is read for its originals. FILES are taken whatever their names.

Exit status: 0 all pictures have answers, 1 the machine or the server failed, 2 bad options or
input, 3 some pictures failed (their errors are in the results), 130 interrupted, 141 the reader
closed stdout.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Describe every picture of a folder, or ask the same question about each.",
        epilog=_EPILOG.format(variables=options.variables_help(counting=True)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("sources", nargs="+", metavar="FOLDER", help="folders, or files, of pictures")
    out = p.add_argument_group("output")
    options.add_output(out)
    out.add_argument("--limit", type=int, metavar="N", help="ask about N pictures at most")
    out.add_argument("--retry-failed", action="store_true", help="ask again what failed before")
    out.add_argument("--force", action="store_true", help="ask again all, replace any sidecar")
    out.add_argument("--dry-run", action="store_true", help="print what would be asked")
    options.add_selection(p)
    options.add_question(p)
    add_source(p)
    options.add_answer(p)
    return p


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.caption") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)

    def action() -> None:
        from qwen3vl_mlx.album.captioning import caption

        caption(args)

    return cli.run(action, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
