"""Asynchronous drivers: asyncpg, psycopg and aiosqlite, through the ORM and Core."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Date,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    TypeDecorator,
    delete,
    event,
    insert,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.exc import DBAPIError, MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload
from sqlalchemy.util import await_only

from sqlalchemy_kravn_crypto import (
    DataKey,
    Encrypted,
    EncryptedJSON,
    EncryptedString,
    Keyring,
    MutableJSON,
    configure_async,
    guards,
    use_keyring,
)
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.schema import TABLES
from tests.fixtures_postgres import asynchronous
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"
NEIGHBOUR = "N3IGHBOUR" + "-marker"
VALUE = {"token": MARKER, "list": [1, 1.5, True, None, {"grün": "鍵 🔑"}]}
UNSTORABLE = {"token": MARKER, "bad": (1, MARKER)}
ROWS = [{"id": number, "document": {"n": number}, "as_text": [number]} for number in range(1, 51)]
DOCUMENTS = [row["document"] for row in ROWS]


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]
    document: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    as_text: Mapped[Any] = mapped_column(EncryptedJSON(storage="text"), nullable=True)
    tracked: Mapped[dict[str, Any]] = mapped_column(MutableJSON.as_mutable(EncryptedJSON), default=dict)
    tokens: Mapped[list["Token"]] = relationship(lazy="selectin", order_by="Token.id")
    others: Mapped[list["Token"]] = relationship(lazy="select", order_by="Token.id", viewonly=True)


class Token(Base):
    __tablename__ = "token"

    id: Mapped[int] = mapped_column(primary_key=True)
    plugin_id: Mapped[int] = mapped_column(ForeignKey("plugin.id"))
    secret: Mapped[str] = mapped_column(EncryptedString)
    number: Mapped[int | None] = mapped_column(Encrypted(Integer))


PLUGIN = Base.metadata.tables["plugin"]
DOCUMENT = PLUGIN.c.document
IN_ORDER = select(DOCUMENT).order_by(PLUGIN.c.id)

Work = Callable[[AsyncEngine], Coroutine[Any, Any, None]]
Run = Callable[[Work], None]


@asynccontextmanager
async def serving(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield engine
    finally:
        await engine.dispose()


@pytest.fixture(params=["asyncpg", "psycopg", "aiosqlite"])
def run(request: pytest.FixtureRequest) -> Run:
    """Give what runs a coroutine function with an engine of each driver, on a database with the tables."""
    if request.param == "psycopg":
        url: str = request.getfixturevalue("postgres_url")
    else:
        url = asynchronous(request.getfixturevalue("sqlite_url" if request.param == "aiosqlite" else "postgres_url"))

    def run(work: Work) -> None:
        async def main() -> None:
            async with serving(url) as engine:
                await work(engine)

        with use_keyring(Keyring(DataKey(bytes(range(32))))):
            asyncio.run(main())

    return run


@asynccontextmanager
async def filled(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Have a connection to 50 rows."""
    async with engine.begin() as connection:
        await connection.execute(insert(PLUGIN), ROWS)
        yield connection


# --- ORM -------------------------------------------------------------------------------------------------------------


def test_orm_writes_reads_refreshes_and_updates(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            session.add_all(
                [
                    plugin := Plugin(id=1, document=[1], as_text=VALUE),
                    *(Plugin(id=number, as_text=VALUE) for number in (2, 3)),
                ]
            )
            await session.commit()
            await session.refresh(plugin)
            assert (plugin.document, plugin.as_text, plugin.tracked) == ([1], VALUE, {})
            plugin.document = {"changed": MARKER}
            await session.commit()
            await session.refresh(plugin, ["document"])
            assert plugin.document == {"changed": MARKER}
            assert (await session.scalars(select(Plugin.as_text))).all() == [VALUE] * 3
            assert (await session.get_one(Plugin, 1, populate_existing=True)).as_text == VALUE

    run(work)


def test_orm_writes_what_changed_in_place(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            session.add(plugin := Plugin(id=1, tracked={"deep": [{}]}))
            await session.commit()
            plugin.tracked["deep"][0]["token"] = MARKER
            await session.commit()
        async with AsyncSession(engine) as session:
            assert (await session.get_one(Plugin, 1)).tracked == {"deep": [{"token": MARKER}]}

    run(work)


def test_orm_streams(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(insert(Plugin), ROWS)
            everything = select(Plugin).order_by(Plugin.id)
            streamed = await session.stream_scalars(everything)
            assert [plugin.document async for plugin in streamed] == DOCUMENTS
            session.expunge_all()
            streamed = await session.stream_scalars(everything.execution_options(yield_per=7))
            assert [[plugin.as_text for plugin in part] async for part in streamed.partitions()][1] == [
                row["as_text"] for row in ROWS[7:14]
            ]
            rows = await session.stream(select(Plugin.id, Plugin.document).order_by(Plugin.id))
            assert [tuple(row) async for row in rows] == [(row["id"], row["document"]) for row in ROWS]

    run(work)


def test_orm_loads_related_rows(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            tokens = [Token(secret=f"{MARKER}-{number}", number=number) for number in range(3)]
            session.add(Plugin(id=1, document=[1], tokens=tokens))
            await session.commit()
            expected = [(f"{MARKER}-{number}", number) for number in range(3)]
            session.expunge_all()
            plugin = (await session.scalars(select(Plugin))).one()
            assert [(token.secret, token.number) for token in plugin.tokens] == expected
            assert [token.secret for token in await plugin.awaitable_attrs.others] == [one for one, _ in expected]
            session.expunge_all()
            plugin = (await session.scalars(select(Plugin).options(selectinload(Plugin.others)))).one()
            assert [token.number for token in plugin.others] == [0, 1, 2]

    run(work)


def test_orm_inserts_and_updates_in_bulk(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            statement = insert(Plugin).returning(Plugin.id, Plugin.document, sort_by_parameter_order=True)
            returned = await session.execute(statement, ROWS)
            assert [tuple(row) for row in returned] == [(row["id"], row["document"]) for row in ROWS]
            await session.execute(update(Plugin), [{"id": row["id"], "document": [MARKER]} for row in ROWS])
            assert set(map(str, await session.scalars(select(Plugin.document)))) == {str([MARKER])}
            changed = update(Plugin).where(Plugin.id < 3).values(as_text=VALUE).returning(Plugin.as_text)
            assert (await session.scalars(changed)).all() == [VALUE] * 2

    run(work)


# --- Core ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["document", "as_text"])
def test_core_selects_and_streams(run: Run, field: str) -> None:
    expected = [row[field] for row in ROWS]
    statement = select(PLUGIN.c[field]).order_by(PLUGIN.c.id)

    async def work(engine: AsyncEngine) -> None:
        async with filled(engine) as connection:
            assert (await connection.execute(statement)).scalars().all() == expected
            assert [row[0] for row in await connection.execute(statement)] == expected
            assert await connection.scalar(statement.limit(1)) == expected[0]
            async with connection.stream(statement) as streamed:
                assert [value async for value in streamed.scalars()] == expected
            async with connection.stream(statement.execution_options(yield_per=7)) as streamed:
                assert [row[0] for row in await streamed.fetchmany(9)] == expected[:9]
            async with connection.stream_scalars(statement) as scalars:
                assert await scalars.all() == expected

    run(work)


def test_core_returns_what_it_writes(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            statement = insert(PLUGIN).returning(DOCUMENT, sort_by_parameter_order=True)
            assert (await connection.execute(statement, ROWS)).scalars().all() == DOCUMENTS
            changed = update(PLUGIN).where(PLUGIN.c.id == 1).values(document=VALUE).returning(DOCUMENT)
            assert await connection.scalar(changed) == VALUE
            gone = await connection.execute(delete(PLUGIN).where(PLUGIN.c.id <= 1).returning(DOCUMENT))
            assert gone.scalars().all() == [VALUE]

    run(work)


def test_what_is_stored_is_ciphertext(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with filled(engine) as connection:
            stored = await connection.scalars(select(type_coerce(DOCUMENT, LargeBinary)))
            assert {bytes(one)[:2] for one in stored} == {b"\xf9\x02"}
            as_text = await connection.scalars(select(type_coerce(PLUGIN.c.as_text, String)))
            assert {one[:7] for one in as_text} == {"enc:v3:"}

    run(work)


class Waiting(TypeDecorator[int]):
    """What an encrypted type must not be: one that waits for something while it processes a value."""

    impl = Integer
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        await_only(asyncio.sleep(0))
        return value


def test_results_are_read_where_nothing_can_be_awaited(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with filled(engine) as connection:
            result = await connection.execute(IN_ORDER)
            # A thread has neither event loop nor greenlet.
            assert await asyncio.to_thread(result.scalars().all) == DOCUMENTS
            rows = iter(await connection.execute(IN_ORDER))
            assert await asyncio.to_thread(lambda: [row[0] for row in rows]) == DOCUMENTS
            waiting = await connection.execute(select(type_coerce(PLUGIN.c.id, Waiting)))
            with pytest.raises(MissingGreenlet):
                waiting.all()

    run(work)


# --- Errors ----------------------------------------------------------------------------------------------------------


async def flush(session: AsyncSession) -> None:
    session.add(Plugin(note=NEIGHBOUR, document=UNSTORABLE))
    await session.flush()


async def autoflush(session: AsyncSession) -> None:
    session.add(Plugin(note=NEIGHBOUR, document=UNSTORABLE))
    await session.scalars(select(Plugin.id))


async def execute_many(session: AsyncSession) -> None:
    rows = [{"note": NEIGHBOUR, "document": value} for value in (VALUE, UNSTORABLE)]
    await (await session.connection()).execute(insert(PLUGIN), rows)


@pytest.mark.parametrize("write", [flush, autoflush, execute_many])
def test_error_of_an_unstorable_value_is_not_wrapped(
    run: Run, write: Callable[[AsyncSession], Coroutine[Any, Any, None]]
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            with pytest.raises(errors.UnstorableValueError) as caught:
                await write(session)
        assert type(caught.value) is errors.UnstorableValueError
        assert leaked(caught.value, MARKER, NEIGHBOUR) == []

    run(work)


def test_error_of_a_value_that_cannot_be_decrypted_is_not_wrapped(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with filled(engine) as connection:
            result = await connection.execute(IN_ORDER)
            with use_keyring(Keyring(DataKey.generate())):
                with pytest.raises(errors.UnknownKeyError):
                    result.all()
                async with connection.stream(IN_ORDER) as streamed:
                    with pytest.raises(errors.UnknownKeyError):
                        await streamed.first()
                session = AsyncSession(connection)
                with pytest.raises(errors.UnknownKeyError):
                    await session.scalars(select(Plugin))
                streamed_objects = await session.stream_scalars(select(Plugin).execution_options(yield_per=5))
                with pytest.raises(errors.UnknownKeyError):
                    await anext(aiter(streamed_objects))
                await streamed_objects.close()
                await session.close()

    run(work)


def test_connection_serves_on_after_an_error(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            for _ in range(3):
                with pytest.raises(errors.UnstorableValueError):
                    await connection.execute(insert(PLUGIN), {"id": 1, "document": UNSTORABLE})
            await connection.execute(insert(PLUGIN), {"id": 1, "document": VALUE})
            assert await connection.scalar(select(DOCUMENT)) == VALUE

    run(work)


# --- Keyrings and guards ---------------------------------------------------------------------------------------------


def test_tasks_have_keyrings_of_their_own(run: Run) -> None:
    async def of_one_task(engine: AsyncEngine, number: int) -> None:
        with use_keyring(Keyring(DataKey.generate())) as keyring:
            async with AsyncSession(engine) as session:
                session.add(Plugin(id=number, document=[number]))
                await session.commit()
            async with engine.connect() as connection:
                found = await connection.execute(select(DOCUMENT).where(PLUGIN.c.id == number))
                assert found.scalars().all() == [[number]]
                raw = await connection.scalar(select(type_coerce(DOCUMENT, LargeBinary)).where(PLUGIN.c.id == number))
                assert bytes(raw or b"")[2:10].hex() == keyring.primary_key_id

    async def work(engine: AsyncEngine) -> None:
        await asyncio.gather(*(of_one_task(engine, number) for number in range(1, 5)))

    run(work)


SORTED = select(Plugin.id).order_by(Plugin.document)


@pytest.mark.parametrize(("checks", "redacts"), [(True, True), (True, False), (False, True)])
def test_configuring_installs_the_guards(
    run: Run, monkeypatch: pytest.MonkeyPatch, *, checks: bool, redacts: bool
) -> None:
    monkeypatch.setenv("KRAVN_SECRET", "a secret of at least thirty-two characters")

    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(TABLES.keys.metadata.create_all)
            # Not guarded yet.
            await connection.execute(SORTED)
        await configure_async(engine, check_statements=checks, redact_errors=redacts)
        await configure_async(engine, check_statements=checks, redact_errors=redacts)
        async with AsyncSession(engine) as session:
            if checks:
                with pytest.raises(errors.UnsupportedOperationError, match=r"Plugin\.document is encrypted"):
                    await session.execute(SORTED)
                with pytest.raises(errors.UnsupportedOperationError):
                    await session.stream(SORTED)
            else:
                await session.execute(SORTED)
        async with engine.connect() as connection:
            with pytest.raises(DBAPIError) as caught:
                await connection.execute(text("INSERT INTO nowhere (note) VALUES (:note)"), {"note": NEIGHBOUR})
        assert bool(leaked(caught.value, NEIGHBOUR)) is not redacts
        assert event.contains(engine.sync_engine, "before_cursor_execute", guards._check_before_execution) is checks

    run(work)


def test_engines_that_are_not_configured_are_not_guarded(run: Run) -> None:
    async def work(engine: AsyncEngine) -> None:
        guards.install(engine.sync_engine)
        table = Table("plain", MetaData(), Column("born", Encrypted(Date)), Column("note", String))
        async with engine.connect() as connection:
            with pytest.raises(errors.UnsupportedOperationError):
                await connection.execute(select(table).order_by(table.c.born))
        other = create_async_engine(engine.url)
        async with other.begin() as connection:
            await connection.run_sync(table.create)
            assert (await connection.execute(select(table).order_by(table.c.born))).all() == []
        await other.dispose()

    run(work)
