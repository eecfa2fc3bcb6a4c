"""What can be seen of somebody else's code from outside: how it ends, what it shows, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import threading
import traceback
import warnings
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar
from urllib.parse import quote_from_bytes

T = TypeVar("T")


class StillRunningError(Exception):
    """A call has not ended in the time that it was given."""


def caught(call: Callable[[], T]) -> T | BaseException:
    """Return what a call returned or raised."""
    try:
        return call()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what was asked for
        return error


def outcome_of(call: Callable[[], T], seconds: float) -> T | BaseException:
    """Return what a call returned or raised in a thread of its own.

    :param seconds: after how many of them it is left to itself, and the outcome a :class:`StillRunningError`.
    """
    outcomes: SimpleQueue[T | BaseException] = SimpleQueue()
    threading.Thread(target=lambda: outcomes.put(caught(call)), daemon=True).start()
    try:
        return outcomes.get(timeout=seconds)
    except Empty:
        return StillRunningError(f"it has not ended after {seconds:g} seconds")


def answer_of_child(work: Callable[[], str], seconds: float) -> str:
    """Return what a function returns in a process that is forked for it, or what becomes of that process instead.

    :param seconds: after how many of them the child is killed.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Other threads are what makes a fork dangerous, and a program that forks has them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        answer = caught(work)
        os.write(writing, f"{answer if isinstance(answer, str) else type(answer).__name__}\n".encode()[-4096:])
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], seconds)
    said = os.read(reading, 4096).decode(errors="replace") if ready else ""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    if not ready:
        return "it hangs"
    return said.removesuffix("\n") if said else "it ends the process"


# --- What shows -------------------------------------------------------------------------------------------------------


def shows(text: str, secret: bytes, *, in_parts: bool = False) -> bool:
    """Tell whether a secret is in a text, in any of the usual spellings.

    :param in_parts: whether a quarter of it is enough.
    """
    text = text.lower()
    quarter = len(secret) // 4
    parts = [secret[start : start + quarter] for start in range(0, len(secret), quarter)] if in_parts else []
    return any(spelling.lower() in text for part in (secret, *parts) for spelling in _spellings(part))


def _spellings(secret: bytes) -> Iterator[str]:
    yield from (secret.hex(), secret.hex(":"), secret.hex(" "))
    yield from (secret.decode("latin-1"), repr(secret)[2:-1], quote_from_bytes(secret))
    yield ", ".join(map(str, secret))
    yield str(int.from_bytes(secret, "big"))
    for before in range(3):
        # In base64 of a longer text, but for the characters that depend on what is around the secret there.
        first, last = -(-8 * before // 6), 8 * (before + len(secret)) // 6
        for encode in (b64encode, urlsafe_b64encode):
            yield encode(bytes(before) + secret).decode()[first:last]


def text_of(error: BaseException) -> str:
    """Return all that an error says, with its traceback and what is behind it."""
    return "".join([*traceback.format_exception(error), repr(error.args), repr(vars(error))])


def origin_of(error: BaseException) -> str:
    """Return the kind of an error and where it was raised, without its text."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


# --- What is left -----------------------------------------------------------------------------------------------------


def open_in_process() -> set[str]:
    """Return the threads, sockets and child processes of this process, as far as the system tells of them."""
    return {*_threads(), *_sockets(), *_children()}


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        yield f"the thread {thread.name} ({thread.ident})"


def _sockets() -> Iterator[str]:
    for descriptor in Path("/dev/fd").glob("*"):
        with contextlib.suppress(OSError):  # the one that the directory was listed with
            status = os.fstat(int(descriptor.name))
            if stat.S_ISSOCK(status.st_mode):
                yield f"the socket {status.st_ino} on the file descriptor {descriptor.name}"


def _children() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name, _, rest = process.read_text(errors="replace").rpartition(")")
            if int(rest.split()[1]) == os.getpid():
                yield f"the child process {name})"
