"""Who runs next: random histories on a device of lists, and each rule by an example."""

import gc
import random
import weakref
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.engine.scheduler import MATES, ROOM_AHEAD, Scheduler
from pipeline.engine.slots import Slot, slot_size
from pipeline.engine.steps import Entry, Prefix, Step
from tests.profiles import num_examples

EXPERTS = (None, "extract", "sql")

Text = tuple[int, ...]


def next_token(expert: str | None, text: Sequence[int]) -> int:
    """A model whose every token depends on the expert and on all tokens before."""
    return hash((EXPERTS.index(expert), *text)) % 1000


def answer(expert: str | None, prompt: Text, count: int) -> list[int]:
    """What is generated for a prompt when nobody else is there."""
    text = list(prompt)
    for _ in range(count):
        text.append(next_token(expert, text))
    return text[len(prompt) :]


class Device:
    """Does steps as the runner does: it moves, frees, computes. Keys and values are a list of tokens for each slot."""

    def __init__(self) -> None:
        self.contents: dict[Slot, list[int]] = {}
        self.num_computed: Counter[Entry | Prefix] = Counter()

    def prepare(self, step: Step) -> None:
        """Move and free; this is done also where computing fails."""
        for old, new, count in step.moves:
            assert new not in self.contents
            assert count == len(self.contents[old])
            self.contents[new] = list(self.contents[old])
        for slot in step.freed:
            self.contents.pop(slot, None)

    def compute(self, step: Step) -> dict[Entry, int]:
        """The tokens chosen for those that sample."""
        chosen = {}
        for chunk in step.chunks:
            owner, contents = chunk.owner, self.contents.setdefault(chunk.slot, [])
            assert len(contents) == chunk.start, "a chunk begins where the computed tokens end"
            self.num_computed[owner] += chunk.count
            if isinstance(owner, Prefix):
                contents += owner.token_ids[chunk.start : chunk.start + chunk.count]
                continue
            before: list[int] = []
            if owner.prefix is not None:
                assert owner.prefix.slot is not None
                before = self.contents[owner.prefix.slot]
                assert tuple(before) == owner.prefix.token_ids, "a prefix is whole before its users are computed"
                assert owner.prefix.expert == owner.expert
            contents += owner.own_tokens(chunk.start, chunk.count)
            assert len(contents) == chunk.start + chunk.count <= chunk.slot.size
            seen, text = before + contents, [*owner.prompt, *owner.generated]
            assert seen == text[: len(seen)]
            assert chunk.samples == (len(seen) == len(text))
            if chunk.samples:
                chosen[owner] = next_token(owner.expert, seen)
        return chosen


def check_step(scheduler: Scheduler, step: Step, unfinished: list[Entry]) -> None:
    """What holds after every `schedule`."""
    running, slots = scheduler.running, scheduler.slots
    assert sum(chunk.count for chunk in step.chunks) <= scheduler.max_step_tokens
    assert all(chunk.count > 0 for chunk in step.chunks)
    owners = [chunk.owner for chunk in step.chunks]
    assert len(set(owners)) == len(owners)
    assert len(running) <= scheduler.max_running
    assert [entry for entry in unfinished if entry.slot is not None] == running, "running are the oldest first"
    assert scheduler.num_waiting == len(unfinished) - len(running), "none is lost or doubled"

    prefixes = scheduler.prefixes
    live = [owner.slot for owner in (*running, *prefixes)]
    assert all(slot is not None for slot in live)
    assert len(set(live)) == len(live)
    assert slots.num_used == sum(slot.size for slot in live if slot) <= slots.num_tokens
    assert not set(live) & set(step.freed)
    assert all(chunk.slot is chunk.owner.slot for chunk in step.chunks)

    users = Counter(entry.prefix for entry in running if entry.prefix is not None)
    assert all(prefix.num_users == users[prefix] for prefix in prefixes)
    assert set(users) <= set(prefixes)
    assert sum(prefix.length for prefix in prefixes if prefix not in users) <= slots.num_tokens // 4

    if running:  # the oldest always advances
        assert running[0] in owners or running[0].prefix in owners
    elif unfinished:
        raise AssertionError("nobody runs though somebody waits")
    experts = [expert for expert, _ in groupby(owner.expert for owner in owners)]
    assert len(set(experts)) == len(experts), "an expert's tokens lie together"
    groups = [group for group, _ in groupby((o.expert, o if isinstance(o, Prefix) else o.prefix) for o in owners)]
    assert len(set(groups)) == len(groups), "the users of a prefix lie together"


class History:
    """Requests that come, fail, are cancelled and finish, drawn at random.

    Args:
        draw: Draws.
        num_requests: So many come in all.
    """

    def __init__(self, draw: random.Random, num_requests: int) -> None:
        self.draw = draw
        self.num_tokens = draw.choice([64, 96, 160, 250, 400, 1000])
        self.scheduler = Scheduler(
            self.num_tokens,
            max_running=draw.choice([1, 2, 3, 5, 8]),
            max_step_tokens=draw.choice([1, 3, 8, 20, 50, 300]),
            refill_share=draw.choice([0.0, 0.0, 0.25, 0.6]),
            short_step_tokens=draw.choice([0, 8, 30]),
        )
        self.stems = [tuple(draw.choices(range(1000), k=draw.randint(16, 70))) for _ in range(draw.randint(1, 3))]
        self.failing = draw.choice([0, 0, 0.01, 0.05])  # of the steps
        self.num_to_come = num_requests
        self.num_failures = 0
        self.num_steps = 0
        self.wanted: dict[Entry, int] = {}  # how many tokens until it finishes
        self.unfinished: list[Entry] = []  # oldest first
        self.finished: list[Entry] = []
        self.passes: Counter[Entry] = Counter()  # how many more may go before those that wait

    def play(self) -> None:
        """Until all have come and gone."""
        device, draw, scheduler = Device(), self.draw, self.scheduler
        while self.num_to_come or scheduler.has_work:
            self.arrive()
            self.cancel(0.02)
            if draw.random() < 0.01:
                scheduler.forget_prefixes("sql")
            if not scheduler.has_work:
                continue
            running = set(scheduler.running)
            step = scheduler.schedule()
            self.num_steps += 1
            self.check_too_large(step)
            check_step(scheduler, step, self.unfinished)
            self.check_passes(running, step)
            assert self.num_steps <= self.most_steps()
            device.prepare(step)
            if step.chunks and draw.random() < self.failing:
                self.fail(step)
                continue
            chosen = device.compute(step)
            self.cancel(0.01)
            for entry, token in chosen.items():
                if not entry.is_done:
                    entry.generated.append(token)
                    if entry.num_generated == self.wanted[entry]:
                        self.forget(entry)
                        self.finished.append(entry)
        self.check_end(device)

    def arrive(self) -> None:
        draw = self.draw
        if not self.num_to_come or draw.random() < 0.7:
            return
        entries = []
        for _ in range(draw.randint(1, self.num_to_come)):
            expert, stem = draw.choice(EXPERTS), draw.choice(self.stems)
            length = draw.choice([0, len(stem), len(stem), draw.randint(1, len(stem))])
            prompt = stem[:length] + tuple(draw.choices(range(1000), k=draw.choice([1, 5, 31, 33, 70])))
            length = draw.choice([length, length, 0, self.scheduler.find_prefix(expert, prompt)])
            assert length < len(prompt)
            most = draw.choice([1, 3, 8, 20, 50, 100])
            entry = Entry(expert, prompt, length, most)
            entries.append(entry)
            self.wanted[entry] = draw.choice([most, draw.randint(1, most)])
        self.num_to_come -= len(entries)
        self.unfinished += entries
        self.passes.update(dict.fromkeys(entries, MATES))
        self.scheduler.add(entries)

    def cancel(self, chance: float) -> None:
        if self.unfinished and self.draw.random() < chance:
            self.forget(self.draw.choice(self.unfinished))

    def forget(self, entry: Entry) -> None:
        self.unfinished.remove(entry)
        self.scheduler.remove(entry)
        self.scheduler.remove(entry)  # again does nothing

    def fail(self, step: Step) -> None:
        """A step that computed nothing; limits are lowered, as after one that did not fit the device."""
        self.num_failures += 1
        self.scheduler.rerun(step.chunks)
        if self.draw.random() < 0.5:
            self.scheduler.max_running = max(self.scheduler.max_running // 2, 1)
            self.scheduler.max_step_tokens = max(self.scheduler.max_step_tokens // 2, 1)

    def check_too_large(self, step: Step) -> None:
        for entry in step.too_large:
            length = len(entry.prompt) + entry.num_generated
            assert slot_size(length) > self.num_tokens
            shared = slot_size(entry.prefix_length) + slot_size(length - entry.prefix_length)
            assert not entry.prefix_length or shared > self.num_tokens
            assert entry.slot is None
            assert entry.is_done
            self.forget(entry)

    def check_passes(self, running: set[Entry], step: Step) -> None:
        """Younger ones go before an older one only so often, and then it is the turn of the oldest again."""
        admitted = [entry for entry in self.scheduler.running if entry not in running] + step.too_large
        if not admitted:
            return
        for waiting in self.unfinished:
            if waiting.slot is None:
                for entry in admitted:
                    self.passes[waiting] += MATES if entry.arrival < waiting.arrival else -1
                assert self.passes[waiting] >= 0

    def most_steps(self) -> int:
        """Each step computes a token of the oldest that runs; what it computes again is after a growth or a failure."""
        pace = self.scheduler.max_step_tokens
        come = self.wanted.items()
        once = sum((len(entry.prompt) + wanted) // pace + 2 for entry, wanted in come)
        growths = sum(wanted // 16 + 1 for _, wanted in come)
        return sum(self.wanted.values()) + once * (1 + growths + self.num_failures)

    def check_end(self, device: Device) -> None:
        for entry in self.finished:
            assert entry.generated == answer(entry.expert, entry.prompt, self.wanted[entry])
        scheduler = self.scheduler
        assert not self.unfinished
        assert scheduler.num_waiting == 0
        assert not scheduler.running
        device.prepare(scheduler.schedule())
        kept = {prefix.slot: list(prefix.token_ids) for prefix in scheduler.prefixes}
        assert scheduler.slots.num_used == sum(slot.size for slot in kept if slot)
        assert set(device.contents) <= set(kept), "what is no longer used is freed"


@pytest.mark.parametrize("few", [True, False])
@settings(max_examples=num_examples(250, 5_000), suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(seed=st.integers(0, 2**40), num_requests=st.integers(1, 9))
def test_random_histories(few: bool, seed: int, num_requests: int) -> None:
    """Half with a few requests, half with many at once; ten thousand in all with the profile `full`."""
    History(random.Random(seed), num_requests if few else num_requests + 6).play()


# Each rule by an example.


def entry_of(own: int, max_tokens: int = 8, *, prefix: int = 0, expert: str | None = None, stem: int = 0) -> Entry:
    """A request of `prefix` shared and `own` further tokens."""
    return Entry(expert, (stem,) * prefix + tuple(range(1, own + 1)), prefix, max_tokens)


def scheduler_of(num_tokens: int = 1000, *, max_running: int = 8, max_step_tokens: int = 100) -> Scheduler:
    return Scheduler(num_tokens, max_running=max_running, max_step_tokens=max_step_tokens)


def run(scheduler: Scheduler) -> Step:
    """A step; those that sample get a token, and who has all leaves."""
    step = scheduler.schedule()
    for chunk in step.chunks:
        if chunk.samples and isinstance(chunk.owner, Entry):
            chunk.owner.generated.append(0)
            if chunk.owner.num_generated == chunk.owner.max_tokens:
                scheduler.remove(chunk.owner)
    return step


def planned(step: Step) -> list[tuple[Entry | Prefix, int, int, bool]]:
    return [(chunk.owner, chunk.start, chunk.count, chunk.samples) for chunk in step.chunks]


def prefix_of(entry: Entry) -> Prefix:
    assert entry.prefix is not None
    return entry.prefix


def test_new_tokens_and_prompts_stand_side_by_side_in_a_step() -> None:
    scheduler, first, second = scheduler_of(), entry_of(10), entry_of(20)
    scheduler.add([first])
    assert planned(run(scheduler)) == [(first, 0, 10, True)]
    scheduler.add([second])
    assert planned(run(scheduler)) == [(first, 10, 1, True), (second, 0, 20, True)]


def test_a_long_prompt_is_computed_in_pieces_and_delays_nobody_older() -> None:
    scheduler, first, second = scheduler_of(max_step_tokens=11), entry_of(10), entry_of(25)
    scheduler.add([first, second])
    assert planned(run(scheduler)) == [(first, 0, 10, True), (second, 0, 1, False)]
    assert planned(run(scheduler)) == [(first, 10, 1, True), (second, 1, 10, False)]
    assert planned(run(scheduler)) == [(first, 11, 1, True), (second, 11, 10, False)]
    assert planned(run(scheduler)) == [(first, 12, 1, True), (second, 21, 4, True)]


def test_experts_stand_together_whatever_the_order_they_came_in() -> None:
    scheduler = scheduler_of()
    entries = [entry_of(5, expert=expert) for expert in ("sql", "extract", "sql", None, "extract")]
    scheduler.add(entries)
    assert [chunk.owner.expert for chunk in run(scheduler).chunks] == [None, "extract", "extract", "sql", "sql"]


def test_no_more_run_than_may() -> None:
    scheduler, entries = scheduler_of(max_running=2), [entry_of(5, max_tokens=1) for _ in range(3)]
    scheduler.add(entries)
    assert [chunk.owner for chunk in run(scheduler).chunks] == entries[:2]
    assert [chunk.owner for chunk in run(scheduler).chunks] == entries[2:]
    assert not scheduler.has_work


def steps_with_prompts(limits: dict[str, int], refill_share: float) -> int:
    scheduler = Scheduler(
        **({"num_tokens": 9_999, "max_running": 99, "max_step_tokens": 500} | limits), refill_share=refill_share
    )
    entries = [entry_of(4, max_tokens=2 + at) for at in range(60)]
    scheduler.add(entries)
    found = 0
    while scheduler.has_work:
        found += any(chunk.start == 0 for chunk in run(scheduler).chunks)
    assert all(entry.num_generated == entry.max_tokens for entry in entries)
    return found


@pytest.mark.parametrize("limits", [{"max_running": 16}, {"num_tokens": 1_500}])
def test_once_full_it_is_refilled_by_several_together(limits: dict[str, int]) -> None:
    assert steps_with_prompts(limits, refill_share=0.25) * 2 < steps_with_prompts(limits, refill_share=0.0)


def test_those_that_wait_are_admitted_when_a_quarter_has_left_or_all_fit() -> None:
    scheduler = Scheduler(9_999, max_running=8, max_step_tokens=500, refill_share=0.25)
    scheduler.add([entry_of(4, max_tokens=2 + at) for at in range(11)])
    running = []
    while scheduler.has_work:
        run(scheduler)
        running.append(len(scheduler.running))
    assert running[:6] == [8, 7, 6, 7, 7, 6]  # after each step: two come in the fourth, the last one in the fifth


def test_whoever_fits_a_short_step_does_not_wait_for_others() -> None:
    scheduler = Scheduler(9_999, max_running=8, max_step_tokens=500, refill_share=0.25, short_step_tokens=20)
    short, long = [entry_of(4, max_tokens=2 + at) for at in range(9)], entry_of(30, max_tokens=2)
    scheduler.add([*short[:8], long, short[8]])
    admitted = []
    while scheduler.has_work:
        step = run(scheduler)
        admitted.append([chunk.owner for chunk in step.chunks if chunk.start == 0])
        assert len(admitted) == 1 or long in admitted[-1] or sum(chunk.count for chunk in step.chunks) <= 20
    assert admitted[:4] == [short[:8], [], [], [long, short[8]]], "it does not fit, and nobody overtakes it"
    scheduler.add(again := [entry_of(4, max_tokens=2 + at) for at in range(9)])
    run(scheduler)
    run(scheduler)
    assert [chunk.owner for chunk in run(scheduler).chunks if chunk.start == 0] == again[8:], "as soon as one has left"


@pytest.mark.parametrize("stem", [0, 7])
def test_a_short_step_counts_what_is_missing_of_a_prefix(stem: int) -> None:
    scheduler = Scheduler(9_999, max_running=4, max_step_tokens=500, refill_share=0.9, short_step_tokens=20)
    waiting = [entry_of(4, prefix=30, stem=stem) for _ in range(2)]
    scheduler.add([*(entry_of(4, max_tokens=2 + 3 * at, prefix=30) for at in range(4)), *waiting])
    for _ in range(2):  # one has left
        run(scheduler)
    found = [chunk.owner for chunk in run(scheduler).chunks if chunk.start == 0]
    assert found == ([waiting[0]] if stem == 0 else []), (
        "the prefix of the first is kept, the other's is to be computed"
    )


def test_whoever_comes_while_there_is_room_does_not_wait() -> None:
    scheduler = Scheduler(9_999, max_running=8, max_step_tokens=500, refill_share=0.25)
    for _ in range(7):
        scheduler.add([entry_of(4, max_tokens=50)])
        assert run(scheduler).chunks[-1].start == 0
        assert scheduler.num_waiting == 0


def test_the_youngest_wait_when_fewer_may_run_from_now_on() -> None:
    scheduler, entries = scheduler_of(), [entry_of(5) for _ in range(3)]
    scheduler.add(entries)
    run(scheduler)
    scheduler.max_running = 1
    assert planned(run(scheduler)) == [(entries[0], 5, 1, True)]
    assert scheduler.num_waiting == 2


def test_a_longer_answer_moves_to_a_larger_slot() -> None:
    scheduler, entry = scheduler_of(), entry_of(30, max_tokens=100)
    scheduler.add([entry])
    run(scheduler)
    old = entry.slot
    assert old is not None
    assert old.size == slot_size(30 + ROOM_AHEAD) == 96
    for _ in range(96 - 30):
        assert not run(scheduler).moves
    step = run(scheduler)
    assert step.moves == [(old, entry.slot, 96)]
    assert step.freed == [old]
    assert planned(step) == [(entry, 96, 1, True)]
    assert entry.slot is not None
    assert entry.slot.size == slot_size(97 + 100 - 67)


def test_the_youngest_makes_room_for_the_oldest_and_is_computed_again() -> None:
    scheduler, old, young = scheduler_of(224), entry_of(30, max_tokens=100), entry_of(70)
    scheduler.add([old])
    for _ in range(96 - 30):
        run(scheduler)
    scheduler.add([young])
    assert planned(run(scheduler)) == [(old, 95, 1, True), (young, 0, 70, True)]
    slots = [old.slot, young.slot]
    assert [slot and slot.size for slot in slots] == [96, 96]
    step = run(scheduler)  # the older needs a slot of 128 beside its 96; then there is room for the younger again
    assert planned(step) == [(old, 96, 1, True), (young, 0, 71, True)]
    assert step.moves == [(slots[0], old.slot, 96)]
    assert set(step.freed) == set(slots)
    assert not set(slots) & {old.slot, young.slot}


def test_a_sequence_without_room_to_grow_waits_and_keeps_its_answer() -> None:
    scheduler, old, young = scheduler_of(160), entry_of(60, max_tokens=100), entry_of(25, max_tokens=12)
    scheduler.add([old])
    run(scheduler)
    scheduler.add([young])
    run(scheduler)
    assert [entry.slot and entry.slot.size for entry in (old, young)] == [128, 32]
    for _ in range(10):
        run(scheduler)
    assert (old.num_generated, young.num_generated, young.slot) == (12, 8, None)
    scheduler.remove(old)
    assert planned(run(scheduler)) == [(young, 0, 33, True)]


def test_a_prefix_is_computed_once_and_before_those_that_use_it() -> None:
    scheduler, entries = scheduler_of(), [entry_of(own, prefix=20) for own in (3, 4, 5)]
    scheduler.add(entries)
    step = run(scheduler)
    prefix = prefix_of(entries[0])
    assert planned(step) == [
        (prefix, 0, 20, False),
        (entries[0], 0, 3, True),
        (entries[1], 0, 4, True),
        (entries[2], 0, 5, True),
    ]
    late = entry_of(6, prefix=20)
    scheduler.add([late])
    assert (late, 0, 6, True) in planned(run(scheduler))
    assert prefix_of(late) is prefix


def test_a_prefix_longer_than_a_step_keeps_its_users_waiting_and_nobody_else() -> None:
    scheduler, first, second = scheduler_of(max_step_tokens=12), entry_of(3, prefix=20), entry_of(4, prefix=20)
    other = entry_of(3)
    scheduler.add([other, first, second])
    step = run(scheduler)
    assert planned(step) == [(prefix_of(first), 0, 9, False), (other, 0, 3, True)]
    step = run(scheduler)
    assert planned(step) == [(prefix_of(first), 9, 11, False), (other, 3, 1, True)]
    assert planned(run(scheduler)) == [(first, 0, 3, True), (second, 0, 4, True), (other, 4, 1, True)]


def test_a_prefix_is_found_for_its_expert_only_and_the_longest_first() -> None:
    scheduler = scheduler_of()
    scheduler.add([entry_of(3, prefix=20, expert="sql"), entry_of(3, prefix=30, expert="sql")])
    run(scheduler)
    assert scheduler.find_prefix("sql", (0,) * 25) == 20
    assert scheduler.find_prefix("sql", (0,) * 40) == 30
    assert scheduler.find_prefix("sql", (0,) * 30) == 20  # never the whole prompt
    assert scheduler.find_prefix("sql", (0,) * 20) == 0
    assert scheduler.find_prefix("sql", (9, *(0,) * 25)) == 0
    assert scheduler.find_prefix("extract", (0,) * 25) == 0


def test_an_idle_prefix_is_kept_and_the_one_unused_the_longest_goes_first() -> None:
    scheduler = scheduler_of(256, max_running=1)  # 64 tokens of idle prefixes
    for stem in (1, 2, 3, 1):
        scheduler.add([entry_of(3, max_tokens=1, prefix=20, stem=stem)])
        run(scheduler)
    assert [prefix.token_ids[0] for prefix in scheduler.prefixes] == [1, 2, 3]
    scheduler.add([entry_of(3, max_tokens=1, prefix=20, stem=4)])
    assert planned(run(scheduler))[0][1:3] == (0, 20)
    assert {prefix.token_ids[0] for prefix in scheduler.prefixes} == {1, 3, 4}


def test_an_expert_that_leaves_takes_its_idle_prefixes_along() -> None:
    scheduler, last = scheduler_of(), entry_of(3, max_tokens=2, prefix=30, expert="sql")
    scheduler.add([entry_of(3, max_tokens=1, prefix=20, expert=expert) for expert in ("sql", "extract")])
    scheduler.add([last])
    run(scheduler)
    scheduler.forget_prefixes("sql")
    assert [(prefix.expert, prefix.length) for prefix in scheduler.prefixes] == [("extract", 20), ("sql", 30)]
    run(scheduler)
    scheduler.forget_prefixes("sql")
    assert [(prefix.expert, prefix.length) for prefix in scheduler.prefixes] == [("extract", 20)]


def test_an_idle_prefix_makes_room_for_a_request() -> None:
    scheduler = scheduler_of(128)
    scheduler.add([entry_of(3, max_tokens=1, prefix=20)])
    run(scheduler)
    assert (len(scheduler.prefixes), scheduler.slots.num_used) == (1, 32)
    large = entry_of(100)
    scheduler.add([large])
    assert planned(run(scheduler)) == [(large, 0, 100, True)]
    assert scheduler.prefixes == ()


def test_a_cancelled_sequence_leaves_whether_it_waits_or_runs() -> None:
    scheduler, entries = scheduler_of(max_running=1), [entry_of(5) for _ in range(3)]
    scheduler.add(entries)
    run(scheduler)
    slot = entries[0].slot
    scheduler.remove(entries[1])
    assert scheduler.num_waiting == 1
    scheduler.remove(entries[0])
    scheduler.remove(entries[0])
    step = run(scheduler)
    assert step.freed == [slot]
    assert planned(step) == [(entries[2], 0, 5, True)]
    assert entries[1].num_generated == 0


def test_nothing_of_a_cancelled_sequence_is_kept() -> None:
    scheduler = scheduler_of(max_running=1)
    scheduler.add([entry_of(5, max_tokens=2)])
    run(scheduler)
    waiting = [entry_of(5, prefix=20, stem=stem) for stem in (1, 1, 2)]
    scheduler.add(waiting)
    for entry in waiting:
        scheduler.remove(entry)
    traces = [weakref.ref(entry) for entry in waiting]
    del entry, waiting
    run(scheduler)
    run(scheduler)
    gc.collect()
    assert [trace() for trace in traces] == [None] * 3


def test_what_can_never_fit_is_said_and_the_others_run() -> None:
    scheduler, large, small = scheduler_of(96), entry_of(97), entry_of(5)
    scheduler.add([large, small])
    step = run(scheduler)
    assert step.too_large == [large]
    assert planned(step) == [(small, 0, 5, True)]
    scheduler.remove(large)  # does nothing
    assert scheduler.num_waiting == 0


def test_what_outgrows_the_memory_is_said_when_it_does() -> None:
    scheduler, entry = scheduler_of(64), entry_of(60, max_tokens=50)
    scheduler.add([entry])
    steps = []
    while scheduler.has_work:
        steps.append(run(scheduler))
    assert steps[-1].too_large == [entry]
    assert len(entry.prompt) + entry.num_generated == 65


def test_a_prefix_is_not_shared_where_only_one_slot_for_all_fits() -> None:
    scheduler, entry = scheduler_of(128), entry_of(33, max_tokens=1, prefix=65)  # 98 tokens; 96 + 48 would not fit
    scheduler.add([entry])
    step = run(scheduler)
    assert planned(step) == [(entry, 0, 98, True)]
    assert entry.own_tokens(0, 98) == list(entry.prompt)


def test_a_failed_step_is_computed_again() -> None:
    scheduler, entries = scheduler_of(max_step_tokens=25), [entry_of(3, prefix=20), entry_of(9, prefix=20)]
    scheduler.add(entries)
    first = scheduler.schedule()
    scheduler.rerun(first.chunks)
    assert not scheduler.running
    again = scheduler.schedule()
    assert planned(again) == planned(first)
    assert {chunk.slot for chunk in first.chunks if isinstance(chunk.owner, Entry)} == set(again.freed)


def test_mates_of_the_oldest_go_first_but_only_a_few() -> None:
    scheduler = scheduler_of(max_running=1)
    oldest, other = entry_of(3, max_tokens=1, prefix=20), entry_of(3, max_tokens=1)
    mates = [entry_of(3, max_tokens=1, prefix=20) for _ in range(MATES + 5)]
    scheduler.add([oldest, other, *mates])
    order = [run(scheduler).chunks[-1].owner for _ in range(MATES + 7)]
    assert order == [oldest, *mates[:MATES], other, *mates[MATES:]]


@pytest.mark.parametrize("max_running", [1, 4])
@pytest.mark.parametrize("num_tokens", [96, 2000])
def test_an_endless_stream_of_mates_starves_nobody(max_running: int, num_tokens: int) -> None:
    """Of those that wait, the oldest is admitted after `MATES` younger ones at most, and finishes."""
    scheduler = scheduler_of(num_tokens, max_running=max_running)
    scheduler.add([entry_of(3, max_tokens=3, prefix=20) for _ in range(4)])
    run(scheduler)
    other = entry_of(40, max_tokens=20, expert="sql")
    scheduler.add([other])
    younger: set[Entry] = set()
    for _ in range(10 * MATES):
        scheduler.add([entry_of(3, max_tokens=3, prefix=20) for _ in range(max_running)])
        run(scheduler)
        if other.slot is None and not other.is_done:
            younger |= {entry for entry in scheduler.running if entry.arrival > other.arrival}
    assert len(younger) <= MATES
    assert other.num_generated == 20
