"""Paged KV cache: fixed blocks, reference counts, and a prefix cache with LRU eviction.

A block is *held* by one or more sequences or *free*. A free block may still carry the KV of a
known prefix: it is then found again by its hash, until it comes to the head of the free list and
is given to someone else. All operations take constant time a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


def chain(parent: int, tokens: Sequence[int]) -> int:
    """The hash of a full block: of its tokens and of all blocks before it."""
    return hash((parent, *tokens))


class BlockPool:
    """`count` blocks of `size` tokens. `prefix_caching` off: nothing is looked up; `forgetful`:
    it is looked up and never found (a fault to inject)."""

    def __init__(
        self, count: int, size: int, *, prefix_caching: bool = True, forgetful: bool = False
    ) -> None:
        self.count = count
        self.size = size
        self.prefix_caching = prefix_caching
        self._remembers = prefix_caching and not forgetful
        self._references = [0] * count
        self._hash: list[int | None] = [None] * count
        self._cached: dict[int, int] = {}
        # In order of eviction: least recently freed first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that are held, 0 to 1."""
        return 1.0 - len(self._free) / self.count

    def references(self, block: int) -> int:
        return self._references[block]

    def match(self, hashes: Iterable[int]) -> list[int]:
        """Blocks that carry the longest known beginning of a chain of hashes."""
        found: list[int] = []
        for value in hashes:
            block = self._cached.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def available(self, beside: Iterable[int]) -> int:
        """Blocks that could be allocated if those of `beside` were held first."""
        return len(self._free) - sum(1 for block in beside if self._references[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Take one reference each of blocks that `match` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for a new owner, evicting what they carried.

        Raises ValueError if there are not so many: ask `free` before.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        taken: list[int] = []
        for _ in range(count):
            block, _nothing = self._free.popitem(last=False)
            known = self._hash[block]
            if known is not None:
                del self._cached[known]
                self._hash[block] = None
            self._references[block] = 1
            taken.append(block)
        return taken

    def register(self, block: int, value: int) -> None:
        """Say that a held block is full and carries this prefix. The first block to say so wins."""
        if self._remembers and value not in self._cached and self._hash[block] is None:
            self._cached[value] = block
            self._hash[block] = value

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference each. A sequence's last block is the first to be evicted."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def forget(self) -> None:
        """Drop the prefix cache; who holds blocks keeps them."""
        self._cached.clear()
        self._hash = [None] * self.count

    def lose(self, count: int) -> int:
        """Leak up to `count` free blocks for good (a fault to inject); gives how many."""
        lost = min(count, len(self._free))
        for block in self.allocate(lost):
            self._references[block] = 1
        return lost
