"""A fleet of worker processes as a test sees it: started, told, watched, killed, frozen, ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Final

from tests.fleet_worker import Board
from tests.processes import forked

WRITERS: Final = 6
READERS: Final = 4
SPARES: Final = 2
"""Processes that start in the place of killed ones."""

_WORKER: Final = Path(__file__).with_name("fleet_worker.py")


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for something that is bound to happen."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.01)


class Member:
    """One process of the fleet."""

    def __init__(self, number: int, connection: socket.socket, board: Board) -> None:
        self.number = number
        self.line = board.line(number)
        self._channel = connection.makefile("rw")
        self.pid = int(self._channel.readline())
        self.task = ""
        self.is_killed = False

    def start(self, task: str) -> None:
        """Have it ``write`` or ``read``."""
        self.task = task
        self._say(task)

    def _say(self, line: str) -> None:
        self._channel.write(f"{line}\n")
        self._channel.flush()

    @property
    def is_working(self) -> bool:
        """Whether it has begun and was not killed."""
        return bool(self.task) and not self.is_killed

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.is_killed = True
        assert self._channel.readline() == ""

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Tell it to end."""
        self._say("stop")

    def errors(self) -> list[str]:
        """Return what failed in it, when it has ended."""
        answer = self._channel.readline()
        found: list[str] = json.loads(answer) if answer else ["it died"]
        return [f"{self.task}r {self.number}: {error}" for error in found]

    def close(self) -> None:
        self._channel.close()
        self.line.release()


class Fleet:
    """All its processes."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        for number, member in enumerate(members[: WRITERS + READERS]):
            member.start("write" if number < WRITERS else "read")

    @property
    def working(self) -> list[Member]:
        """Those that have begun and were not killed."""
        return [member for member in self.members if member.is_working]

    @property
    def transactions(self) -> int:
        """How many transactions all have ended."""
        return sum(member.line.transactions for member in self.members)

    def wait_for_everyone(self, transactions: int) -> None:
        """Wait until every process has ended so many more transactions."""
        for member in self.working:
            goal = member.line.transactions + transactions
            until(lambda line=member.line, goal=goal: line.transactions >= goal, f"worker {member.number} goes on")  # type: ignore[misc]

    def changes(self, row: int) -> dict[str, tuple[int, int]]:
        """Return how often each process has changed a row, at least and at most."""
        counts = {str(member.number): member.line.committed(row) for member in self.members}
        return {number: count for number, count in counts.items() if count[1]}

    def stop(self) -> list[str]:
        """End all, and return what failed in them."""
        ended = self.working
        for member in ended:
            member.stop()
        return [error for member in ended for error in member.errors()]


class Strikes:
    """What befalls a fleet within one round: one process is killed, and another is frozen for longer than a lease.

    When, is so many transactions of the fleet after the operator begins with a step.

    :param replaces: whether another process starts in the place of the killed one.
    :param for_long: whether the frozen one stays so until :meth:`let_go`.
    """

    def __init__(
        self, fleet: Fleet, random: Random, steps: tuple[str, ...], lease: float, *, replaces: bool, for_long: bool
    ) -> None:
        self._fleet = fleet
        self._replaces = replaces
        self._lease = lease
        self._let_go = threading.Event()
        if not for_long:
            self._let_go.set()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        killed, frozen = random.sample(fleet.working, 2)
        self._planned = [
            (random.choice(steps), random.randrange(200), lambda: self._kill(killed)),
            (random.choice(steps), random.randrange(200), lambda: self._freeze(frozen, random.uniform(1.2, 2.5))),
        ]
        self.plan = (
            f"kills {killed.number} {self._planned[0][:2]}, freezes {frozen.number} {self._planned[1][:2]}"
            f"{' for long' if for_long else ''}"
        )

    def begin(self, step: str) -> None:
        """Say that a step begins."""
        for planned_step, transactions, action in self._planned:
            if planned_step == step:
                thread = threading.Thread(target=self._strike, args=(transactions, action))
                self._threads.append(thread)
                thread.start()

    def let_go(self) -> None:
        """End what was to last for long."""
        self._let_go.set()

    def join(self) -> None:
        """Wait until all is over."""
        self.let_go()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _strike(self, transactions: int, action: Callable[[], None]) -> None:
        try:
            goal = self._fleet.transactions + transactions
            until(lambda: self._fleet.transactions >= goal, "the fleet goes on")
            action()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._errors.append(error)

    def _kill(self, member: Member) -> None:
        member.kill()
        if self._replaces:
            spare = next(spare for spare in self._fleet.members if not spare.task)
            spare.start(member.task)

    def _freeze(self, member: Member, leases: float) -> None:
        member.freeze()
        try:
            time.sleep(leases * self._lease)  # what it is about: that a lease is over
            self._let_go.wait(60)
        finally:
            member.thaw()


@contextmanager
def fleet(url: str, variables: Mapping[str, str], directory: Path, seed: int) -> Iterator[Fleet]:
    """Start a fleet, and end all its processes.

    :param variables: the settings, by their names without the prefix.
    """
    size = WRITERS + READERS + SPARES
    with ExitStack() as stack:
        board = Board(directory / "board", size)
        stack.callback(board.close)
        arguments = [url, str(directory / "board"), str(seed)]
        channels = stack.enter_context(forked(_WORKER, arguments, size, variables, directory))
        members = []
        for number, channel in enumerate(channels):
            members.append(Member(number, channel, board))
            stack.callback(members[-1].close)
        yield Fleet(members)
