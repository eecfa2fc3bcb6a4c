"""Re-encrypting on each database: every value once, nobody's change lost, and nothing else touched."""

import json
import math
import pickle
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    DateTime,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Uuid,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, EncryptedString, guards, use_keyring
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.context import publish
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, declared
from sqlalchemy_kravn_crypto.ledger import Counts, Shard, claim, finish
from sqlalchemy_kravn_crypto.rekey import FOLLOWED, RekeyResult, plan, rekey, rekey_shard
from sqlalchemy_kravn_crypto.rekey_worker import UnreadableValue
from sqlalchemy_kravn_crypto.schema import TABLES
from tests.rekeying import (
    NEW,
    NEW_KEY,
    OLD,
    OLD_KEY,
    ONLY_NEW,
    WatchedKeyring,
    contents,
    engine_of,
    fill,
    known_column,
    opened,
    payloads,
    ready,
    stored,
    table_of,
)


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = engine_of(any_database_url)
    yield made
    made.dispose()


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Engine]:
    made = engine_of(postgres_url)
    yield made
    made.dispose()


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Engine]:
    made = engine_of(sqlite_url)
    yield made
    made.dispose()


NEW_YEAR = datetime(2026, 1, 1)  # noqa: DTZ001 - as the database returns it


# --- Every value -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["binary", "text"])
def test_every_stale_value_and_no_other(engine: Engine, storage: str) -> None:
    table = table_of(engine, storage)
    texts = [b"", b"x", b"y" * 9000, *(str(number).encode() for number in range(40))]
    before = [stored(OLD, payload, storage) for payload in texts]
    fresh = stored(NEW, b"fresh", storage)
    fill(engine, table, [None, fresh, *before, None])
    result = rekey(engine, NEW, [known_column(storage)], shards=4, batch_size=7)
    assert result.counts == Counts(rekeyed=43)
    assert (result.is_complete, result.left, result.unreadable) == (True, {}, ())
    after = contents(engine, table)
    assert (after[0], after[-1], after[1]) == (None, None, fresh)
    assert payloads(ONLY_NEW, after[2:-1], storage) == texts
    assert len(set(after[2:-1])) == 43


def test_a_second_time_there_is_nothing_to_do(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"x")] * 3)
    rekey(engine, NEW, [known_column()])
    after = contents(engine, table)
    assert rekey(engine, NEW, [known_column()]).counts == Counts()
    assert contents(engine, table) == after


def test_values_under_any_key_are_stale(engine: Engine) -> None:
    others = [DataKey.generate() for _ in range(3)]
    table = table_of(engine)
    fill(engine, table, [stored(Keyring(key), b"x") for key in others])
    rekey(engine, Keyring(NEW_KEY, others), [known_column()])
    assert payloads(ONLY_NEW, contents(engine, table)) == [b"x"] * 3


@pytest.mark.parametrize("rows", [[], [None, None]], ids=["no rows", "only NULL"])
def test_a_table_without_values(engine: Engine, rows: list[None]) -> None:
    table = table_of(engine)
    if rows:
        fill(engine, table, rows)
    result = rekey(engine, NEW, [known_column()])
    assert result.is_complete
    assert result.counts == Counts()
    assert contents(engine, table) == rows


UUIDS = [uuid.UUID(int=number * 7 << 96 | number) for number in range(30)]
KEYS: dict[str, tuple[list[Any], list[tuple[Any, ...]]]] = {
    "string": ([String(40)], [(f"ключ {number % 7} \\ '{number}\" {{,}}",) for number in range(30)]),
    "uuid": ([Uuid], [(one,) for one in UUIDS]),
    "composite": ([String(20), Integer], [(f"t{number % 4}", number) for number in range(30)]),
    "of three": ([Integer, Uuid, String(9)], [(n % 3, UUIDS[n % 5], str(n)) for n in range(30)]),
}


@pytest.mark.parametrize("storage", ["binary", "text"])
@pytest.mark.parametrize("kind", KEYS)
def test_primary_keys_of_all_kinds(engine: Engine, kind: str, storage: str) -> None:
    types, keys = KEYS[kind]
    columns = [Column(f"k{place}", one, primary_key=True, autoincrement=False) for place, one in enumerate(types)]
    table = table_of(engine, storage, *columns)
    rows = [
        {f"k{place}": value for place, value in enumerate(key)} | {"secret": stored(OLD, repr(key).encode(), storage)}
        for key in keys
    ]
    with engine.begin() as connection:
        connection.execute(table.insert(), rows)
    result = rekey(engine, NEW, [known_column(storage)], shards=3, batch_size=4)
    assert (result.counts, result.is_complete) == (Counts(rekeyed=30), True)
    with engine.connect() as connection:
        for *key, value in connection.execute(select(*table.primary_key.columns, table.c.secret)):
            assert opened(ONLY_NEW, value, storage) == repr(tuple(key)).encode()


def test_names_that_need_quotes_and_look_like_parameters(engine: Engine) -> None:
    key, value = ("Order", "%(after)s: key_0") if engine.dialect.name == "postgresql" else ("after", "before")
    table = Table(
        'My "Table"' if engine.dialect.name != "mariadb" else "My Table",
        MetaData(),
        Column(key, Integer, primary_key=True, autoincrement=False),
        Column(value, LargeBinary),
        Column("new", Integer),
    )
    table.create(engine)
    with engine.begin() as connection:
        rows = [{key: number, value: stored(OLD, b"x", name="n"), "new": number} for number in range(5)]
        connection.execute(insert(table), rows)
    result = rekey(engine, NEW, [KnownColumn("", table.name, value, "binary", "n")], batch_size=2)
    assert result.counts == Counts(rekeyed=5)
    with engine.connect() as connection:
        for found in connection.scalars(select(table.c[value])):
            assert opened(ONLY_NEW, found, name="n") == b"x"


def test_schemas(postgres: Engine) -> None:
    with postgres.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
    here, there = table_of(postgres), table_of(postgres, schema="tenant")
    for table in (here, there):
        fill(postgres, table, [stored(OLD, b"x")] * 5)
    moved = postgres.execution_options(schema_translate_map={None: "nowhere", "tenant": "nowhere"})
    result = rekey(moved, NEW, [known_column(schema="tenant")])
    assert result.counts == Counts(rekeyed=5)
    assert payloads(ONLY_NEW, contents(postgres, there)) == [b"x"] * 5
    assert payloads(OLD, contents(postgres, here)) == [b"x"] * 5


def test_values_keep_the_name_that_they_were_written_for(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"now"), stored(OLD, b"then", name="first"), stored(OLD, b"too", name="second")])
    rekey(engine, NEW, [known_column(earlier=["first", "second"])])
    now, then, too = contents(engine, table)
    assert opened(ONLY_NEW, now) == b"now"
    assert opened(ONLY_NEW, then, name="first") == b"then"
    assert opened(ONLY_NEW, too, name="second") == b"too"


# --- The ORM ---------------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(8))
    secret: Mapped[dict[str, Any]] = mapped_column("db_secret", EncryptedJSON)
    version: Mapped[int] = mapped_column(default=1)
    changed: Mapped[datetime] = mapped_column(DateTime, default=NEW_YEAR, onupdate=datetime.now)
    __mapper_args__ = {  # noqa: RUF012 - as SQLAlchemy has it
        "polymorphic_on": "kind",
        "polymorphic_identity": "plain",
        "version_id_col": version,
    }


class Single(Account):
    extra: Mapped[str | None] = mapped_column(EncryptedString(storage="text"))
    __mapper_args__ = {"polymorphic_identity": "single"}  # noqa: RUF012 - as above


class Joined(Account):
    __tablename__ = "joined"

    id: Mapped[int] = mapped_column(ForeignKey("account.id"), primary_key=True, autoincrement=False)
    note: Mapped[str] = mapped_column(EncryptedString)
    __mapper_args__ = {"polymorphic_identity": "joined"}  # noqa: RUF012 - as above


def test_models_with_inheritance_keep_their_versions_and_dates(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    guards.install(engine)
    with use_keyring(OLD), Session(engine) as session:
        session.add(Account(id=1, secret={"a": 1}))
        session.add(Single(id=2, secret={"a": 2}, extra="extra"))
        session.add(Joined(id=3, secret={"a": 3}, note="note"))
        session.commit()
    result = rekey(engine, NEW, declared(Base.metadata))
    assert (result.counts, result.is_complete) == (Counts(rekeyed=5), True)
    with use_keyring(ONLY_NEW), Session(engine) as session:
        one, two, three = session.scalars(select(Account).order_by(Account.id))
        assert isinstance(two, Single)
        assert isinstance(three, Joined)
        assert (one.secret, two.secret, three.secret) == ({"a": 1}, {"a": 2}, {"a": 3})
        assert (two.extra, three.note) == ("extra", "note")
        assert {found.version for found in (one, two, three)} == {1}
        assert {found.changed for found in (one, two, three)} == {NEW_YEAR}


def test_what_mariadb_changes_by_itself_it_does_not(mariadb_url: str) -> None:
    engine = engine_of(mariadb_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE a (id int PRIMARY KEY, secret longblob, changed DATETIME DEFAULT '2026-01-01' ON UPDATE "
                "CURRENT_TIMESTAMP, changed_too TIMESTAMP NULL DEFAULT '2026-01-02' ON UPDATE CURRENT_TIMESTAMP)"
            )
        )
        connection.execute(text("INSERT INTO a (id, secret) VALUES (1, :value)"), {"value": stored(OLD, b"x")})
    assert rekey(engine, NEW, [known_column()]).counts == Counts(rekeyed=1)
    with engine.connect() as connection:
        value, *dates = connection.execute(text("SELECT secret, changed, changed_too FROM a")).one()
    assert opened(ONLY_NEW, value) == b"x"
    assert dates == [NEW_YEAR, NEW_YEAR + timedelta(days=1)]
    engine.dispose()


# --- Others who write ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [OLD, NEW], ids=["under the old key", "under the new key"])
def test_a_change_meanwhile_wins(engine: Engine, writer: Keyring) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"0"), stored(OLD, b"1"), stored(OLD, b"2")])

    def change() -> None:
        with engine.begin() as connection:
            connection.execute(update(table).where(table.c.id == 1).values(secret=stored(writer, b"changed")))

    seen: list[Counts] = []
    result = rekey(
        engine,
        WatchedKeyring(NEW_KEY, [OLD_KEY], change),
        [known_column()],
        shards=1,
        on_progress=lambda _, counts: seen.append(counts),
    )
    assert seen[0] == Counts(rekeyed=2, conflicts=1)
    assert result.counts == Counts(rekeyed=3 if writer is OLD else 2, conflicts=1)
    assert result.is_complete
    assert payloads(ONLY_NEW, contents(engine, table)) == [b"0", b"changed", b"2"]


def test_a_row_that_is_deleted_or_emptied_meanwhile_stays_so(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"0"), stored(OLD, b"1"), stored(OLD, b"2")])

    def change() -> None:
        with engine.begin() as connection:
            connection.execute(table.delete().where(table.c.id == 0))
            connection.execute(update(table).where(table.c.id == 1).values(secret=None))

    result = rekey(engine, WatchedKeyring(NEW_KEY, [OLD_KEY], change), [known_column()], shards=1)
    assert result.counts == Counts(rekeyed=1, conflicts=2)
    assert result.is_complete
    first, second = contents(engine, table)
    assert first is None
    assert opened(ONLY_NEW, second) == b"2"


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("storage", ["binary", "text"])
@pytest.mark.parametrize("url", ["postgres_url", "mariadb_url"])  # SQLite has no locks on rows
def test_a_locked_row_is_passed_over_and_left(
    request: pytest.FixtureRequest,
    url: str,
    storage: str,
    composite: bool,  # noqa: FBT001 - of the test
) -> None:
    engine = engine_of(request.getfixturevalue(url))
    columns: list[Column[Any]] = [Column("id", Integer, primary_key=True, autoincrement=False)]
    if composite:
        columns.append(Column("more", String(5), primary_key=True, default="more"))
    table = table_of(engine, storage, *columns)
    fill(engine, table, [stored(OLD, str(number).encode(), storage) for number in range(6)])
    with engine.connect() as other:
        other.execute(select(table.c.id).where(table.c.id == 2).with_for_update())
        result = rekey(engine, NEW, [known_column(storage)])
        assert result.counts.rekeyed == 5
        assert result.left == {"a.secret": 1}
        assert not result.is_complete
    result = rekey(engine, NEW, [known_column(storage)])
    assert (result.counts, result.is_complete) == (Counts(rekeyed=1), True)
    assert payloads(ONLY_NEW, contents(engine, table), storage) == [str(number).encode() for number in range(6)]
    engine.dispose()


def test_a_row_that_a_foreign_key_holds_on_to_is_replaced(postgres: Engine) -> None:
    table = table_of(postgres)
    fill(postgres, table, [stored(OLD, b"x"), stored(OLD, b"y")])
    with postgres.connect() as one, postgres.connect() as other:
        one.execute(select(table.c.id).where(table.c.id == 0).with_for_update(read=True, key_share=True))
        other.execute(select(table.c.id).where(table.c.id == 1).with_for_update())
        result = rekey(postgres, NEW, [known_column()])
    assert result.counts.rekeyed == 1
    assert result.left == {"a.secret": 1}
    assert opened(ONLY_NEW, contents(postgres, table)[0]) == b"x"


def test_who_writes_late_under_an_old_key_is_followed(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, str(number).encode()) for number in range(10)])
    late = [0, 1]

    def write(_shard: Shard, _counts: Counts) -> None:
        if late:
            with engine.begin() as connection:
                row = update(table).where(table.c.id == late.pop())
                connection.execute(row.values(secret=stored(OLD, b"late")))

    result = rekey(engine, NEW, [known_column()], shards=1, batch_size=5, on_progress=write)
    assert result.is_complete
    assert result.counts == Counts(rekeyed=12)
    assert payloads(ONLY_NEW, contents(engine, table))[:3] == [b"late", b"late", b"2"]


class Clock:
    """A clock that goes while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_who_writes_under_an_old_key_without_an_end_is_followed_for_a_lease_and_no_longer(engine: Engine) -> None:
    """What is left is then said, and done by the next run once the writer has been ended."""
    table, clock = table_of(engine), Clock()
    fill(engine, table, [stored(OLD, b"x")])
    passes = []

    def write(_shard: Shard, _counts: Counts) -> None:
        passes.append(clock.now)
        with engine.begin() as connection:
            connection.execute(update(table).values(secret=stored(OLD, b"late")))

    result = rekey(engine, NEW, [known_column()], clock=clock, sleep=clock.sleep, on_progress=write)
    assert result.left == {"a.secret": 1}
    assert not result.is_complete
    assert passes[:3] == [0.0, 0.0, 1.0]
    assert passes[-1] == FOLLOWED == len(passes) - 2
    assert rekey(engine, NEW, [known_column()]).is_complete


def test_rows_that_change_without_an_end_keep_no_worker_at_one_shard(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"0"), stored(OLD, b"1")])
    [shard] = plan(engine, [known_column()], NEW, shards=1)

    def write(number: int) -> None:
        with engine.begin() as connection:
            connection.execute(update(table).where(table.c.id == number).values(secret=stored(OLD, b"late")))

    def while_encrypting() -> None:
        write(0)
        keyring.meanwhile = while_encrypting

    def after_batch(_shard: Shard, counts: Counts) -> None:
        seen.append(counts)
        write(1)

    keyring, seen = WatchedKeyring(NEW_KEY, [OLD_KEY], while_encrypting), list[Counts]()
    result = rekey_shard(engine, keyring, shard, on_progress=after_batch)
    assert seen == [Counts(rekeyed=1, conflicts=1)] * 3
    assert result.counts == Counts(rekeyed=3, conflicts=3)
    assert rekey(engine, NEW, [known_column()]).is_complete


@pytest.mark.parametrize(("first", "left"), [("stale", 0), ("garbage", 1)])
def test_what_an_earlier_run_left_in_a_finished_shard_is_seen_again(engine: Engine, first: str, left: int) -> None:
    """Somebody wrote it there late; that run was stopped before it came round again, and the rest of it is in vain."""
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"0") if first == "stale" else b"garbage", stored(OLD, b"1")])
    shards = plan(engine, [known_column()], NEW, shards=2)
    with ready(engine) as connection:
        claimed = claim(connection, "stopped", shards[:1])
        assert claimed is not None
        assert finish(connection, claimed)
        connection.execute(update(table).where(table.c.id == 1).values(secret=stored(NEW, b"1")))
        connection.commit()
    result = rekey(engine, NEW, [known_column()])
    assert result.counts == Counts(rekeyed=1 - left, unreadable=left)
    assert sum(result.left.values()) == left
    assert [one.key for one in result.unreadable] == [(0,)] * left


# --- What does not decrypt -------------------------------------------------------------------------------------------


def test_what_does_not_decrypt_is_named_counted_and_left(engine: Engine) -> None:
    table = table_of(engine)
    unknown = stored(Keyring(DataKey.generate()), b"x")
    altered = stored(OLD, b"altered")
    altered = altered[:-1] + bytes([altered[-1] ^ 1])
    elsewhere = stored(OLD, b"x", name="other.column")
    bad = [b"plaintext", altered, unknown, elsewhere, stored(OLD, b"x")[:20], b"\xf9\x77" + bytes(60), b""]
    fill(engine, table, [stored(OLD, b"good"), *bad, stored(OLD, b"good")])
    result = rekey(engine, NEW, [known_column()], batch_size=4, shards=2)
    assert result.counts == Counts(rekeyed=2, unreadable=7)
    assert result.unreadable == tuple(
        UnreadableValue("a.secret", (number,), error)
        for number, error in enumerate(
            [
                "MalformedCiphertextError",
                "AuthenticationError",
                "UnknownKeyError",
                "WrongColumnError",
                "MalformedCiphertextError",
                "UnsupportedAlgorithmError",
                "MalformedCiphertextError",
            ],
            start=1,
        )
    )
    assert result.left == {"a.secret": 7}
    assert not result.is_complete
    assert contents(engine, table)[1:-1] == bad
    again = rekey(engine, NEW, [known_column()])
    assert again.unreadable == result.unreadable
    assert again.left == {"a.secret": 7}


def test_text_that_is_no_frame_is_unreadable_in_either_storage(sqlite: Engine) -> None:
    table_of(sqlite)
    table_of(sqlite, "text", name="b")
    with sqlite.begin() as connection:
        connection.execute(text("INSERT INTO a VALUES (1, 'plaintext')"))
        connection.execute(text("INSERT INTO b VALUES (1, 'enc:v3:-QI='), (2, 'enc:v1:x')"))
    result = rekey(sqlite, NEW, [known_column(), known_column("text", table="b")])
    assert [(one.column, one.key) for one in result.unreadable] == [
        ("a.secret", (1,)),
        ("b.secret", (1,)),
        ("b.secret", (2,)),
    ]
    assert result.left == {"a.secret": 1, "b.secret": 2}


@pytest.mark.parametrize("octets", ["ff", "61ff", "6100ff", "", "c3a4", "656e633a76333a2d5149ff"])
@pytest.mark.parametrize("storage", ["binary", "text"])
def test_text_that_is_no_utf_8_is_unreadable_like_other_garbage(sqlite: Engine, storage: str, octets: str) -> None:
    table = table_of(sqlite, storage)
    fill(sqlite, table, [stored(OLD, b"good", storage), None, stored(OLD, b"good", storage)])
    with sqlite.begin() as connection:
        connection.execute(text(f"UPDATE a SET secret = CAST(x'{octets}' AS TEXT) WHERE id = 1"))  # noqa: S608
    result = rekey(sqlite, NEW, [known_column(storage)])
    assert result.counts == Counts(rekeyed=2, unreadable=1)
    assert [(one.key, one.error) for one in result.unreadable] == [((1,), "MalformedCiphertextError")]
    assert result.left == {"a.secret": 1}


def test_a_thousand_are_named_and_all_are_counted(sqlite: Engine) -> None:
    fill(sqlite, table_of(sqlite), [b"plaintext"] * 1003)
    result = rekey(sqlite, NEW, [known_column()], batch_size=300)
    assert result.counts.unreadable == 1003
    assert [one.key for one in result.unreadable] == [(number,) for number in range(1000)]


def test_the_result_is_json_without_values(sqlite: Engine) -> None:
    fill(sqlite, table_of(sqlite), [stored(OLD, b"x"), b"plaintext"])
    result = rekey(sqlite, NEW, [known_column(), known_column(table="gone")])
    as_json = json.dumps(result.as_dict())
    assert "plaintext" not in as_json
    found = json.loads(as_json)
    assert found["unreadable"] == [{"column": "a.secret", "key": ["1"], "error": "MalformedCiphertextError"}]
    assert (found["rekeyed"], found["conflicts"], found["unreadable_count"]) == (1, 0, 1)
    assert found["left"] == {"a.secret": 1}
    assert [one["column"] for one in found["unreachable"]] == ["gone.secret"]
    assert found["census"]["columns"][0]["keys"] == {NEW.primary_key_id: 1}


# --- What cannot be reached ------------------------------------------------------------------------------------------


def test_unreachable_columns_are_reported_and_the_others_done(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"x")])
    Table("bare", MetaData(), Column("secret", LargeBinary)).create(engine)
    gone, bare = known_column(table="gone"), known_column(table="bare")
    result = rekey(engine, NEW, [gone, bare, known_column()])
    assert {one.column for one in result.unreachable} == {gone, bare}
    assert not result.is_complete
    assert result.counts == Counts(rekeyed=1)
    for column in (gone, bare):
        with pytest.raises(errors.ColumnUnreachableError, match=column.table):
            plan(engine, [known_column(), column], NEW)


def enter_primary(engine: Engine, key_id: str) -> None:
    row = {"id": 2, "key_id": key_id, "keyring": "default", "state": "primary", "primary_of": "default"}
    with engine.begin() as connection:
        connection.execute(insert(TABLES.keys).values(row))


def test_a_keyring_that_is_outdated_moves_nothing_back(engine: Engine) -> None:
    table = table_of(engine)
    before = [stored(NEW, b"x")]
    fill(engine, table, before)
    enter_primary(engine, NEW.primary_key_id)
    for call in (plan, lambda *given: rekey(given[0], given[2], given[1])):
        with pytest.raises(errors.OutdatedKeyringError, match=NEW.primary_key_id):
            call(engine, [known_column()], OLD)
    assert contents(engine, table) == before
    assert rekey(engine, NEW, [known_column()]).is_complete


def test_a_shard_is_done_under_the_key_that_it_was_planned_for(engine: Engine) -> None:
    table = table_of(engine)
    before = [stored(OLD, b"x")]
    fill(engine, table, before)
    shard = plan(engine, [known_column()], NEW)[0]
    with pytest.raises(errors.OutdatedKeyringError, match=NEW.primary_key_id):
        rekey_shard(engine, Keyring(DataKey.generate(), [OLD_KEY]), shard)
    assert contents(engine, table) == before
    # It was given back, so that nobody waits for the lease.
    assert rekey_shard(engine, NEW, shard, sleep=never).counts == Counts(rekeyed=1)


def never(_seconds: float) -> None:
    raise AssertionError("nobody is to be waited for")


def test_without_a_keyring_it_is_that_of_the_process(sqlite: Engine) -> None:
    table = table_of(sqlite)
    fill(sqlite, table, [stored(OLD, b"x")])
    with pytest.raises(errors.NotConfiguredError):
        rekey(sqlite, None, [known_column()])
    publish(NEW, writable_until=-math.inf)
    with pytest.raises(errors.LeaseExpiredError):
        rekey(sqlite, None, [known_column()])
    publish(NEW)
    assert rekey(sqlite, None, [known_column()]).is_complete
    assert payloads(ONLY_NEW, contents(sqlite, table)) == [b"x"]


# --- Plans and shares ------------------------------------------------------------------------------------------------


def test_a_plan_divides_the_stale_values(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(NEW, b"x")] * 50 + [stored(OLD, b"x")] * 10)
    shards = plan(engine, [known_column()], NEW, shards=5)
    assert [shard.rows for shard in shards] == [2] * 5
    assert (shards[0].lower, shards[-1].upper) == (None, None)
    assert [shard.upper for shard in shards[:-1]] == [shard.lower for shard in shards[1:]]
    results = [rekey_shard(engine, NEW, pickle.loads(pickle.dumps(shard))) for shard in shards]  # noqa: S301 - made here
    assert [result.counts.rekeyed for result in results] == [2] * 5
    assert pickle.loads(pickle.dumps(results)) == results  # noqa: S301 - made here


@pytest.mark.parametrize(("stale", "shards"), [(3, 3), (11, 4)])
def test_there_are_no_more_shards_than_values(engine: Engine, stale: int, shards: int) -> None:
    fill(engine, table_of(engine), [stored(OLD, b"x")] * stale)
    assert len(plan(engine, [known_column()], NEW, shards=4)) == shards


def test_a_plan_is_kept_until_it_is_done(engine: Engine) -> None:
    fill(engine, table_of(engine), [stored(OLD, b"x")] * 9)
    shards = plan(engine, [known_column()], NEW, shards=3)
    rekey_shard(engine, NEW, shards[1])
    assert plan(engine, [known_column()], NEW, shards=7) == [shards[0], shards[2]]


def entering(numbers: set[int]) -> Callable[[Shard, Counts], None]:
    def enter(shard: Shard, _counts: Counts) -> None:
        numbers.add(shard.number)

    return enter


def test_fixed_shares_are_disjoint_and_complete(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"x")] * 20)
    done: dict[int, set[int]] = {1: set(), 2: set()}
    results = [
        rekey(
            engine,
            NEW,
            [known_column()],
            shard=(number, 2),
            shards=4,
            batch_size=3,
            on_progress=entering(done[number]),
            sleep=never,
        )
        for number in (1, 2)
    ]
    assert done == {1: {0, 2}, 2: {1, 3}}
    assert [result.counts.rekeyed for result in results] == [10, 10]
    assert all(result.is_complete for result in results)
    assert payloads(ONLY_NEW, contents(engine, table)) == [b"x"] * 20


def test_a_share_that_is_done_again_tells_what_is_left_in_it(engine: Engine) -> None:
    fill(engine, table_of(engine), [b"plaintext", *[stored(OLD, b"x")] * 7])

    def share(number: int) -> RekeyResult:
        return rekey(engine, NEW, [known_column()], shard=(number, 2), shards=2)

    assert share(1).left == {"a.secret": 1}
    again = share(1)
    assert (again.left, again.counts) == ({"a.secret": 1}, Counts())
    assert share(2).is_complete


@pytest.mark.parametrize("share", [(0, 2), (3, 2), (1, 0)])
def test_a_share_is_one_of_those_that_there_are(sqlite: Engine, share: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="shard"):
        rekey(sqlite, NEW, [], shard=share)
