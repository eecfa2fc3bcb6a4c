"""A fork waits for calls, calls wait for a fork, and a child begins anew."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from sqlalchemy_kravn_crypto.providers.fork_gate import ForkGate
from tests.fleet import until

FOREVER = 60.0


class Caller(threading.Thread):
    """A thread that is in a call until it is told to end."""

    def __init__(self, gate: ForkGate) -> None:
        super().__init__(daemon=True)
        self._gate = gate
        self.is_in = threading.Event()
        self.may_end = threading.Event()
        self.start()

    def run(self) -> None:
        with self._gate.call():
            self.is_in.set()
            self.may_end.wait(FOREVER)


def exit_code_of(child: Callable[[], bool]) -> int:
    """Fork, and return what the child ended with: 0 if what it does is true."""
    process = os.fork()
    if process == 0:  # pragma: no cover - another process
        code = 2
        try:
            code = 0 if child() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def enters(gate: ForkGate) -> bool:
    with gate.call():
        return gate._calls == 1


def test_a_fork_waits_for_all_calls() -> None:
    calls_at_fork: list[int] = []
    gates: list[ForkGate] = []
    # What was registered first comes last before a fork.
    os.register_at_fork(before=lambda: calls_at_fork.extend(gate._calls for gate in gates))
    gates.append(ForkGate(FOREVER))
    gate = gates[0]
    callers = [Caller(gate), Caller(gate)]
    assert all(caller.is_in.wait(FOREVER) for caller in callers)
    exit_codes: list[int] = []
    forking = threading.Thread(target=lambda: exit_codes.append(exit_code_of(lambda: enters(gate))))
    forking.start()
    until(lambda: vars(gate._changed)["_waiters"], "the fork waits")
    for caller in callers:
        assert calls_at_fork == []
        caller.may_end.set()
    forking.join(FOREVER)
    gates.clear()
    assert calls_at_fork == exit_codes == [0]


def test_calls_do_not_wait_for_each_other() -> None:
    gate = ForkGate(FOREVER)
    together = threading.Barrier(4)

    def call(_: int) -> bool:
        with gate.call():
            return together.wait(FOREVER) >= 0

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))
    assert gate._calls == 0


def test_no_call_begins_while_a_process_forks() -> None:
    gate = ForkGate(FOREVER)
    gate._close()
    assert not gate._changed.acquire(blocking=False)
    caller = Caller(gate)
    assert not caller.is_in.is_set()
    gate._open()
    assert caller.is_in.wait(FOREVER)
    caller.may_end.set()
    caller.join(FOREVER)
    assert gate._calls == 0


def test_a_call_that_hangs_does_not_hold_a_fork_for_ever() -> None:
    gate = ForkGate(0.1)
    caller = Caller(gate)
    assert caller.is_in.wait(FOREVER)
    # In the child the call is not there, so neither the next one nor the next fork has to wait for it.
    assert exit_code_of(lambda: enters(gate) and exit_code_of(lambda: enters(gate)) == 0) == 0
    assert gate._calls == 1
    caller.may_end.set()
    caller.join(FOREVER)
    assert gate._calls == 0


def test_a_call_that_fails_is_over() -> None:
    gate = ForkGate(FOREVER)
    with pytest.raises(ZeroDivisionError), gate.call():
        _ = 1 / 0
    assert gate._calls == 0
    assert exit_code_of(lambda: enters(gate)) == 0
