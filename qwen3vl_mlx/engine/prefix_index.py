"""Which files of a prefix cache's folder hold which tokens of which prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qwen3vl_mlx.engine.prefix_file import Head
from qwen3vl_mlx.engine.radix import Node, Values, add, remove, split, walk


@dataclass(eq=False)
class FileEntry:
    """A file: written, or about to be."""

    head: Head
    nbytes: int
    end: Node[frozenset[str]]  # of the index, where its last token is
    written: bool


@dataclass
class FileIndex:
    """Which files hold which rows. A node's data: the names of the files that hold all of it."""

    root: Node[frozenset[str]] = field(
        default_factory=lambda: Node(np.zeros((0,), np.int64), frozenset(), None)
    )
    entries: dict[str, FileEntry] = field(default_factory=dict)
    written: int = 0  # files, and their bytes
    nbytes: int = 0

    def insert(self, name: str, head: Head, nbytes: int, *, written: bool) -> None:
        end = self._cut(head.values)
        self._cut(head.values[: head.start])
        entry = self.entries[name] = FileEntry(head, nbytes, end, False)
        for node in self._covered(entry):
            node.data |= {name}
        if written:
            self.mark_written(name)

    def mark_written(self, name: str) -> None:
        entry = self.entries[name]
        entry.written = True
        self.written += 1
        self.nbytes += entry.nbytes

    def discard(self, name: str) -> None:
        entry = self.entries.pop(name, None)
        if entry is None:
            return
        self.written -= entry.written
        self.nbytes -= entry.nbytes * entry.written
        for node in self._covered(entry):
            node.data -= {name}
        node = entry.end
        while node.parent is not None and not node.children and not node.data:
            parent = node.parent
            remove(node)
            node = parent

    def plan(self, values: Values, *, written: bool) -> list[tuple[str, int]]:
        """A file and how many rows of it, in order, for the longest prefix the files hold."""
        steps: list[tuple[str, int]] = []
        for node, count in walk(self.root, values):
            names = [name for name in node.data if self.entries[name].written or not written]
            if not names:
                break
            same = steps and steps[-1][0] in names  # stay in one file as long as it goes
            steps.append((steps[-1][0] if same else min(names), count))
        return steps

    def _covered(self, entry: FileEntry) -> list[Node[frozenset[str]]]:
        """Nodes of the entry's own rows."""
        nodes, left = [], len(entry.head.values) - entry.head.start
        for node in entry.end.path():
            if left <= 0:
                break
            nodes.append(node)
            left -= len(node.values)
        return nodes

    def _cut(self, values: Values) -> Node[frozenset[str]]:
        """The node that ends where `values` end: made if there is none."""
        path = walk(self.root, values)
        done = sum(count for _, count in path)
        node, count = path[-1] if path else (self.root, 0)
        if path and count < len(node.values):
            node = split(node, count, lambda names, _: (names, names))
        if done < len(values):
            node = add(node, values[done:].copy(), frozenset())
        return node
