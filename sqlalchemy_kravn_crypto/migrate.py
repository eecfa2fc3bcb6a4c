"""The migrations of our own tables, run through Alembic beside whatever the user's project runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, TextIO

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import ArgumentError

from .exceptions import MALFORMED_URL, ConfigurationError
from .schema import VERSION_TABLE

# In a wheel the migrations are inside of the package; in a checkout they are at its top, beside the package.
_PACKAGE: Final = Path(__file__).parent
_LOCATIONS: Final = (_PACKAGE / "migrations", _PACKAGE.parent / "migrations")


def migrate(engine: Engine, *, revision: str = "head") -> None:
    """Bring our tables to a revision. Safe to run twice, and at the same moment from several machines on PostgreSQL.

    :param revision: the revision to end at; ``head`` is the newest.
    """
    config = _config()
    with engine.connect() as connection:
        config.attributes["connection"] = connection.execution_options(schema_translate_map=None)
        command.upgrade(config, revision)
        connection.commit()


def print_sql(url: str, output: TextIO | None = None) -> None:
    """Print the statements of all migrations instead of running them. Connects to nothing.

    :param url: a database URL; only its kind of database matters.
    :raises ConfigurationError: if it is no database URL.
    """
    config = _config(output or sys.stdout)
    dialect = None
    try:
        dialect = make_url(url).get_backend_name()
    except ArgumentError:
        dialect = None
    if dialect is None:
        raise ConfigurationError(MALFORMED_URL)
    config.attributes["dialect"] = dialect
    command.upgrade(config, "head", sql=True)


def _config(output: TextIO | None = None) -> Config:
    location = next(path for path in _LOCATIONS if (path / "env.py").is_file())
    config = Config(output_buffer=output) if output else Config()
    # A percent sign in a path would begin an interpolation.
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["version_table"] = VERSION_TABLE
    return config
