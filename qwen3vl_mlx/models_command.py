"""`qwen3vl models`: which checkpoints are on this machine, and how they come and go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen3vl_mlx import cli
from qwen3vl_mlx.tables import age, print_table, short

if TYPE_CHECKING:
    from rich.table import Table

    from qwen3vl_mlx.checkpoints import LocalCheckpoint

_EPILOG = """\
A NAME is a Hub id such as mlx-community/Qwen3-VL-4B-Instruct-4bit, a folder
that holds a checkpoint, or "demo". Checkpoints of the Hub are kept in its cache
($HF_HUB_CACHE, by default ~/.cache/huggingface/hub), which other programs use
too.
"""
_REMOVE = """\
What qwen3vl itself downloaded is removed after a question, which --yes answers.
For all else (what another program put into the Hub's cache, a folder of yours)
its name is to be typed, or --yes-not-mine given. Files that another revision
shares stay, links are not followed, and of a folder only a checkpoint's own
files go.
"""


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m qwen3vl_mlx.models_command"
) -> int:
    """Run the command. Returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser(prog).parse_args(given or ["list"])
    actions = {"list": list_all, "download": download, "remove": remove, "info": info}
    return cli.run(lambda: actions[args.action](args), debug=args.debug)


def parser(prog: str) -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog=prog,
        description="List, download, inspect and remove Qwen3-VL checkpoints (default: list).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    actions = whole.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        return actions.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=epilog,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    one = add("list", "show the checkpoints on this machine, their sizes and the disk they take")
    one.add_argument("folders", nargs="*", metavar="FOLDER", help="look in these too")
    one.add_argument("--json", action="store_true", help="print one JSON object")

    one = add("download", "fetch a checkpoint from the Hub, and print its folder")
    one.add_argument("name", metavar="NAME", help="Hub id, such as OWNER/NAME")
    one.add_argument("--revision", metavar="REV", help="branch, tag or commit")

    one = add("remove", "delete a checkpoint, and say how much disk that freed", _REMOVE)
    one.add_argument("name", metavar="NAME", help="Hub id or folder")
    one.add_argument("--revision", metavar="REV", help="this one only (default: all of them)")
    one.add_argument("--yes", action="store_true", help="do not ask about what qwen3vl downloaded")
    one.add_argument("--yes-not-mine", action="store_true", help="do not ask about anything")
    one.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")

    one = add("info", "tell what a checkpoint is, how it is quantized and what memory it needs")
    one.add_argument("name", metavar="NAME", help='Hub id, folder or "demo"')
    one.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    return whole


def remove(args: argparse.Namespace) -> None:
    """Delete a checkpoint. Raises Qwen3VLError."""
    from qwen3vl_mlx import models_remove

    models_remove.remove(
        args.name,
        args.revision,
        yes=args.yes,
        yes_not_mine=args.yes_not_mine,
        dry_run=args.dry_run,
    )


def info(args: argparse.Namespace) -> None:
    """Print what a checkpoint is. Raises Qwen3VLError."""
    from qwen3vl_mlx import models_info

    found = models_info.describe(args.name, args.revision)
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        models_info.show(found)


def download(args: argparse.Namespace) -> None:
    """Fetch a checkpoint and print its folder. Raises Qwen3VLError."""
    from qwen3vl_mlx import models_download

    print(models_download.download(args.name, args.revision))


def list_all(args: argparse.Namespace) -> None:
    """Print all checkpoints. Raises CheckpointError for a folder that is not there."""
    from qwen3vl_mlx.checkpoints import disk_use, local_checkpoints
    from qwen3vl_mlx.hub_cache import cache_folder

    found = local_checkpoints(args.folders)
    total, cache = disk_use(found), cache_folder()
    if args.json:
        checkpoints = [each.to_dict() for each in found]
        whole = {"checkpoints": checkpoints, "bytes": total, "cache": str(cache)}
        print(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    print_table(_table(found))
    for each in found:
        if note := _note(each):
            print(f"\n{note}")
    if all(each.source == "demo" for each in found):
        from qwen3vl_mlx.hub import DEFAULT_MODEL

        print(
            f"\nNo other Qwen3-VL checkpoint is in {short(cache)} yet. To get one of 3 GB:\n"
            f"  qwen3vl models download {DEFAULT_MODEL}\n"
            "`qwen3vl doctor` says what fits this machine."
        )
        return
    print(f"\n{cli.size(total)} on disk; the Hub's cache is {short(cache)}")


def _table(found: Sequence[LocalCheckpoint]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    head = "dim"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style=head)
    table.add_column("name", overflow="fold")
    table.add_column("weights", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for each in found:
        state = Text("complete", "green") if each.complete else Text("incomplete", "yellow")
        if each.problem:
            state = Text("unusable", "red")
        name = each.name if each.source != "folder" else short(each.folder)
        revision = f"@{each.revision[:12]}" if each.revision else ""
        table.add_row(
            Text(name, "bold").append(revision, "dim"),
            each.quantization or "?",
            cli.size(each.nbytes),
            age(each.last_used),
            state,
        )
    return table


def _note(checkpoint: LocalCheckpoint) -> str | None:
    """What to do about one that cannot be used as it is."""
    name = checkpoint.name
    if checkpoint.problem:
        return f"{name} cannot be used: {checkpoint.problem}"
    if checkpoint.complete:
        return None
    missing = ", ".join(checkpoint.missing[:2])
    more = f" and {len(checkpoint.missing) - 2} more" if len(checkpoint.missing) > 2 else ""
    if checkpoint.source != "hub cache":
        return f"{name} is not complete: {missing}{more} is missing"
    revision = f" --revision {checkpoint.revision}" if checkpoint.revision else ""
    return (
        f"{name} is not complete: {missing}{more} has not arrived. To go on:\n"
        f"  qwen3vl models download {name}{revision}"
    )


if __name__ == "__main__":
    sys.exit(main())
