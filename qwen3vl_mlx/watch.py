"""`qwen3vl watch`: a question about every new picture of a folder, as it comes."""

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
  qwen3vl watch ~/Desktop --glob "Screenshot*" --prompt "Read the text." --out screenshots.jsonl
  qwen3vl watch scans --schema receipt.json --out receipts.csv --existing
  qwen3vl watch inbox | while read -r line; do echo "$line" | jq -r .caption; done

Results are those of `qwen3vl caption`, whose help explains them; both may be given the same --out,
in turn. A file is asked about when nobody has written to it for --settle seconds and it can be
decoded to its end; one that cannot is waited for, --patience seconds from its last change. A file
that is there again under another name is a new one; one that is touched, or saved again with the
same content, is not.

What is there when a folder is first watched is left alone while it keeps its size, or done with
--existing. With --out that
is remembered, in a hidden file beside the results: a watch that begins again does what came in the
meantime, and nothing twice, however it was ended.

Exit status: 0 ended by Ctrl-C or SIGTERM, 1 the machine or the server failed, 2 bad options or
input, 3 ended so, and some pictures failed, 130 interrupted before it began, 141 the reader closed
stdout.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Describe new pictures of a folder as they come, each once.",
        epilog=_EPILOG.format(variables=options.variables_help(counting=False)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="folders to watch")
    options.add_output(p.add_argument_group("output"))
    options.add_selection(p)
    coming = p.add_argument_group("how they come")
    coming.add_argument(
        "--existing", action="store_true", help="do what is there already, not only what comes"
    )
    coming.add_argument(
        "--settle",
        type=float,
        default=0.5,
        metavar="S",
        help="a file is whole when it has not changed for S seconds (default 0.5)",
    )
    coming.add_argument(
        "--patience",
        type=float,
        default=10.0,
        metavar="S",
        help="wait S seconds for the rest of a damaged file (default 10)",
    )
    options.add_question(p)
    add_source(p)
    options.add_answer(p)
    return p


def main(argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.watch") -> int:
    """Run the command. Returns the exit status."""
    args = parser(prog).parse_args(argv)

    def action() -> None:
        from qwen3vl_mlx.album.watching import watch

        watch(args)

    return cli.run(action, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
