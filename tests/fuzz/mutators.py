"""Changes of inputs by their structure: those that a mutation of bytes would hardly ever make.

A mutator is made of the seeds of a target, whose words it uses. It returns ``None`` for an input that has not the
structure; the fuzzer's own mutation is then used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any, Final

Mutate = Callable[[bytes, Random], bytes | None]
Mutator = Callable[[Sequence[bytes]], Mutate]

_TEXTS: Final = (
    "",
    " ",
    "A",
    "AAAA",
    "0",
    "-1",
    "1e999",
    "null",
    "\0",
    "\n",
    "\ud800",
    "é",
    "\u0661",
    "2099-01-01T00:00:00Z",
    "2000-01-01 00:00:00",
    "9999-12-31T23:59:59-14:00",
    "0001-01-01T00:00:00+14:00",
    "A" * 300,
)
_NUMBERS: Final = (0, 1, -1, 3, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, 1e-320)
_SPECIAL: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    {},
    [[]],
    [None],
    {"a": 1},
)
_VALUES: Final = (*_TEXTS, *_NUMBERS, *_SPECIAL)


# --- JSON ------------------------------------------------------------------------------------------------------------


def json_behind(size: int) -> Mutator:
    """Change JSON behind so many bytes, and now and then one of those."""

    def make(seeds: Sequence[bytes]) -> Mutate:
        words = sorted({word for seed in seeds for word in _json_words(_parsed(seed[size:]))})

        def mutate(data: bytes, random: Random) -> bytes | None:
            value = _parsed(data[size:])
            if value is None:
                return None
            whole = [value]
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                _change_json(whole, words, random)
            try:
                text = json.dumps(whole[0], ensure_ascii=random.random() < 0.9)
            except RecursionError:
                return None
            return _head(data[:size], random) + text.encode("utf-8", "surrogatepass")

        return mutate

    return make


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _head(head: bytes, random: Random) -> bytes:
    changed = bytearray(head)
    if changed and random.random() < 0.2:
        changed[random.randrange(len(changed))] = random.choice((random.randrange(16), random.randrange(256)))
    return bytes(changed)


Place = tuple[Any, Any]
"""A list and an index, or a dict and a name."""


def _places(whole: list[Any]) -> list[Place]:
    found: list[Place] = [(whole, 0)]
    for container, key in found:  # it grows meanwhile
        value = container[key]
        if isinstance(value, dict):
            found += [(value, name) for name in value]
        elif isinstance(value, list):
            found += [(value, at) for at in range(len(value))]
    return found


def _json_words(value: Any) -> Iterator[str]:
    for container, key in _places([value]):
        if isinstance(key, str):
            yield key
        if isinstance(container[key], str):
            yield container[key]


def _change_json(whole: list[Any], words: Sequence[str], random: Random) -> None:
    places = _places(whole)
    container, key = random.choice(places)
    value = container[key]
    match random.randrange(8):
        case 0:
            container[key] = deepcopy(random.choice(_VALUES))
        case 1 if container is not whole:
            del container[key]
        case 2:
            other, name = random.choice(places)
            container[key] = deepcopy(other[name])
        case 3:
            container[key] = random.choice(([value], {"a": value}, [value, value]))
        case 4 if isinstance(container, dict):
            container[random.choice(words)] = container.pop(key)
        case 5 if isinstance(value, dict):
            value[random.choice(words)] = deepcopy(random.choice((*_VALUES, *words)))
        case 6 if words:
            container[key] = random.choice(words)
        case _:
            container[key] = _near(value, random)


def _near(value: Any, random: Random) -> Any:
    """Return a value of the same type that is a little different."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return random.choice((value + 1, value - 1, -value, value * 2, value / 3, str(value)))
    if isinstance(value, list):
        return random.choice((value[1:], value[:-1], value * 2, value[::-1], value[:1] * 100))
    if isinstance(value, dict):
        return random.choice(({}, list(value), list(value.values()), dict(islice(value.items(), 1))))
    at = random.randrange(len(value) + 1)
    return random.choice(
        (value[:at], value[at:], value[:at] + random.choice(_TEXTS) + value[at:], value * 2, value.swapcase())
    )


# --- Rows ------------------------------------------------------------------------------------------------------------

DELETE: Final = 250
"""In the place of a column: the row is deleted."""

KINDS: Final = 8
"""How many kinds of edits there are: five types that SQLite knows, and these."""

COPY: Final = 5
"""The kind of an edit whose value is where to copy from."""

LONG: Final = 6
"""The kind of an edit whose value is text, behind how often it is doubled."""

NOT_UTF8: Final = 7
"""The kind of an edit whose value is text that is none."""


@dataclass(frozen=True)
class Edit:
    """One change of a row, as it is written in an input: row, column, type, length, and the value."""

    row: int
    column: int
    kind: int
    value: bytes

    def written(self) -> bytes:
        return bytes([self.row, self.column, self.kind, len(self.value)]) + self.value


def edits(data: bytes) -> Iterator[Edit]:
    while len(data) >= 4:
        row, column, kind, length = data[:4]
        yield Edit(row, column, kind, data[4 : 4 + length])
        data = data[4 + length :]


def edits_behind(size: int, columns: int, words: Sequence[bytes] = ()) -> Mutator:
    """Change the edits of rows behind so many bytes."""

    def make(seeds: Sequence[bytes]) -> Mutate:
        of_seeds = {edit.value for seed in seeds for edit in edits(seed[size:])}
        texts = {text.encode("utf-8", "surrogatepass") for text in _TEXTS if len(text) < 256}
        small = (number for number in _NUMBERS if isinstance(number, int) and -(2**63) <= number < 2**63)
        whole = {number.to_bytes(8, "big", signed=True) for number in small}
        values = sorted({*of_seeds, *words, *texts, *whole})

        def mutate(data: bytes, random: Random) -> bytes | None:
            found = list(edits(data[size:]))
            at = random.randrange(len(found) + 1)
            if at < len(found) and random.random() < 0.6:
                found[at : at + 1] = _changed_edit(found[at], columns, random)
            else:
                found[at : at + random.randrange(2)] = [_new_edit(values, columns, random)]
            return _head(data[:size].ljust(size, b"\0"), random) + b"".join(edit.written() for edit in found)

        return mutate

    return make


def _changed_edit(edit: Edit, columns: int, random: Random) -> list[Edit]:
    """Return an edit with one thing changed, or none in its place."""
    match random.randrange(4):
        case 0:
            return []
        case 1:
            return [replace(edit, column=random.randrange(columns))]
        case 2:
            return [replace(edit, kind=random.randrange(KINDS))]
        case _:
            return [replace(edit, row=random.randrange(8))]


def _new_edit(values: Sequence[bytes], columns: int, random: Random) -> Edit:
    row, kind, value = random.randrange(8), random.choice((0, 0, 0, *range(KINDS))), random.choice(values)
    if random.random() < 0.1:
        return Edit(row, DELETE, 0, b"")
    if kind == COPY:
        value = random.randbytes(2)
    elif kind == LONG:
        value = bytes([random.randrange(13)]) + (value[:16] or b"[")
    return Edit(row, random.randrange(columns), kind, value)
