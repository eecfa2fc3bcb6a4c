"""What an error gives away to whoever prints, logs or inspects it."""

import traceback
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator


def chained(error: BaseException) -> Iterator[BaseException]:
    """Return an error and everything that it can be followed to."""
    seen: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen[id(found)] = found
            waiting += [found.__cause__, found.__context__]
    yield from seen.values()


def shown_by(error: BaseException) -> str:
    """Return all text of an error: itself, its arguments and attributes, and those of its causes and its traceback."""
    shown = traceback.format_exception(error)
    for found in chained(error):
        shown += [str(found), repr(found), repr(found.args), repr(vars(found))]
        # What is printed is shortened here and there; what is held is not.
        shown += [repr(value) for value in (*found.args, *vars(found).values())]
    return "\n".join(shown)


def spellings(secret: bytes) -> list[str]:
    """Return the ways in which bytes may appear in text. The ends of base64 depend on what follows, so they are cut."""
    encoded = [b64encode(secret).decode().rstrip("="), urlsafe_b64encode(secret).decode().rstrip("=")]
    return [secret.hex(), repr(secret)[2:-1], *(text[:-1] for text in encoded)]


def leaked(error: BaseException, *secrets: bytes | str) -> list[str]:
    """Return which secrets an error shows."""
    shown = shown_by(error)
    wanted = [spelling for one in secrets for spelling in ([one] if isinstance(one, str) else spellings(one))]
    return [spelling for spelling in wanted if spelling and spelling.lower() in shown.lower()]
