"""Stands in for the network below the transport of the providers, and gives the answers that are fuzzed."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

from .target import KEY, MARKER, TOKEN, Run

PLAIN: Final = b64encode(KEY).decode()

_STATUSES: Final = (200, 400, 401, 403, 404, 429, 500, 503, 412, 472, 473, 302)
BINDING: Final = b"".join(
    len(part).to_bytes(4, "big") + part
    for part in (b"sqlalchemy-kravn-crypto/wrap/v1", b"default", b"00000000-0000-0000-0000-000000000000", bytes(8))
)


class Wire:
    """What a provider is connected to: takes what is sent, and gives the answer in pieces."""

    def __init__(self, answer: bytes) -> None:
        self._left = memoryview(answer)

    def settimeout(self, _seconds: float) -> None:
        pass

    def sendall(self, _data: bytes) -> None:
        pass

    def recv_into(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def recv(self, size: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.recv_into(buffer)])


def http(data: bytes) -> bytes:
    """Return the bytes of an answer: all of them, or the body behind headers that are right."""
    mode, content = data[0] if data else 0, data[1:]
    if mode < len(_STATUSES):
        length = f"Content-Length: {len(content)}\r\nContent-Type: application/json\r\nMetadata-Flavor: Google\r\n\r\n"
        return f"HTTP/1.1 {_STATUSES[mode]} Status\r\n{length}".encode() + content
    return content


@contextmanager
def answered(answers: Callable[[Any], bytes]) -> Iterator[None]:
    """Have every connection be one that gives an answer; everything above the socket is the real thing."""
    from sqlalchemy_kravn_crypto.providers import transport

    @contextmanager
    def connected(_self: Any, url: Any) -> Iterator[Any]:
        yield Wire(answers(url))

    with mock.patch.object(transport._BoundedAdapter, "connected", connected):
        yield


Steps = Sequence[tuple[str, bytes]]
"""What is in a URL, and the body of the answer that is right there."""


def one_of(steps: Steps, fuzzed: int, answer: bytes) -> Callable[[Any], bytes]:
    """Return answers of which all are right but one, or the last where there are not so many."""

    def answer_to(url: Any) -> bytes:
        for number, (part, body) in enumerate(steps):
            if part in url.geturl():
                return http(answer if number == fuzzed % len(steps) else b"\x00" + body)
        raise AssertionError(url.geturl())

    return answer_to


def answer_seeds(*bodies: Any) -> list[bytes]:
    texts = [json.dumps(body).encode() for body in (*bodies, {"errors": [MARKER, TOKEN]}, [1], None)]
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: 1\r\nDate: Wed, 01 Jan 2025 00:00:00 GMT\r\n\r\n{}"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    by_status = [bytes([mode]) + texts[-3] for mode in range(len(_STATUSES))]
    return [*(b"\x00" + text for text in texts), *by_status, b"\xff" + raw, b"\xff" + chunked]


def behind(firsts: Sequence[int], seeds: Sequence[bytes]) -> list[bytes]:
    """Return each seed behind each of some bytes."""
    return [bytes([first]) + seed for seed in seeds for first in firsts]


def both_ways(provider: Any, blob: bytes, master_key: str) -> Run:
    """Return what wraps and unwraps with one answer for both; an operation that the KMS refuses is one that ends."""
    from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey

    wrapped = WrappedKey(master_key, blob)

    def run(data: bytes) -> object:
        with answered(lambda _url: http(data[1:])):
            if data[:1] and data[0] % 2:
                return provider.wrap(KEY, BINDING, Deadline(30))
            return provider.unwrap(wrapped, BINDING, Deadline(30))

    return run


def no_sleep(_seconds: float) -> None:
    pass
