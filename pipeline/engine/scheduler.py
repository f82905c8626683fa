"""Which sequences run in the next step, and where their keys and values lie. Knows no torch.

A step computes tokens of many sequences at once, whole prompts, pieces of prompts and single new tokens side by side,
within a budget of tokens. The oldest run first; when memory is short the youngest gives its slot back and is computed
again later. So the oldest always advances, and every sequence becomes the oldest.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Iterable

from pipeline.engine.slots import SlotTable, slot_size
from pipeline.engine.steps import Chunk, Entry, Prefix, Step

ROOM_AHEAD = 64  # tokens of an answer that a slot is made for at once; it grows when the answer is longer
MATES = 16  # requests with the same prefix that may go before older ones, after each that was the oldest


class Scheduler:
    """Decides what each step computes.

    Args:
        num_tokens: Keys and values of so many tokens fit the memory.
        max_running: At most this many sequences hold a slot.
        max_step_tokens: At most this many tokens are computed in a step.
        max_idle_tokens: At most this many tokens of prefixes are kept that no sequence uses; a quarter of `num_tokens`
            if None.
        refill_share: Once no more could be admitted, none is until this share of those that ran has left, or there is
            room for all that wait. For devices on which a long step costs much more than a short one: prompts come
            together then. 0 admits whenever one fits.
        short_step_tokens: How many tokens a short step has at most; whoever fits one is admitted at once.
    """

    def __init__(
        self,
        num_tokens: int,
        *,
        max_running: int,
        max_step_tokens: int,
        max_idle_tokens: int | None = None,
        refill_share: float = 0.0,
        short_step_tokens: int = 0,
    ) -> None:
        self.slots = SlotTable(num_tokens)
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.running: list[Entry] = []  # oldest first
        self._max_idle_tokens = num_tokens // 4 if max_idle_tokens is None else max_idle_tokens
        self._waiting: list[tuple[int, int, Entry]] = []  # a heap by arrival; entries that left it are skipped
        self._mates: dict[tuple[str | None, tuple[int, ...]], deque[Entry]] = {}
        self._num_waiting = 0
        self._prefixes: dict[tuple[str | None, tuple[int, ...]], Prefix] = {}
        self._arrivals = itertools.count()
        self._clock = itertools.count(1)
        self._favoured: deque[Entry] = deque()  # mates of the last that was the oldest, which go before others
        self._num_favours = 0
        self._is_favour = False  # whether the next one is admitted as a mate
        self._refill_share = refill_share
        self._short_step_tokens = short_step_tokens
        self._num_when_full = 0  # how many ran when no more could be admitted; 0 when the batch was refilled since

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a sequence is waiting or running."""
        return bool(self.running) or self._num_waiting > 0

    @property
    def prefixes(self) -> tuple[Prefix, ...]:
        """The prefixes that are kept."""
        return tuple(self._prefixes.values())

    def find_prefix(self, expert: str | None, prompt: tuple[int, ...]) -> int:
        """The length of the longest kept prefix that a prompt begins with, or 0."""
        lengths = sorted({kept.length for kept in self._prefixes.values() if kept.expert == expert}, reverse=True)
        fitting = (length for length in lengths if length < len(prompt))
        return next((length for length in fitting if (expert, prompt[:length]) in self._prefixes), 0)

    def forget_prefixes(self, expert: str) -> None:
        """Drop the prefixes of an expert that no sequence uses."""
        for prefix in list(self._prefixes.values()):
            if prefix.expert == expert and prefix.num_users == 0:
                self._drop(prefix)

    def add(self, entries: Iterable[Entry]) -> None:
        """Put sequences at the end of the queue."""
        for entry in entries:
            entry.arrival = next(self._arrivals)
            self._wait(entry)

    def remove(self, entry: Entry) -> None:
        """Forget a sequence that is finished or cancelled, waiting or running; again does nothing."""
        if entry.is_done:
            return
        entry.is_done = True
        if entry in self.running:
            self.running.remove(entry)
            self._release(entry)
        else:
            self._num_waiting -= 1
            self._leave_mates(entry)

    def rerun(self, chunks: Iterable[Chunk]) -> None:
        """Put back what a step that failed was to compute: its memory is free, and it is computed again."""
        for chunk in chunks:
            if isinstance(chunk.owner, Prefix):
                chunk.owner.num_computed = min(chunk.owner.num_computed, chunk.start)
            elif chunk.owner in self.running:
                self._preempt(chunk.owner)

    def schedule(self) -> Step:
        """Decide the next step. What it computes counts as computed from now on."""
        step = Step()
        planned: set[Prefix] = set()
        budget = self.max_step_tokens
        while len(self.running) > self.max_running:  # the limit was lowered
            self._preempt(self.running[-1])
        for entry in list(self.running):
            if budget > 0 and entry.slot is not None:  # another's growth may have taken it
                budget -= self._plan(entry, budget, step, planned)
        if not self._is_emptying():
            self._num_when_full = 0
        while budget > 0 and len(self.running) < self.max_running:
            found = self._next()
            if found is None:
                self._num_when_full = 0
                break
            num_planned = self.max_step_tokens - budget
            if self._num_when_full and num_planned + self._num_to_compute(found) > self._short_step_tokens:
                break
            if not self._admit(found, step):
                self._num_when_full = len(self.running)
                break
            if not found.is_done:  # it may be too large
                budget -= self._plan(found, budget, step, planned)
        if len(self.running) >= self.max_running:
            self._num_when_full = len(self.running)
        ranks = {prefix: at for at, prefix in enumerate(self._prefixes.values())}
        step.chunks.sort(key=lambda chunk: _place(chunk, ranks))
        step.freed = self.slots.take_freed()
        return step

    def _is_emptying(self) -> bool:
        """Whether the batch was full, and too few have left since for a long step."""
        if not self._num_when_full or not self.running:
            return False
        room = self._num_when_full - len(self.running)
        return room < min(self._num_when_full * self._refill_share, self._num_waiting)

    def _num_to_compute(self, entry: Entry) -> int:
        """How many tokens a waiting sequence has that are not computed yet."""
        prefix = self._prefixes.get(entry.group) if entry.prefix_length else None
        return entry.num_own + (entry.prefix_length if prefix is None else prefix.length - prefix.num_computed)

    def _plan(self, entry: Entry, budget: int, step: Step, planned: set[Prefix]) -> int:
        """Plan the next tokens of a running sequence, of its prefix first; how many."""
        used = 0
        prefix = entry.prefix
        if prefix is not None and prefix.slot is not None and prefix.num_computed < prefix.length:
            if prefix in planned:
                return 0  # as much as fits this step is planned already
            used = min(prefix.length - prefix.num_computed, budget)
            planned.add(prefix)
            step.chunks.append(Chunk(prefix, prefix.slot, prefix.num_computed, used, samples=False))
            prefix.num_computed += used
            if prefix.num_computed < prefix.length:
                return used
        num_own = entry.num_own
        count = min(num_own - entry.num_computed, budget - used)
        if count <= 0 or not self._grow(entry, entry.num_computed + count, step):
            return used
        if entry.slot is None:
            raise RuntimeError("a running sequence has no slot")
        start = entry.num_computed
        entry.num_computed += count
        samples = entry.num_computed == num_own
        step.chunks.append(Chunk(entry, entry.slot, start, count, samples))
        return used + count

    def _grow(self, entry: Entry, num_tokens: int, step: Step) -> bool:
        """See that a running sequence has room for so many own tokens; if not, it has been preempted."""
        old = entry.slot
        if old is not None and old.size >= num_tokens:
            return True
        ahead = min(ROOM_AHEAD, entry.max_tokens - entry.num_generated)
        wanted = num_tokens + ahead
        if not self.slots.can_allocate(wanted):
            wanted = num_tokens
        while not self.slots.can_allocate(wanted):
            if self._evict_prefix():
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is entry:
                return False
        entry.slot = self.slots.allocate(wanted)
        if old is not None:
            if entry.num_computed:
                step.moves.append((old, entry.slot, entry.num_computed))
            self.slots.free(old)
        return True

    def _admit(self, entry: Entry, step: Step) -> bool:
        """Give a waiting sequence its slots; if they are not free, it goes on waiting."""
        if self._needed(entry) > self.slots.num_tokens and entry.prefix_length:
            self._leave_mates(entry)
            entry.prefix_length = 0  # two slots may be larger than the one that holds all
        prefix = self._prefixes.get(entry.group) if entry.prefix_length else None
        ahead = min(ROOM_AHEAD, entry.max_tokens - entry.num_generated)
        if self._needed(entry) > self.slots.num_tokens:
            step.too_large.append(entry)
            self._leave_queue(entry)
            entry.is_done = True
            return True
        if prefix is None and entry.prefix_length:
            prefix = Prefix(entry.expert, entry.prompt[: entry.prefix_length])
        if prefix is not None:
            prefix.num_users += 1  # it is not evicted to make room for its own user
        missing = 0 if prefix is None or prefix.slot is not None else slot_size(prefix.length)
        least, wanted = slot_size(entry.num_own), slot_size(entry.num_own + ahead)
        while self.slots.num_free < missing + least and self._evict_prefix():
            pass
        if self.slots.num_free < missing + least:
            if prefix is not None:
                prefix.num_users -= 1
            return False
        if prefix is not None:
            if prefix.slot is None:
                prefix.slot = self.slots.allocate(prefix.length)
            self._prefixes[entry.group] = prefix
            prefix.last_used = next(self._clock)
        entry.prefix = prefix
        entry.slot = self.slots.allocate(wanted if wanted <= self.slots.num_free else least)
        entry.num_computed = 0
        self._leave_queue(entry)
        at = len(self.running)
        while at > 0 and self.running[at - 1].arrival > entry.arrival:
            at -= 1
        self.running.insert(at, entry)
        return True

    def _needed(self, entry: Entry) -> int:
        return slot_size(entry.num_own) + (slot_size(entry.prefix_length) if entry.prefix_length else 0)

    def _preempt(self, entry: Entry) -> None:
        self.running.remove(entry)
        self._release(entry)
        self._wait(entry)

    def _release(self, entry: Entry) -> None:
        if entry.slot is not None:
            self.slots.free(entry.slot)
        if entry.prefix is not None:
            entry.prefix.num_users -= 1
            entry.prefix.last_used = next(self._clock)
        entry.slot = entry.prefix = None
        entry.num_computed = 0
        while sum(prefix.length for prefix in self._idle_prefixes()) > self._max_idle_tokens:
            self._evict_prefix()

    def _idle_prefixes(self) -> list[Prefix]:
        return [prefix for prefix in self._prefixes.values() if prefix.num_users == 0]

    def _evict_prefix(self) -> bool:
        """Drop the prefix that nobody uses and nobody has used for the longest time; whether there was one."""
        idle = self._idle_prefixes()
        if idle:
            self._drop(min(idle, key=lambda prefix: prefix.last_used))
        return bool(idle)

    def _drop(self, prefix: Prefix) -> None:
        del self._prefixes[(prefix.expert, prefix.token_ids)]
        if prefix.slot is not None:
            self.slots.free(prefix.slot)
        prefix.slot = None

    def _wait(self, entry: Entry) -> None:
        heapq.heappush(self._waiting, (entry.arrival, next(self._clock), entry))
        mates = self._mates.setdefault(entry.group, deque())
        if mates and mates[0].arrival > entry.arrival:
            mates.appendleft(entry)
        else:
            mates.append(entry)
        self._num_waiting += 1

    def _leave_queue(self, entry: Entry) -> None:
        self._num_waiting -= 1
        if self._is_favour:
            self._num_favours -= 1
        else:
            self._favoured = self._mates.get(entry.group, deque())
            self._num_favours = MATES
        self._leave_mates(entry)

    def _leave_mates(self, entry: Entry) -> None:
        mates = self._mates.get(entry.group)
        while mates and (mates[0] is entry or not self._is_waiting(mates[0])):
            mates.popleft()
        if not mates:
            self._mates.pop(entry.group, None)

    def _next(self) -> Entry | None:
        """Who is admitted next: mates of the one that was the oldest, a few at most, then again the oldest."""
        while self._favoured and not self._is_waiting(self._favoured[0]):
            self._favoured.popleft()
        self._is_favour = bool(self._favoured) and self._num_favours > 0
        if self._is_favour:
            return self._favoured[0]
        while self._waiting and not self._is_waiting(self._waiting[0][2]):
            heapq.heappop(self._waiting)
        return self._waiting[0][2] if self._waiting else None

    def _is_waiting(self, entry: Entry) -> bool:
        return not entry.is_done and entry.slot is None


def _place(chunk: Chunk, ranks: dict[Prefix, int]) -> tuple[str, int, int, int]:
    """Where a chunk stands in the batch: by expert, then by prefix, the prefix itself before those that use it."""
    owner = chunk.owner
    if isinstance(owner, Prefix):
        return owner.expert or "", ranks[owner], -1, 0
    rank = len(ranks) if owner.prefix is None else ranks[owner.prefix]
    return owner.expert or "", rank, 0, owner.arrival
