"""One exchange with a program of our own in a subprocess, for what may hang or crash: within a deadline, and bounded.

The request goes to its standard input, one line comes back on its standard output. Nothing that is secret is in the
arguments or the environment, which other users of the machine can read.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Final

from ..exceptions import ProviderUnavailableError
from .base import Deadline

MAX_ANSWER_SIZE: Final = 16_384
"""Bound on an answer, in bytes. A wrapped key has less than 100."""

Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an exchange.

    :ivar answer: the line that came back, without its end; ``None`` if the program ended without one, or if what it
        wrote is beyond the bound.
    :ivar too_large: whether it is beyond the bound.
    :ivar status: what the program ended with, as in ``Popen.returncode``. It means nothing where there is an answer,
        since the program is then ended whatever it does.
    """

    answer: bytes | None = field(repr=False)
    too_large: bool
    status: int

    @property
    def signal_name(self) -> str | None:
        """The signal that the program died of, if it is not the one that ends it here."""
        if self.status >= 0 or self.status == -signal.SIGKILL:
            return None
        with suppress(ValueError):
            return signal.Signals(-self.status).name
        return f"signal {-self.status}"


def exchange(
    command: Sequence[str], request: bytes, deadline: Deadline, provider: str, environment: Mapping[str, str]
) -> Outcome:
    """Run a program, send it a request, and return what became of that.

    When this returns or raises, the program is gone, and so is every process that it started and that stayed in its
    group. What it writes to standard error is shown to nobody.

    :raises ProviderUnavailableError: if it cannot be started, or the deadline passes.
    """
    with _running(command, provider, environment) as process:
        answer = _talk(process, request, deadline, provider)
    whole, separator, _ = answer.partition(b"\n")
    too_large = not separator and len(answer) > MAX_ANSWER_SIZE
    return Outcome(bytes(whole) if separator else None, too_large, process.returncode)


@contextmanager
def _running(command: Sequence[str], provider: str, environment: Mapping[str, str]) -> Iterator[Process]:
    process, reason = _started(command, environment)
    if process is None:
        raise ProviderUnavailableError(
            f"The subprocess that talks to the {provider} KMS could not be started: {reason}. Check the limits on "
            "processes and memory, and that the Python of this program is still in its place.",
            provider=provider,
        )
    try:
        yield process
    finally:
        _end(process)


def _started(command: Sequence[str], environment: Mapping[str, str]) -> tuple[Process | None, str]:
    try:
        return subprocess.Popen(  # noqa: S603 - the command is ours or the program's, never from outside
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,
        ), ""
    except OSError as error:
        return None, error.strerror or type(error).__name__


def _talk(process: Process, request: bytes, deadline: Deadline, provider: str) -> bytes:
    """Send the request, and return what came until a line was whole, the other end was closed, or it was too much."""
    sending, receiving = _pipes(process)
    answer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(sending, selectors.EVENT_WRITE)
        selector.register(receiving, selectors.EVENT_READ)
        while b"\n" not in answer and len(answer) <= MAX_ANSWER_SIZE:
            for key, _ in selector.select(deadline.remaining(provider)):
                if key.fileobj is sending:
                    request = _send(sending, request)
                    if not request:
                        selector.unregister(sending)
                        sending.close()
                    continue
                received = os.read(receiving.fileno(), MAX_ANSWER_SIZE + 1 - len(answer))
                if not received:
                    return answer
                answer += received
    return answer


def _send(sending: IO[bytes], request: bytes) -> bytes:
    """Send as much of the request as surely does not block, and return what is left of it."""
    try:
        return request[os.write(sending.fileno(), request[: select.PIPE_BUF]) :]
    except BrokenPipeError:
        return b""  # it does not listen any more: what it ended with says why


def _pipes(process: Process) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise TypeError
    return process.stdin, process.stdout


def _end(process: Process) -> None:
    # Before it is waited for, since until then nobody else can have its number. Nothing can be done about one that has
    # changed its user, and what has ended by itself keeps the status that it ended with.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in _pipes(process):
        pipe.close()
    # A driver may hold on to it beyond all signals. Then this waits, in a thread that nobody waits for.
    process.wait()
