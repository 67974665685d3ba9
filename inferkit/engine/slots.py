"""Slots: who sits where in the KV cache, and whose prompt prefix can be used again.

Running requests hold the slots 0, 1, ... n-1, so that a decode step reads the cache in place. When
one ends, the last one takes its slot. A free slot keeps the tokens of its last request: a new
request that begins with the same tokens (a chat's next turn, a shared instruction) continues there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from inferkit.engine.cache import SlotCache
from inferkit.engine.scheduler import Entry

# Shorter common prefixes (often just the first token) are not worth a copy.
_WORTH_A_COPY = 16


@dataclass(slots=True)
class _Held:
    """What a slot's cache holds: the tokens, and up to which position it was ever written."""

    tokens: list[int] = field(default_factory=list)
    written: int = 0


class Slots:
    """Assigns slots and reuses prefixes. Used by the engine's thread alone.

    Args:
        cache: The KV cache whose rows are assigned.
        reuse: Whether prompt prefixes are reused.
    """

    def __init__(self, cache: SlotCache, reuse: bool) -> None:
        self.reuse = reuse
        self._cache = cache
        self._active: list[Entry] = []
        # What each free slot still holds, and when it became free.
        self._kept = [_Held() for _ in range(cache.slots)]
        self._age = [0] * cache.slots
        self._clock = 0
        self._seeded: set[int] = set()
        # Who waits for whom to compute the prefix that they share.
        self._awaited: dict[int, Entry] = {}

    def take(self, entry: Entry) -> None:
        """Give an admitted request the next slot, filled with the free one that suits it best."""
        slot = len(self._active)
        free = range(slot, self._cache.slots)
        best = max(free, key=lambda s: (self._usable(entry, self._kept[s]), -self._age[s]))
        if best != slot:
            self._cache.swap(slot, best, max(self._kept[slot].written, self._kept[best].written))
            self._kept[slot], self._kept[best] = self._kept[best], self._kept[slot]
            self._age[slot], self._age[best] = self._age[best], self._age[slot]
        entry.slot = slot
        self._active.append(entry)

    def seed(self, entry: Entry) -> bool:
        """Before a prompt's first prefill, take over the longest prefix that is in the cache.

        Returns False where the request had better wait: another one is about to compute a longer
        common prefix.
        """
        if id(entry) in self._seeded:
            return True
        ahead = self._awaited.get(id(entry))
        # Only for one in an earlier slot: two that changed places would wait for each other.
        if ahead is not None and ahead.prefilling and ahead.slot < entry.slot:
            return False
        held = self._kept[entry.slot]
        source, length, written = entry.slot, self._usable(entry, held), held.written
        if self.reuse:
            for slot, other in self._others(entry):
                usable = self._usable(entry, other)
                if usable >= length + _WORTH_A_COPY:
                    source, length, written = slot, usable, other.written
            ahead, soon = self._soon(entry)
            if ahead is not None and soon >= length + _WORTH_A_COPY:
                self._awaited[id(entry)] = ahead
                return False
        if source != entry.slot:
            self._cache.copy_prefix(source, entry.slot, length)
        entry.computed, entry.written = length, written if length else 0
        self._kept[entry.slot] = _Held()
        self._seeded.add(id(entry))
        self._awaited.pop(id(entry), None)
        return True

    def next_position(self, slot: int) -> int:
        """Where a token can be written to a slot without harm to what it holds."""
        if slot < len(self._active) and id(self._active[slot]) in self._seeded:
            return self._active[slot].computed
        return len(self._kept[slot].tokens)

    def free(self, entry: Entry, *, keep: bool) -> None:
        """Take a request's slot back; ``keep`` its tokens for later prefixes, or wipe them.

        What failed may have left NaN, which would spread to its next request: see `cache.py`.
        """
        if not keep:
            self._cache.wipe(entry.slot)
        held = self._holds(entry) if keep and self.reuse else _Held()
        last = self._active[-1]
        if last is not entry:
            mine, other = entry.slot, last.slot
            self._cache.swap(mine, other, max(held.written, self._holds(last).written, 1))
            self._kept[mine] = self._kept[other]
            entry.slot, last.slot = other, mine
            self._active[mine] = last
        self._active.pop()
        self._clock += 1
        self._kept[entry.slot], self._age[entry.slot] = held, self._clock
        self._seeded.discard(id(entry))
        self._awaited.pop(id(entry), None)
        self._awaited = {k: ahead for k, ahead in self._awaited.items() if ahead is not entry}
        entry.slot = -1

    def _holds(self, entry: Entry) -> _Held:
        """What an active slot holds: its own tokens, or before its first prefill what was kept."""
        if id(entry) not in self._seeded:
            return self._kept[entry.slot]
        return _Held(entry.tokens[: entry.computed], max(entry.written, entry.computed))

    def _others(self, entry: Entry) -> Iterator[tuple[int, _Held]]:
        for slot, kept in enumerate(self._kept):
            if slot >= len(self._active):
                yield slot, kept
            elif self._active[slot] is not entry:
                yield slot, self._holds(self._active[slot])

    def _usable(self, entry: Entry, held: _Held) -> int:
        """Length of the common prefix that can be continued; the last prompt token never counts."""
        if not self.reuse or not held.tokens:
            return 0
        length = min(common_prefix(entry.tokens, held.tokens), entry.prompt_length - 1)
        # One more, for the token that a decode step may have written after the last (see
        # `next_position`).
        return length if length and self._cache.reusable(length, held.written + 1) else 0

    def _soon(self, entry: Entry) -> tuple[Entry | None, int]:
        """The request ahead of this one that is about to compute the longest common prefix."""
        ahead = [e for e in self._active[: entry.slot] if e.prefilling]
        shared = [common_prefix(entry.tokens, e.tokens) for e in ahead]
        if not shared:
            return None, 0
        best = max(range(len(ahead)), key=shared.__getitem__)
        return ahead[best], min(shared[best], entry.prompt_length - 1)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same.

    By halves, for slices compare in C: prompts have thousands of tokens, and a step compares many.
    """
    same, end = 0, min(len(a), len(b))
    while same < end:
        middle = (same + end + 1) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same
