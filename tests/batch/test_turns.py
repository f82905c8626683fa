"""Together or alone: seen from many threads."""

import random
import threading

from pipeline.batch.turns import Turns


def test_who_is_alone_is_alone_and_everybody_gets_in() -> None:
    turns, lock = Turns(), threading.Lock()
    inside: list[bool] = []  # whether each that is inside is alone
    seen: list[list[bool]] = []

    def visit(is_alone: bool) -> None:
        with turns.alone() if is_alone else turns.together():
            with lock:
                inside.append(is_alone)
                seen.append(list(inside))
            threading.Event().wait(0.001)
            with lock:
                inside.remove(is_alone)

    rng = random.Random(1)
    threads = [threading.Thread(target=visit, args=(rng.random() < 0.3,)) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 60
    assert all(len(company) == 1 for company in seen if True in company)
    assert any(len(company) > 1 for company in seen)


def test_who_wants_to_be_alone_is_not_passed_by() -> None:
    turns, order = Turns(), []
    asking = threading.Event()

    def alone() -> None:
        asking.set()
        with turns.alone():
            order.append("alone")

    def together() -> None:
        with turns.together():
            order.append("together")

    with turns.together():
        first = threading.Thread(target=alone)
        first.start()
        asking.wait(10)
        while not turns._num_waiting:
            threading.Event().wait(0.001)
        second = threading.Thread(target=together)
        second.start()
        second.join(0.05)
        assert order == [], "one is inside: the next waits behind who wants to be alone"
    first.join(10)
    second.join(10)
    assert order == ["alone", "together"]
