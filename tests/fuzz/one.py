"""The process of one target: ``python -m tests.fuzz.one NAME``, with the options of libFuzzer and the corpus behind."""

from __future__ import annotations

import os
import sys
from random import Random

import atheris

# What is imported elsewhere is not instrumented, and without that there is no coverage to be guided by. Some of it is
# imported by the first input only.
with atheris.instrument_imports(include=["sqlalchemy_kravn_crypto"], enable_loader_override=False):
    from .targets import TARGETS, check

    for _seed in TARGETS[sys.argv[1]].seeds():
        check(TARGETS[sys.argv[1]], _seed)

WITHOUT_MUTATOR = "FUZZ_WITHOUT_MUTATOR"
"""Set to anything, it leaves the fuzzer to its own mutations, to see what the others are worth."""


def main() -> None:
    target = TARGETS[sys.argv[1]]
    mutate = None if target.mutator is None or WITHOUT_MUTATOR in os.environ else target.mutator(target.seeds())

    def run(data: bytes) -> None:
        check(target, data)

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        changed = mutate(data, random) if mutate is not None and random.random() < 0.5 else None
        if changed is None or len(changed) > max_size:
            return bytes(atheris.Mutate(data, max(max_size, len(data))))
        return changed

    atheris.Setup(sys.argv[1:], run, **({} if mutate is None else {"custom_mutator": mutated}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
