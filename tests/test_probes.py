"""What is seen of somebody else's code: how it ends, what it shows, what it leaves behind."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from urllib.parse import quote

import pytest

from sqlalchemy_kravn_crypto.probes import (
    StillRunningError,
    answer_of_child,
    caught,
    open_in_process,
    origin_of,
    outcome_of,
    shows,
    text_of,
)

SECRET = bytes.fromhex("00e9866651c8f98e275c5c9fd57b80f3fa2ef84b228eac9174ef00dc10518f5f")
PATIENCE = 30.0

# --- How it ends ------------------------------------------------------------------------------------------------------


def test_what_a_call_returns_or_raises() -> None:
    assert caught(lambda: 1) == outcome_of(lambda: 1, PATIENCE) == 1
    for error in (ValueError(), SystemExit(), KeyboardInterrupt()):

        def raises(error: BaseException = error) -> None:
            raise error

        assert caught(raises) is error
        assert outcome_of(raises, PATIENCE) is error


def test_a_call_has_a_thread_of_its_own() -> None:
    assert outcome_of(threading.get_ident, PATIENCE) != threading.get_ident()


def test_a_call_that_hangs_is_left_to_itself() -> None:
    release = threading.Event()
    assert isinstance(outcome_of(release.wait, 0.01), StillRunningError)
    release.set()


def test_a_child_answers() -> None:
    parent = os.getpid()
    assert answer_of_child(lambda: str(os.getpid() != parent), PATIENCE) == "True"
    assert answer_of_child(lambda: "", PATIENCE) == ""
    assert answer_of_child(lambda: "two\nlines", PATIENCE) == "two\nlines"
    assert answer_of_child(lambda: "x" * 100_000, PATIENCE).endswith("xxx")


def raises_lookup_error() -> str:
    raise LookupError


def hangs() -> str:
    threading.Event().wait()
    return ""


def ends() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


@pytest.mark.parametrize(
    ("work", "seconds", "expected"),
    [
        (raises_lookup_error, PATIENCE, "LookupError"),
        (hangs, 0.05, "it hangs"),
        (ends, PATIENCE, "it ends the process"),
    ],
)
def test_what_becomes_of_a_child_that_does_not(work: Callable[[], str], seconds: float, expected: str) -> None:
    before = open_in_process()
    assert answer_of_child(work, seconds) == expected
    assert open_in_process() <= before


# --- What it shows ----------------------------------------------------------------------------------------------------

SPELLINGS = {
    "hexadecimal": SECRET.hex(),
    "in capitals": SECRET.hex().upper(),
    "with colons": SECRET.hex(":"),
    "with spaces": SECRET.hex(" ").upper(),
    "bytes": repr(SECRET),
    "bytes in bytes": repr(b'{"key": "' + SECRET + b'"}'),
    "numbers": str(list(SECRET)),
    "a number": str(int.from_bytes(SECRET, "big")),
    "latin-1": SECRET.decode("latin-1"),
    "in a URL": quote(SECRET),
    **{f"base64 behind {n}": base64.b64encode(b"x" * n + SECRET).decode() for n in range(6)},
    **{f"base64 before {n}": base64.urlsafe_b64encode(SECRET + b"x" * n).decode() for n in range(6)},
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_secret_is_found_however_it_is_spelt(spelling: str) -> None:
    assert shows(f"... {spelling} ...", SECRET)
    assert not shows(spelling, os.urandom(32), in_parts=True)


@pytest.mark.parametrize("quarter", range(4))
def test_a_quarter_is_enough_if_it_is_asked_for(quarter: int) -> None:
    part = SECRET[8 * quarter : 8 * quarter + 8]
    for shown in (part.hex(), repr(part), str(list(part)), base64.b64encode(b"x" + part).decode()):
        assert shows(shown, SECRET, in_parts=True)
        assert not shows(shown, SECRET)
        assert not shows(shown[:-3], SECRET, in_parts=True)


def fails_of_another() -> None:
    error = ValueError("text", "argument")
    error.attribute = "attribute"  # type: ignore[attr-defined] # as SDKs do
    raise error from LookupError("cause")


def test_the_text_of_an_error_is_all_of_it() -> None:
    error = caught(fails_of_another)
    assert isinstance(error, ValueError)
    assert [word for word in ("text", "argument", "attribute", "cause") if word not in text_of(error)] == []
    assert origin_of(error).startswith(f"ValueError in {__file__}, line ")
    assert "text" not in origin_of(error)
    assert origin_of(KeyError("text")) == "KeyError"


# --- What it leaves behind --------------------------------------------------------------------------------------------


def test_what_is_left_open_is_seen_until_it_is_closed() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="the-one-that-is-left")
    before = open_in_process()
    with ExitStack() as stack:
        for end in socket.socketpair():
            stack.enter_context(end)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        stack.callback(child.wait)
        stack.callback(child.communicate, b"\n")
        stack.callback(release.set)
        thread.start()
        left = open_in_process() - before
        assert sum(found.startswith("the socket") for found in left) == 2
        assert sum(found.startswith(f"the child process {child.pid} (") for found in left) == 1
        assert sum("the-one-that-is-left" in found for found in left) == 1
        assert len(left) == 4
    thread.join()
    assert open_in_process() <= before


def test_a_file_is_no_connection() -> None:
    before = open_in_process()
    with open(os.devnull, "rb"):  # noqa: PTH123 - a descriptor is what this is about
        assert open_in_process() == before
