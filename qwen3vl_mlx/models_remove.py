"""`qwen3vl models remove`: nothing goes that is not shown first, and nothing of others unasked."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from qwen3vl_mlx import cli, hub
from qwen3vl_mlx.checkpoints import (
    LocalCheckpoint,
    cached_revisions,
    checkpoint_at,
    disk_use,
)
from qwen3vl_mlx.demo import CHECKPOINT
from qwen3vl_mlx.errors import CheckpointError, InputError, OutputError, Qwen3VLError
from qwen3vl_mlx.hub_cache import CachedRepo, cache_folder, cached_repo
from qwen3vl_mlx.tables import short

# What a checkpoint's folder is made of; anything else in it is its owner's.
_PARTS = (
    *("config.json", "generation_config.json", "configuration.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.*"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "model*.safetensors", "model.safetensors.index.json"),
    *("README.md", "LICENSE*", "NOTICE*", ".gitattributes", ".DS_Store"),
)


@dataclass(frozen=True)
class Removal:
    """What would be removed: of which place, and how many bytes that frees.

    ours: this package downloaded all of it. stays: what of the place remains, and why.
    execute: does it. Raises OSError.
    """

    name: str
    place: Path
    what: str
    nbytes: int
    ours: bool
    stays: tuple[str, ...]
    execute: Callable[[], None]


def remove(
    name: str,
    revision: str | None = None,
    *,
    yes: bool = False,
    yes_not_mine: bool = False,
    dry_run: bool = False,
) -> None:
    """Remove a checkpoint after asking. Raises InputError, CheckpointError, OutputError.

    yes: do not ask about what this package downloaded; yes_not_mine: nor about anything else.
    """
    removal = plan_removal(name, revision)
    show(removal)
    if dry_run:
        print(f"would free {cli.size(removal.nbytes)}; nothing was removed")
        return
    if not (yes_not_mine or (yes and removal.ours)):
        confirm(removal)
    try:
        removal.execute()
    except OSError as error:
        raise OutputError(f"{removal.place} could not be removed whole: {error}") from error
    print(f"freed {cli.size(removal.nbytes)}")


def plan_removal(name: str, revision: str | None = None) -> Removal:
    """What removing `name` means. Changes nothing."""
    if name == "demo":
        raise InputError("the demo checkpoint comes with this package and cannot be removed")
    folder = hub.local_folder(name, revision)
    if folder is not None:
        return _of_folder(name, folder)
    repo = cached_repo(name)
    found = cached_revisions(repo)
    if not found:
        there = repo.snapshots()
        why = (
            "is of another family: `hf cache rm` removes it" if there else "is not on this machine"
        )
        raise CheckpointError(f"{name} {why}; `qwen3vl models list` shows what is here")
    chosen = found
    if revision is not None:
        chosen = [each for each in found if _answers_to(each, revision)]
        if not chosen:
            known = ", ".join(each.refs[0] if each.refs else each.folder.name for each in found)
            raise CheckpointError(f"{name} has no revision {revision!r} here; it has {known}")
    return _of_cache(repo, found, chosen)


def _answers_to(checkpoint: LocalCheckpoint, revision: str) -> bool:
    commit = checkpoint.commit or ""
    return revision in checkpoint.refs or (len(revision) >= 7 and commit.startswith(revision))


def _of_cache(
    repo: CachedRepo, found: Sequence[LocalCheckpoint], chosen: Sequence[LocalCheckpoint]
) -> Removal:
    """Snapshots of a repository; what other snapshots share stays."""
    if repo.folder.is_symlink():
        target = os.readlink(repo.folder)
        raise CheckpointError(f"{repo.folder} is a link to {target}: links are not followed")
    is_whole = len(chosen) == len(repo.snapshots())
    delete = _deletion(repo, [each.folder.name for each in chosen], is_whole)
    rest = [each for each in found if each not in chosen]

    def execute() -> None:
        delete()
        for each in chosen:
            if each.folder.exists():  # the library only logs what it may not delete
                raise OutputError(f"{each.folder} could not be removed: check its permissions")
            repo.forget(each.folder.name)

    gone = chosen
    if not is_whole:  # parts of files stay where another revision may need them
        gone, rest = [_without_parts(each) for each in gone], [_without_parts(r) for r in rest]
    frees = disk_use([*gone, *rest]) - disk_use(rest)
    shared = disk_use(gone) - frees
    return Removal(
        name=repo.repo_id,
        place=repo.folder,
        what=", ".join(map(_summary, chosen)),
        nbytes=frees,
        ours=any(each.downloaded_here for each in chosen)
        and all(each.downloaded_here for each in chosen if each.has_weights),
        stays=(f"{cli.size(shared)} that other revisions share",) if shared else (),
        execute=execute,
    )


def _deletion(repo: CachedRepo, commits: Sequence[str], is_whole: bool) -> Callable[[], None]:
    """What deletes snapshots by the Hub library's own plan, of this repository alone."""
    from huggingface_hub import scan_cache_dir

    scanned = scan_cache_dir(cache_folder())
    # Copies of a repository have its commits, and the library takes the first it meets.
    mine = frozenset(each for each in scanned.repos if each.repo_path.samefile(repo.folder))
    if mine:
        return replace(scanned, repos=mine).delete_revisions(*commits).execute
    if is_whole:  # too damaged for the library to plan
        return lambda: shutil.rmtree(repo.folder)
    problems = "; ".join(str(each) for each in scanned.warnings if str(repo.folder) in str(each))
    raise CheckpointError(
        f"{repo.folder} is damaged ({problems[:300]}); it can be removed whole, without --revision"
    )


def _without_parts(checkpoint: LocalCheckpoint) -> LocalCheckpoint:
    whole = tuple(each for each in checkpoint.files if not each.name.endswith(".incomplete"))
    return replace(checkpoint, files=whole)


def _of_folder(name: str, folder: Path) -> Removal:
    """The files of a checkpoint in a folder, and the folder itself where nothing else is in it."""
    if folder.is_symlink():
        target = os.readlink(folder)
        raise InputError(f"{name} is a link to {target}: links are not followed, give the folder")
    _refuse_places(name, folder)
    found = checkpoint_at(folder)
    mine = [path for path in sorted(folder.iterdir()) if _is_part(path)]
    stays = tuple(path.name for path in sorted(folder.iterdir()) if path not in mine)
    mine.sort(key=lambda path: path.name == "config.json")  # last: it is what tells what this is
    sizes = {(s.st_dev, s.st_ino): s.st_size for s in map(Path.lstat, mine) if s.st_nlink == 1}

    def execute() -> None:
        for path in mine:
            path.unlink()
        if not stays:
            folder.rmdir()

    return Removal(
        name=name,
        place=folder,
        what=_summary(found),
        nbytes=sum(sizes.values()),
        ours=False,
        stays=stays,
        execute=execute,
    )


def _is_part(path: Path) -> bool:
    is_file = path.is_symlink() or path.is_file()
    return is_file and any(fnmatch(path.name, pattern) for pattern in _PARTS)


def _refuse_places(name: str, folder: Path) -> None:
    """Folders that are not their owner's to remove so."""
    place, cache = folder.resolve(), cache_folder().resolve()
    if place == CHECKPOINT.resolve():
        raise InputError("the demo checkpoint comes with this package and cannot be removed")
    if cache in place.parents:
        parts = place.relative_to(cache).parts[0].split("--")
        known = "/".join(parts[1:]) if parts[0] == "models" else "its Hub id"
        raise InputError(f"{name} is in the Hub's cache: give {known} in place of the folder")


def _summary(checkpoint: LocalCheckpoint) -> str:
    """`4B Instruct, 4bit`, and the revision where it is not the main one."""
    words = [checkpoint.model, checkpoint.quantization]
    if checkpoint.revision:
        words.append(f"revision {checkpoint.revision[:12]}")
    if not checkpoint.complete:
        words.append("incomplete")
    return ", ".join(word for word in words if word)


def show(removal: Removal) -> None:
    """What would go, on stderr."""
    origin = "by qwen3vl" if removal.ours else "not by qwen3vl: it may be in use elsewhere"
    lines = [
        f"{removal.name} ({removal.what})",
        f"  place       {short(removal.place)}",
        f"  frees       {cli.size(removal.nbytes)}",
        f"  put there   {origin}",
    ]
    if removal.stays:
        more = f" and {len(removal.stays) - 5} more" if len(removal.stays) > 5 else ""
        lines.append(f"  stays       {', '.join(removal.stays[:5])}{more}")
    print("\n".join(lines), file=sys.stderr)


def confirm(removal: Removal) -> None:
    """Ask in the terminal. Raises InputError where there is none, Qwen3VLError for a no."""
    if not sys.stdin.isatty():
        flag = "--yes" if removal.ours else "--yes-not-mine"
        raise InputError(f"nothing was removed: there is nobody to ask; {flag} answers for you")
    if removal.ours:
        agreed = _ask("Remove it? [y/N] ").lower() in ("y", "yes")
    else:
        agreed = _ask("Type its name to remove it: ") == removal.name
    if not agreed:
        raise Qwen3VLError("not confirmed: nothing was removed")


def _ask(question: str) -> str:
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip()
