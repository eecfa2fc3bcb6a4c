"""The process's watch on the key store, and what of it is installed on engines."""

from __future__ import annotations

import atexit
import logging
import os
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event

from .watch import Watch

logger = logging.getLogger(__name__)


class _Process:
    """The watch of this process, and the engine of the database that holds the key store."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self.engine: Engine | None = None


_process: Final = _Process()

# Of each engine that is followed, the one of the key store where that is another.
_followed: Final[WeakKeyDictionary[Engine, Engine | None]] = WeakKeyDictionary()


def start(watch: Watch, engine: Engine) -> None:
    """Make a watch the one of this process."""
    _process.watch, _process.engine = watch, engine


def current() -> tuple[Watch | None, Engine | None]:
    """Return the watch of this process and the engine of its key store."""
    return _process.watch, _process.engine


def stop() -> None:
    """Follow the key store no more, and take the heartbeat away."""
    watch, engine = current()
    _process.watch = _process.engine = None
    if watch is not None and engine is not None and watch.has_beaten:
        _leave(watch, engine)


def resume(watch: Watch | None, engine: Engine | None) -> None:
    """Have the watch again that :func:`current` returned."""
    _process.watch, _process.engine = watch, engine


def follow(engine: Engine, key_store: Engine | None = None) -> None:
    """Look at the key store whenever a transaction of an engine begins and a look is due.

    :param key_store: the engine of the database that holds the key store, where it is not this one.
    """
    engine = _itself(engine)
    is_new = engine not in _followed
    _followed[engine] = key_store
    if not is_new:
        return

    dispatch: Any = engine.dispatch
    for name in ("begin", "begin_twophase"):
        event.listen(engine, name, _begun)
        # Before the listeners of others, who may begin a transaction that our commit would end. For the events of
        # engines, SQLAlchemy ignores insert=True.
        getattr(dispatch, name).listeners.rotate()
    event.listen(engine, "before_execute", _executing)
    event.listen(engine, "before_cursor_execute", _sending)
    event.listen(engine, "after_cursor_execute", _executed)
    event.listen(engine, "rollback_savepoint", _rolled_back_to_savepoint)


def _begun(connection: Connection, *_: Any) -> None:
    watch, elsewhere = _process.watch, _elsewhere(connection)
    if watch is None:
        return
    if elsewhere is None:
        watch.begun(connection)
    elif watch.is_due:
        with elsewhere.connect() as other, other.begin():
            pass  # where that begins, it is looked


def _executing(connection: Connection, statement: Any, *_: Any) -> None:
    if _process.watch is not None and _elsewhere(connection) is None:
        _process.watch.executing(connection, statement)


def _sending(connection: Connection, _cursor: Any, _sql: str, _parameters: Any, context: Any, _many: Any) -> None:
    if _process.watch is not None and context is not None:
        _process.watch.sending(connection, context.compiled)


def _executed(connection: Connection, _cursor: Any, _sql: str, _parameters: Any, context: Any, _many: Any) -> None:
    if _process.watch is not None and _elsewhere(connection) is None:
        _process.watch.executed(connection, context)


def _rolled_back_to_savepoint(connection: Connection, *_: Any) -> None:
    if _process.watch is not None:
        _process.watch.rolled_back_to_savepoint(connection)


def _elsewhere(connection: Connection) -> Engine | None:
    """Return the engine of the key store where it is not the connection's own."""
    return _followed.get(_itself(connection.engine))


def _itself(engine: Any) -> Engine:
    """Return the engine behind one that Engine.execution_options() returned."""
    while hasattr(engine, "_proxied"):
        engine = engine._proxied  # noqa: SLF001 - there is no public name
    found: Engine = engine
    return found


def _leave(watch: Watch, engine: Engine) -> None:
    """Take the heartbeat away, on a connection of its own: the pool may be waiting for ones that never come back."""
    apart = Engine(engine.pool.recreate(), engine.dialect, engine.url)

    def leave() -> None:
        with apart.begin() as connection:
            watch.leave(connection)

    try:
        if engine.dialect.is_async:
            _run_async(apart, leave)
        else:
            try:
                leave()
            finally:
                apart.dispose()
    except Exception as error:  # noqa: BLE001 - the process ends, and the row does no harm once its lease is over
        logger.debug("the heartbeat stays until its lease is over: %s", type(error).__name__)


def _run_async(apart: Engine, leave: Any) -> None:
    import asyncio  # noqa: PLC0415 - synchronous programs do without
    from concurrent.futures import Future, ThreadPoolExecutor  # noqa: PLC0415 - as above

    from sqlalchemy.util import greenlet_spawn  # noqa: PLC0415 - as above

    class AtOnce(ThreadPoolExecutor):
        """Looks up a host name here: when the interpreter ends, no other thread takes it on any more."""

        def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
            done: Future[Any] = Future()
            try:
                done.set_result(function(*arguments, **named))
            except Exception as error:  # noqa: BLE001 - whoever waits for the result is told
                done.set_exception(error)
            return done

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(AtOnce())
        try:
            await greenlet_spawn(leave)
        finally:
            await greenlet_spawn(apart.dispose)

    def run_apart() -> None:
        asyncio.run(run())

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run_apart()
    else:  # within a loop there can be no other, but in a thread of its own
        with ThreadPoolExecutor(1) as executor:
            executor.submit(run_apart).result()


def _after_fork() -> None:
    if _process.watch is not None:
        _process.watch.after_fork()


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
