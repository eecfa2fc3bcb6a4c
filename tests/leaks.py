"""What an error, an object or a log gives away to whoever prints, pickles or inspects it."""

import pickle
import traceback
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from typing import Any


def chained(error: BaseException) -> Iterator[BaseException]:
    """Return an error and every other that it leads to: its causes, and those among its arguments and attributes."""
    seen: dict[int, BaseException] = {}
    waiting: list[Any] = [error]
    while waiting:
        found = waiting.pop()
        if isinstance(found, (list, tuple)):
            waiting += found
        elif isinstance(found, BaseException) and id(found) not in seen:
            seen[id(found)] = found
            # An error may be its own cause: SQLAlchemy raises what it does not wrap from itself.
            waiting += [found.__cause__, found.__context__, found.args, *attributes(found)]
    yield from seen.values()


def attributes(error: BaseException) -> list[Any]:
    """Return what is in the attributes of an error, those without a place in its ``__dict__`` included."""
    names = [name for name in dir(error) if not name.startswith("__")]
    values = [getattr(error, name, None) for name in {*names, *vars(error)}]
    return [value for value in values if not callable(value)]


def shown_by(error: BaseException) -> str:
    """Return all text of an error: itself, its arguments and attributes, its causes, its traceback and its pickle."""
    shown = traceback.format_exception(error)
    for found in chained(error):
        # What is printed is shortened here and there; what is held is not.
        shown += [str(found), repr(found), *map(repr, (*found.args, *attributes(found)))]
        shown.append(pickled(found))
    return "\n".join(shown)


def pickled(value: Any) -> str:
    """Return what the pickle of an object holds, as text; nothing if it has none."""
    try:
        return pickle.dumps(value).decode("latin-1")
    except Exception:  # noqa: BLE001 - whatever it is, it does not pickle
        return ""


def spellings(secret: bytes) -> list[str]:
    """Return the ways in which bytes may appear in text. The ends of base64 depend on what follows, so they are cut."""
    encoded = [b64encode(secret).decode().rstrip("="), urlsafe_b64encode(secret).decode().rstrip("=")]
    return [secret.hex(), secret.decode("latin-1"), repr(secret)[2:-1], *(text[:-1] for text in encoded)]


def found_in(shown: str, *secrets: bytes | str) -> list[str]:
    """Return which secrets are in a text, in any spelling."""
    wanted: list[str] = []
    for secret in secrets:
        wanted += (
            [secret, *spellings(secret.encode(errors="surrogatepass"))]
            if isinstance(secret, str)
            else spellings(secret)
        )
    return [spelling for spelling in wanted if spelling and spelling.lower() in shown.lower()]


def leaked(error: BaseException, *secrets: bytes | str) -> list[str]:
    """Return which secrets an error shows."""
    return found_in(shown_by(error), *secrets)
