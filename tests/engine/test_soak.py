"""Many requests with experts, grammars and cancels from several threads: all accounted for, nothing left."""

import gc
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.engine import Request, SamplingParams
from pipeline.engine.packed import Handle, PackedEngine
from pipeline.engine.runtime import load_engine
from pipeline.engine.types import Completion, Grammar
from pipeline.errors import AdapterError, OutOfMemoryError, PromptTooLongError
from pipeline.package import open_package
from tests import tiny
from tests.profiles import num_examples

NUM_REQUESTS = num_examples(1_500, 5_000)
NUM_THREADS = 4
MAX_GROWTH = 64 << 20  # bytes of resident memory between the middle and the end
KINDS = ("lora", "dora", "ia3")
GRAMMARS = [
    Grammar("regex", "[a-c]+[0-9]{2}"),
    Grammar("gbnf", 'root ::= my_sum\nmy_sum ::= my_sum "+" digit | digit\ndigit ::= [0-9]\n'),
    Grammar("json_schema", '{"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}'),
]
VOCAB = len(tiny.tokenizer())


def make_request(number: int, shared: list[tuple[int, ...]]) -> Request:
    rng = random.Random(number)
    prefix = rng.choice(shared)[: rng.choice([0, 16, 40])]
    own = tuple(rng.randrange(5, VOCAB) for _ in range(rng.randrange(1, 12)))
    params = SamplingParams(
        max_tokens=rng.randrange(1, 9),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=rng.choice([0, 20]),
        seed=number,
        n=rng.choice([1, 1, 1, 1, 1, 1, 1, 2]),
        stop=rng.choice([(), (), ("e",)]),
        logprobs=rng.choice([None, None, None, 1]),
    )
    grammar = rng.choice([None, None, None, None, None, *GRAMMARS])
    # Some ask for an expert that nobody loaded, or for more than the memory holds.
    expert = rng.choice([None, *KINDS * 8, "unknown"])
    if rng.random() < 0.01:
        own *= 60
    return Request(str(number), prefix + own, params, grammar, expert, rng.choice([0, 0, len(prefix)]))


def ask(engine: PackedEngine, numbers: range, shared: list[tuple[int, ...]]) -> list[tuple[Request, Completion]]:
    """Submit requests, some at a time, and cancel some of them: at once, while they run, or when they are finished."""
    rng = random.Random(numbers.start)
    found: list[tuple[Request, Completion]] = []
    running: list[Handle] = []
    for number in numbers:
        handle = engine.submit(make_request(number, shared), stream=rng.random() < 0.2)
        running.append(handle)
        if rng.random() < 0.1:
            handle.cancel()
        if rng.random() < 0.1:
            rng.choice(running).cancel()
        while len(running) > 24:
            done = running.pop(rng.randrange(8))
            found += [(done.request, one) for one in done.result(60)]
            if rng.random() < 0.1:
                done.cancel()
    return found + [(handle.request, one) for handle in running for one in handle.result(60)]


def ask_from_threads(
    engine: PackedEngine, numbers: range, shared: list[tuple[int, ...]]
) -> list[tuple[Request, Completion]]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        parts = pool.map(lambda at: ask(engine, numbers[at::NUM_THREADS], shared), range(NUM_THREADS))
        return [pair for part in parts for pair in part]


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see its own memory and files")
@pytest.mark.timeout(600)
def test_thousands_of_requests_leave_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")
    base = tiny.make_base(tmp_path, vocab_size=VOCAB)
    packages = {kind: open_package(tiny.make_package(kind, base, tmp_path / "packages")[0]) for kind in KINDS}
    rng = random.Random(1)
    shared = [tuple(rng.randrange(5, VOCAB) for _ in range(40)) for _ in range(4)]
    engine = load_engine(
        base, packages, device="cpu", dtype="float32", batch_size=32, max_batch_tokens=128, kv_cache_bytes=500 * 512
    )
    assert isinstance(engine, PackedEngine)
    loop, bank = engine._loop, engine.bank
    assert loop is not None
    assert bank is not None

    found = ask_from_threads(engine, range(NUM_REQUESTS // 10), shared)  # the first compile grammars and fill caches
    gc.collect()
    before = (num_open_files(), threading.active_count())
    found += ask_from_threads(engine, range(NUM_REQUESTS // 10, NUM_REQUESTS // 2), shared)
    gc.collect()
    middle = resident_bytes()
    found += ask_from_threads(engine, range(NUM_REQUESTS // 2, NUM_REQUESTS), shared)
    gc.collect()
    grown = resident_bytes() - middle

    # Every answer exactly once.
    asked = [make_request(number, shared) for number in range(NUM_REQUESTS)]
    wanted = Counter((request.id, index) for request in asked for index in range(request.params.n))
    assert Counter((one.request_id, one.index) for _, one in found) == wanted
    reasons = Counter(one.finish_reason for _, one in found)
    assert all(reasons[reason] > NUM_REQUESTS // 250 for reason in ("stop", "length", "error", "cancelled")), reasons
    codes = Counter(one.failure.code for _, one in found if one.failure is not None)
    assert set(codes) == {AdapterError.code, OutOfMemoryError.code, PromptTooLongError.code}, codes
    for request, one in found:
        if request.expert == "unknown":
            assert one.finish_reason in ("error", "cancelled")

    # Nothing is left but prefixes that nobody uses.
    scheduler = loop.scheduler
    assert not loop.has_work
    assert not scheduler.has_work
    assert scheduler.running == []
    assert all(kept.num_users == 0 for kept in scheduler.prefixes)
    assert scheduler.slots.num_used == sum(kept.slot.size for kept in scheduler.prefixes if kept.slot is not None)
    assert [len(held) for held in (engine._jobs, engine._owners, engine._inbox, engine._cancelled)] == [0] * 4
    assert [bank.info(kind).is_in_use for kind in KINDS] == [False] * len(KINDS)
    assert (num_open_files(), threading.active_count()) == before
    assert grown < MAX_GROWTH, f"{grown / 2**20:.0f} MiB more for the second half"
    assert engine.is_alive
    engine.close()
    assert threading.active_count() == before[1] - 1
