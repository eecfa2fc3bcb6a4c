"""MariaDB, where it is not like the others: its types, its text in bytes, and DDL outside of transactions."""

from collections.abc import Iterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect, make_url, select, text, type_coerce
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import LargeBinary

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, configure, reset, use_keyring
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.schema import TABLE_NAMES, TABLES, VERSION_TABLE
from sqlalchemy_kravn_crypto.status import status

ALL = {*TABLE_NAMES, VERSION_TABLE}
# TEXT and BLOB end at 64 KiB there.
DOCUMENT = {"token": "s3cr3t", "größe": "70 kB", "filling": "x" * 70_000}


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True)
    credentials: Mapped[dict[str, Any] | None] = mapped_column(EncryptedJSON)
    extra: Mapped[dict[str, Any] | None] = mapped_column(EncryptedJSON(storage="text"))


@pytest.fixture(params=["mariadb", "mysql"])
def engine(mariadb_url: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Give an engine of either dialect; SQLAlchemy has two names for MariaDB."""
    made = create_engine(make_url(mariadb_url).set(drivername=f"{request.param}+pymysql"))
    assert made.dialect.name == request.param
    yield made
    made.dispose()


def test_the_migrations_create_what_the_schema_module_describes(engine: Engine) -> None:
    migrate(engine)
    migrate(engine)
    assert set(inspect(engine).get_table_names()) == ALL
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, TABLES.keys.metadata) == []


def test_it_creates_the_same_checks_as_the_schema_module(engine: Engine) -> None:
    def checks() -> dict[str, str]:
        found = inspect(engine).get_check_constraints("kms_keys")
        return {str(check["name"]): str(check["sqltext"]) for check in found}

    migrate(engine)
    migrated = checks()
    assert len(migrated) == 3
    TABLES.keys.metadata.drop_all(engine)
    TABLES.keys.metadata.create_all(engine)
    assert checks() == migrated


def test_the_first_boot_makes_a_key_and_the_second_reads_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRAVN_SECRET", "a secret of at least thirty-two characters")
    migrate(engine)
    Base.metadata.create_all(engine)
    configure(engine)
    with Session(engine) as session:
        session.add(Plugin(id=1, credentials=DOCUMENT, extra={"a": 1}))
        session.commit()
    reset()
    configure(engine)
    with Session(engine) as session:
        assert session.get_one(Plugin, 1).credentials == DOCUMENT
    assert "primary" in str(status(engine))


def test_values_come_back_equal_in_both_storages(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    with use_keyring(Keyring(DataKey.generate())):
        with Session(engine) as session:
            session.add_all([Plugin(id=1, credentials=DOCUMENT, extra=DOCUMENT), Plugin(id=2)])
            session.commit()
        with Session(engine) as session:
            stored = session.get_one(Plugin, 1)
            assert (stored.credentials, stored.extra) == (DOCUMENT, DOCUMENT)
            assert session.get_one(Plugin, 2).credentials is None
            assert session.scalars(select(Plugin.id).where(Plugin.extra.is_(None))).all() == [2]
    table = Plugin.__table__
    with engine.connect() as connection:
        binary = connection.scalar(select(type_coerce(table.c.credentials, LargeBinary())).where(table.c.id == 1))
        assert isinstance(binary, bytes)
        assert b"s3cr3t" not in binary
        types: dict[str, Any] = {column["name"]: column["type"] for column in inspect(connection).get_columns("plugin")}
    assert repr(types["credentials"]) == "LONGBLOB()"
    assert str(types["extra"]) == "LONGTEXT"
    assert types["extra"].collation == "ascii_bin"


def test_text_is_compared_byte_by_byte(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO plugin (id, extra) VALUES (1, 'enc:v3:AbC')"))
        found = text("SELECT count(*) FROM plugin WHERE extra LIKE :prefix")
        assert connection.scalar(found, {"prefix": "enc:v3:A%"}) == 1
        assert connection.scalar(found, {"prefix": "enc:v3:a%"}) == 0
