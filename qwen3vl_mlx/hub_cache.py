"""The Hub's cache on disk: repositories, their snapshots, and which of these were fetched by us.

The layout is the Hub library's: `models--OWNER--NAME/{blobs,refs,snapshots/COMMIT}`. The folder of
a commit that this package downloaded holds an empty hidden file: a note that moves and goes with
what it is about, so that it never claims what another program fetched later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_NOTE = ".qwen3vl_mlx"


@dataclass(frozen=True)
class CachedRepo:
    """A model's repository in the cache. It need not be there yet."""

    repo_id: str
    folder: Path

    def snapshots(self) -> list[Path]:
        """Folders of the commits of which something has arrived."""
        try:
            inside = sorted((self.folder / "snapshots").iterdir())
        except OSError:
            return []
        return [path for path in inside if path.is_dir() and not path.is_symlink()]

    def refs(self, commit: str) -> tuple[str, ...]:
        """The branches and tags that lead to a commit, as far as known here; main first."""
        root, found = self.folder / "refs", []
        for path in root.rglob("*"):
            with suppress(OSError, UnicodeDecodeError):
                if path.is_file() and path.read_text(encoding="utf-8").strip() == commit:
                    found.append(path.relative_to(root).as_posix())
        return tuple(sorted(found, key=lambda ref: (ref != "main", ref)))

    def was_downloaded_here(self, commit: str) -> bool:
        """Whether this package fetched the weights of a commit, by its own note."""
        return self._note(commit).is_file()

    def forget(self, commit: str) -> None:
        """Take back the note that a commit was fetched by this package."""
        with suppress(OSError):
            self._note(commit).unlink()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the commits whose first weights arrive in this block, however it ends."""
        before = self._weighty()
        try:
            yield
        finally:
            # Without the note the owner is asked once more before a removal: no error.
            with suppress(OSError):
                for commit in self._weighty() - before:
                    self._note(commit).touch()

    def _note(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit / _NOTE

    def _weighty(self) -> set[str]:
        return {path.name for path in self.snapshots() if any(path.glob("*.safetensors"))}


def cache_folder() -> Path:
    """The cache's own folder, from $HF_HUB_CACHE or $HF_HOME. It need not be there yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def cached_repo(repo_id: str) -> CachedRepo:
    """The place of a repository in the cache."""
    return CachedRepo(repo_id, cache_folder() / "--".join(["models", *repo_id.split("/")]))


def cached_repos() -> list[CachedRepo]:
    """The models' repositories in the cache, of all families, by name."""
    found = []
    for folder in cache_folder().glob("models--*--*"):
        owner, name = folder.name.removeprefix("models--").split("--", 1)
        found.append(CachedRepo(f"{owner}/{name}", folder))
    return sorted(found, key=lambda repo: repo.repo_id.lower())
