"""What the commands print, and how far they say that a rekey is."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto.commands.output import Output, note, printable, time_of
from sqlalchemy_kravn_crypto.commands.progress import Display, Meter
from sqlalchemy_kravn_crypto.known_columns import KnownColumn
from sqlalchemy_kravn_crypto.ledger import Counts, Shard, advance, claim, unfinished_shards, write_plan
from sqlalchemy_kravn_crypto.replicas import new_replica_id
from sqlalchemy_kravn_crypto.rows import connect
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.status import Problem

MOMENT = datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
NOTE = KnownColumn("", "note", "content", "binary", "note.content")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_for_a_program_there_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.say("a line")
    out.labelled("label", "a line")
    out.table("table", ("heading",), [("cell",)])
    note("what is waited for")
    out.result({"at": MOMENT, "problem": Problem("Error", "a message")})
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "at": "2030-01-02T03:04:05.000678+00:00",
        "problem": {"error": "Error", "message": "a message"},
    }
    assert printed.err == "what is waited for\n"


def test_for_a_pipe_every_row_is_a_line_of_as_many_words(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=False)
    out.result({"not": "printed"})
    out.table("data key", ("key", "standby", "since"), [("a", "", "b"), ("[bold]c[/]", "d", "")])
    out.table("nothing", ("heading",), [])
    out.labelled("epoch", "7")
    assert capsys.readouterr().out.splitlines() == [
        "data key:      a - b",
        "data key:      [bold]c[/] d -",
        "epoch:         7",
    ]


def test_what_is_not_meant_to_be_printed_is_not() -> None:
    with pytest.raises(TypeError, match="bytes is not to be printed"):
        Output(as_json=True).result({"key": b"MARKER"})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("grün — 鍵", "grün — 鍵"),
        ("a\x1b[2Jb\r\nc\x9b", "a\\x1b[2Jb\\r\\nc\\x9b"),
        ("\u202e", "\\u202e"),
    ],
)
def test_no_text_gives_a_terminal_commands(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_times_are_in_utc() -> None:
    assert time_of(MOMENT.astimezone(timezone(timedelta(hours=5)))) == "2030-01-02T03:04:05Z"
    assert time_of(None) == ""


# --- How far a rekey is ----------------------------------------------------------------------------------------------


def test_rate_and_time_left_go_by_what_was_seen_since_the_first_look() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.update(1000, 10_000)
    assert str(meter) == "1,000 of 10,000 values"
    clock.now += 10
    meter.update(3500, 10_000)
    assert str(meter) == "3,500 of 10,000 values, 250 a second, 0:26 left"
    clock.now += 290
    meter.update(4000, 10_000)
    assert str(meter) == "4,000 of 10,000 values, 10 a second, 10:00 left"
    meter.update(10_400, 10_000)
    assert str(meter).startswith("10,400 of 10,400 values, ")


def test_another_pass_is_measured_anew() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.update(0, 100)
    clock.now += 10
    meter.update(100, 100)
    meter.update(10, 40)
    assert str(meter) == "10 of 40 values"


def test_the_ledger_is_looked_at_now_and_then_and_at_the_end(sqlite_url: str) -> None:
    engine, clock = create_engine(sqlite_url), Clock()
    TABLES.keys.metadata.create_all(engine)
    key_id = "0123456789abcdef"
    with connect(engine) as connection:
        write_plan(connection, NOTE, key_id, [], 10)
        (shard,) = unfinished_shards(connection, [NOTE], key_id)
        connection.rollback()
        write_plan(connection, KnownColumn("", "other", "c", "binary", "c"), "f" * 16, [], 99)
        claimed = claim(connection, new_replica_id(), [shard])
        assert claimed is not None

        meter, shown = Meter(clock), list[str]()
        display = Display(engine, meter, 10.0, lambda: shown.append(str(meter)))
        display.refresh()
        assert shown == []  # nothing was to be done

        def batch(counts: Counts) -> None:
            advance(connection, claimed, None, counts)
            connection.commit()
            display.after_batch(shard, counts)

        batch(Counts(rekeyed=2))
        assert shown == ["2 of 10 values"]  # of the plan for this key alone
        clock.now += 9
        batch(Counts(rekeyed=2))
        assert len(shown) == 1
        clock.now += 1
        batch(Counts(conflicts=1, unreadable=1))
        assert shown[1:] == ["6 of 10 values, 0 a second, 0:10 left"]
        display.refresh()
        assert len(shown) == 3
    assert isinstance(shard, Shard)
    engine.dispose()
