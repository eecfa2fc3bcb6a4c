"""What a target of the fuzzer is: a plain function for a parser, what it may raise, and valid inputs to begin with."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from tests.leaks import attributes

from .mutators import Mutator

KEY: Final = bytes(range(32))
MARKER: Final = "S3CR3T-fuzzing-marker"
"""What stands in plaintexts, answers and settings, and must be in no error."""

TOKEN: Final = "t0ken-fuzzing-marker"
"""What is logged in with."""

SECRETS: Final = (KEY, TOKEN.encode(), MARKER.encode())

Run = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One parser.

    :ivar name: what it is called on the command line, and in the names of files.
    :ivar make: prepares it once, and returns the function that takes an input.
    :ivar allowed: what it may raise.
    :ivar seeds: returns valid inputs.
    :ivar mutator: changes inputs by their structure, beside the fuzzer's own mutations.
    :ivar secrets: what must not be in an error.
    :ivar share: its part of all inputs, in relation to the others.
    :ivar max_len: how long an input may be, in bytes.
    """

    name: str
    make: Callable[[], Run]
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    mutator: Mutator | None = None
    secrets: tuple[bytes, ...] = (MARKER.encode(),)
    share: float = 1
    max_len: int = 1024
    spelled: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spelled", tuple(text for secret in self.secrets for text in spellings(secret)))


class FindingError(AssertionError):
    """An input was not handled as it must be."""


TARGETS: Final[dict[str, Target]] = {}


def target(**values: Any) -> Callable[[Callable[[], Run]], Callable[[], Run]]:
    """Make a target of a function that prepares it, under its name."""

    def declare(make: Callable[[], Run]) -> Callable[[], Run]:
        name = make.__name__.replace("_", "-")
        TARGETS[name] = Target(name=name, make=make, **values)
        return make

    return declare


@cache
def prepared(name: str) -> Run:
    return TARGETS[name].make()


def check(one: Target, data: bytes) -> bool:
    """Give an input to a target, and tell whether it was refused.

    :raises FindingError: if something else was raised than may be, or what was raised shows a secret.
    """
    refusal: Exception | None = None
    try:
        prepared(one.name)(data)
    except one.allowed as error:
        refusal = error
    except Exception as error:
        msg = f"{one.name} raises {type(error).__module__}.{type(error).__qualname__}"
        raise FindingError(msg) from error
    if refusal is None:
        return False
    text = shown(refusal)
    if any(spelling in text for spelling in one.spelled):
        msg = f"{one.name} raises a {type(refusal).__qualname__} that shows a secret"
        raise FindingError(msg) from refusal
    if refusal.__cause__ is not None or refusal.__context__ is not None:
        msg = f"{one.name} raises a {type(refusal).__qualname__} that leads to another error"
        raise FindingError(msg) from refusal
    return True


def shown(error: Exception) -> str:
    """Return all that an error shows, in lower case."""
    return " ".join([str(error), *map(repr, (*error.args, *attributes(error)))]).lower()


def spellings(secret: bytes) -> list[str]:
    """Return how a secret may be spelled, in lower case."""
    # The ends of base64 depend on what follows, so they are left out.
    encoded = b64encode(secret).decode().rstrip("=")[:-1]
    return [text.lower() for text in (secret.hex(), repr(secret)[2:-1], encoded)]
