"""FastAPI with an asynchronous engine.

pip install 'fastapi[standard]' aiosqlite
KRAVN_SECRET=$(openssl rand -hex 32) fastapi dev examples/with_fastapi.py
curl localhost:8000/plugins/weather --json '{"token": "s3cr3t"}'
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure_async, kms_tables

engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///example.db"))


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"
    name: Mapped[str] = mapped_column(primary_key=True)
    credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


kms_tables(Base.metadata)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:  # or migrations; `kravn-crypto migrate` makes the key tables
        await connection.run_sync(Base.metadata.create_all)
    await configure_async(engine)  # a process that cannot have the keys does not start
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/plugins/{name}", status_code=201)
async def write(name: str, credentials: dict[str, Any]) -> None:
    async with AsyncSession(engine) as session, session.begin():
        session.add(Plugin(name=name, credentials=credentials))


@app.get("/plugins/{name}")
async def read(name: str) -> dict[str, Any]:
    async with AsyncSession(engine) as session:
        plugin = await session.get(Plugin, name)
    if plugin is None:
        raise HTTPException(404)
    # Returning `plugin` would answer with the plaintext. What a client may see is chosen here: the names alone.
    return {"name": name, "credentials": sorted(plugin.credentials)}
