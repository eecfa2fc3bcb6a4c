"""The exchange with a subprocess, against programs that do what a library in C may do to one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sqlalchemy_kravn_crypto.exceptions import ProviderUnavailableError
from sqlalchemy_kravn_crypto.providers.base import Deadline
from sqlalchemy_kravn_crypto.providers.bounded_process import MAX_ANSWER_SIZE, Outcome, exchange
from tests.processes import PATIENCE, children, is_running, wait_until

FOREVER = 600  # seconds that a program would take if nobody ended it

SLEEPS = f"import time; time.sleep({FOREVER})"


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(program), *arguments]


def talk(program: str, *arguments: str, request: bytes = b"{}\n", seconds: float = PATIENCE) -> Outcome:
    return exchange(python(program, *arguments), request, Deadline(seconds), "pkcs11", os.environ)


# --- What comes back -------------------------------------------------------------------------------------------------


def test_a_line_goes_there_and_one_comes_back() -> None:
    outcome = talk("print(input()[::-1])", request=b"abc\n")
    assert (outcome.answer, outcome.too_large) == (b"cba", False)


def test_standard_error_is_shown_to_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    talk("import sys; print('secret', file=sys.stderr); print('ok')")
    assert capfd.readouterr() == ("", "")


def test_a_request_that_is_larger_than_a_pipe_arrives_whole() -> None:
    request = os.urandom(500_000).hex().encode() + b"\n"
    assert talk("print(len(input()))", request=request).answer == b"1000000"


def test_an_answer_may_come_in_pieces() -> None:
    program = """
        import os
        for piece in (b"a", b"b", b"c", b"\\n"):
            os.write(1, piece)
    """
    assert talk(program).answer == b"abc"


def test_what_follows_the_line_is_left_out() -> None:
    assert talk("print('one'); print('two')").answer == b"one"


def test_a_program_need_not_read_the_request() -> None:
    outcome = talk("import os; os.close(0); print('ok')", request=bytes(1_000_000) + b"\n")
    assert outcome.answer == b"ok"


def test_an_answer_counts_though_the_program_hangs_afterwards() -> None:
    before = children()
    assert talk(f"print('ok', flush=True); {SLEEPS}").answer == b"ok"
    assert children() == before


@pytest.mark.parametrize("size", [MAX_ANSWER_SIZE - 1, MAX_ANSWER_SIZE])
def test_an_answer_within_the_bound_is_read(size: int) -> None:
    outcome = talk(f"print('a' * {size})")
    assert (outcome.answer, outcome.too_large) == (b"a" * size, False)


@pytest.mark.parametrize(
    "program", [f"print('a' * {MAX_ANSWER_SIZE + 1})", "while True: print('a' * 4096, end='', flush=True)"]
)
def test_an_answer_beyond_the_bound_is_not(program: str) -> None:
    outcome = talk(program)
    assert (outcome.answer, outcome.too_large) == (None, True)


@pytest.mark.parametrize("program", ["pass", "print('half a line', end='')", "import os; os._exit(0)"])
def test_a_program_that_ends_without_a_line(program: str) -> None:
    outcome = talk(program)
    assert (outcome.answer, outcome.too_large, outcome.status, outcome.signal_name) == (None, False, 0, None)


def test_the_status_that_a_program_ends_with() -> None:
    outcome = talk("import os; os._exit(127)")
    assert (outcome.answer, outcome.status, outcome.signal_name) == (None, 127, None)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE"])
def test_a_program_that_crashes(name: str) -> None:
    program = "import os, resource, signal, sys; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
    outcome = talk(program + f"os.kill(os.getpid(), signal.{name})")
    assert (outcome.answer, outcome.signal_name) == (None, name)


def test_a_signal_without_a_name() -> None:
    assert Outcome(None, too_large=False, status=-99).signal_name == "signal 99"


# --- The deadline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        SLEEPS,
        "while True: pass",
        f"import os; os.close(0); {SLEEPS}",
        f"print('half a line', end='', flush=True); {SLEEPS}",
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}",
    ],
    ids=["sleeps", "spins", "is deaf", "is slow", "ignores a signal"],
)
def test_a_program_that_hangs_is_ended_at_the_deadline(program: str) -> None:
    before = children()
    start = time.monotonic()
    with pytest.raises(ProviderUnavailableError, match=r"0\.3 seconds") as caught:
        talk(program, seconds=0.3)
    assert time.monotonic() - start < FOREVER / 2
    assert caught.value.__context__ is None
    assert children() == before


def test_a_program_that_does_not_take_a_large_request_is_ended_at_the_deadline() -> None:
    before = children()
    with pytest.raises(ProviderUnavailableError):
        talk(SLEEPS, request=bytes(1_000_000), seconds=0.3)
    assert children() == before


def test_a_program_that_closes_its_end_and_hangs_is_ended_at_once() -> None:
    before = children()
    outcome = talk(f"import os; os.close(1); {SLEEPS}")
    assert (outcome.answer, outcome.signal_name) == (None, None)
    assert children() == before


STARTS_ANOTHER = f"""
    import subprocess, sys, time
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({FOREVER})"], stdout=subprocess.DEVNULL)
    open(sys.argv[1], "w").write(str(other.pid))
    {{then}}
"""


@pytest.mark.parametrize(
    ("then", "answer"),
    [("print('ok', flush=True)", b"ok"), (f"import os; os.close(1); time.sleep({FOREVER})", None)],
    ids=["it answers", "it does not"],
)
def test_what_a_program_has_started_is_ended_with_it(tmp_path: Path, then: str, answer: bytes | None) -> None:
    noted = tmp_path / "number"
    outcome = talk(STARTS_ANOTHER.format(then=then), str(noted))
    assert outcome.answer == answer
    number = int(noted.read_text())
    wait_until(lambda: not is_running(number))


def test_threads_may_each_have_an_exchange() -> None:
    before = children()
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda number: talk("print(input())", request=b"%d\n" % number), range(16)))
    assert [outcome.answer for outcome in outcomes] == [b"%d" % number for number in range(16)]
    assert children() == before


def test_nothing_of_this_process_is_left_open_in_the_program(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        os.set_inheritable(file.fileno(), True)  # noqa: FBT003 - by position alone
        outcome = talk(f"import os; print(os.path.exists('/proc/self/fd/{file.fileno()}'))")
    assert outcome.answer == b"False"


def test_a_keypress_in_the_terminal_does_not_reach_the_program() -> None:
    outcome = talk("import os; print(os.getpgid(0) == os.getsid(0) == os.getpid())")
    assert outcome.answer == b"True"


# --- Where it cannot be run ------------------------------------------------------------------------------------------


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(ProviderUnavailableError, match="No such file") as caught:
        exchange(["/nowhere/python"], b"{}\n", Deadline(PATIENCE), "pkcs11", os.environ)
    assert caught.value.__context__ is None
    assert caught.value.provider == "pkcs11"


REAPS_EVERYTHING = """
    import json, os, signal, sys
    from sqlalchemy_kravn_crypto.providers.base import Deadline
    from sqlalchemy_kravn_crypto.providers.bounded_process import exchange

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    outcome = exchange([sys.executable, "-c", "print(input())"], b"abc\\n", Deadline(30), "pkcs11", os.environ)
    print(json.dumps(outcome.answer.decode()))
"""


def test_a_process_that_lets_the_system_reap_its_children() -> None:
    program = [sys.executable, "-c", textwrap.dedent(REAPS_EVERYTHING)]
    done = subprocess.run(program, check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert json.loads(done.stdout) == "abc"


INTERRUPTED = f"""
    import os, sys
    from sqlalchemy_kravn_crypto.providers.base import Deadline
    from sqlalchemy_kravn_crypto.providers.bounded_process import exchange

    sleeps = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep({FOREVER})"
    exchange([sys.executable, "-c", sleeps, sys.argv[1]], b"", Deadline({FOREVER}), "pkcs11", os.environ)
"""


def test_an_interrupt_ends_the_program(tmp_path: Path) -> None:
    noted = tmp_path / "number"
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(noted)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        try:
            wait_until(lambda: noted.exists() and noted.read_text())
            running.send_signal(signal.SIGINT)
            running.wait(PATIENCE)
        finally:
            running.kill()
    number = int(noted.read_text())
    wait_until(lambda: not is_running(number))
