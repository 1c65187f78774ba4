"""A radix tree over int64 sequences: each node holds a run of values and something kept for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Values = npt.NDArray[np.int64]


class Node(Generic[T]):
    """A run of values below `parent`, whose children start with different values."""

    def __init__(self, values: Values, data: T, parent: Node[T] | None):
        self.values = values  # (n,)
        self.data = data
        self.parent = parent
        self.children: dict[int, Node[T]] = {}

    def path(self) -> Iterator[Node[T]]:
        """From this node up to the child of the root it hangs on."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


def walk(root: Node[T], values: Values) -> list[tuple[Node[T], int]]:
    """The nodes along `values` and how many of each node's values agree; only the last may differ.

    The root holds no values and is not listed. Each node costs one comparison of arrays.
    """
    path: list[tuple[Node[T], int]] = []
    node, start = root, 0
    while start < len(values):
        child = node.children.get(int(values[start]))
        if child is None:
            break
        agreed = shared_prefix(child.values, values[start:])
        path.append((child, agreed))
        if agreed < len(child.values):
            break
        node, start = child, start + agreed
    return path


def shared_prefix(ours: Values, theirs: Values) -> int:
    count = min(len(ours), len(theirs))
    differs = ours[:count] != theirs[:count]
    first = int(differs.argmax()) if count else 0
    return first if count and differs[first] else count


def add(parent: Node[T], values: Values, data: T) -> Node[T]:
    """A new child of `parent`, which may have none that starts with the same value."""
    node = Node(values, data, parent)
    parent.children[int(values[0])] = node
    return node


def split(node: Node[T], at: int, divide: Callable[[T, int], tuple[T, T]]) -> Node[T]:
    """Cut `node` after `at` of its values: it becomes the tail, the head returned its parent."""
    assert node.parent is not None
    first, second = divide(node.data, at)
    head = Node(node.values[:at].copy(), first, node.parent)
    node.parent.children[int(head.values[0])] = head
    node.values, node.data, node.parent = node.values[at:].copy(), second, head
    head.children[int(node.values[0])] = node
    return head


def remove(node: Node[T]) -> None:
    """Unhook a node, and with it all below."""
    assert node.parent is not None
    del node.parent.children[int(node.values[0])]
    node.parent = None
