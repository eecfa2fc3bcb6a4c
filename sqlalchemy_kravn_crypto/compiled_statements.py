"""What a compiled statement says of the one that it was compiled from."""

from __future__ import annotations

from typing import Any

from sqlalchemy.sql.compiler import SQLCompiler


def statement_of(compiled: SQLCompiler) -> Any:
    """Return the statement of Core; where one of the ORM was written, what the ORM made of it."""
    made = getattr(compiled.compile_state, "statement", None)
    return compiled.statement if made is None else made
