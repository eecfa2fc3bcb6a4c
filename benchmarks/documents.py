"""JSON documents such as programs keep in an encrypted column: nested, of mixed types, with text that is not ASCII."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, Final

Document = dict[str, Any]

_SEED: Final = 20_240_229
_CITIES: Final = ("Zürich", "Kraków", "São Paulo", "Łódź", "東京", "Reykjavík", "Orléans", "Århus", "Boston", "Lima")
_SCOPES: Final = ("read", "write", "export", "admin", "audit")
_WORDS: Final = (
    "the", "nightly", "export", "waits", "for", "für", "invoices", "of", "all", "branches", "and", "retries",
    "naïve", "ledger", "until", "acknowledged", "by", "Señor", "Łukasz", "queue", "schema", "«final»", "später",
)  # fmt: skip


def credentials(random: Random) -> Document:
    """Return what a plugin needs to log in somewhere: about 190 bytes."""
    return {
        "user": f"svc-{random.randrange(16**3):03x}",
        "token": f"{random.getrandbits(160):040x}",
        "scopes": random.sample(_SCOPES, 2),
        "city": random.choice(_CITIES),
        "active": random.random() < 0.8,
        "expires": None,
        "limits": {"rows": random.randrange(10_000), "ratio": round(random.random(), 4), "burst": None},
    }


def connector(random: Random) -> Document:
    """Return the configuration of an integration with its endpoints: about 4 kB."""
    return {
        "id": f"{random.getrandbits(128):032x}",
        "name": f"Anbindung {random.choice(_CITIES)}",
        "version": random.randrange(1, 40),
        "owner": {"name": "Zoë Nuñez", "mail": f"zoe.{random.randrange(10**6)}@example.org", "phone": None},
        "login": credentials(random),
        "notes": " ".join(random.choices(_WORDS, k=40)),
        "endpoints": [_endpoint(random, number) for number in range(10)],
        "history": [[random.randrange(1_700_000_000, 1_800_000_000), random.random() * 100] for _ in range(12)],
    }


def _endpoint(random: Random, number: int) -> Document:
    return {
        "url": f"https://api-{random.randrange(1000)}.example.org/v2/{random.choice(_SCOPES)}/{number}",
        "method": random.choice(("GET", "POST")),
        "timeout": round(random.uniform(0.5, 30), 3),
        "retries": random.randrange(5),
        "verify": random.random() < 0.9,
        "proxy": None,
        "headers": {
            "authorization": f"Bearer {random.getrandbits(160):040x}",
            "accept-language": "de-CH, pt-BR;q=0.8",
            "x-request-class": random.choice(("bulk", "interactive")),
        },
        "tags": random.sample(_WORDS, 3),
    }


class Documents:
    """So many documents of one kind, the same ones in every round.

    They are parsed anew for every use, since an object that was processed before has its hashes and its UTF-8 at hand.
    """

    def __init__(self, make: Callable[[Random], Document], count: int) -> None:
        random = Random(_SEED)
        self._texts = [json.dumps(make(random), ensure_ascii=False, separators=(",", ":")) for _ in range(count)]
        self.size = sum(len(text.encode()) for text in self._texts) // count

    def __len__(self) -> int:
        return len(self._texts)

    def fresh(self) -> list[Document]:
        """Return the documents as objects that nobody has used."""
        return [json.loads(text) for text in self._texts]


KINDS: Final[dict[str, Callable[[Random], Document]]] = {"190 B": credentials, "4 kB": connector}
