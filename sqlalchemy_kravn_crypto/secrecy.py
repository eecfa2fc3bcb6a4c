"""What every object that holds a key, a secret or a token has in common: it stays in this process."""

from __future__ import annotations

from typing import NoReturn


class KeepsSecret:
    """Base of objects that refuse to be pickled, and with it to be copied or sent to another process."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        msg = f"{type(self).__name__} holds a secret and cannot be pickled or copied"
        raise TypeError(msg)
