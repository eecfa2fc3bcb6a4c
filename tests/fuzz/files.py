"""Targets: settings, and the file of the bootstrap key."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import mock

from sqlalchemy_kravn_crypto import exceptions as errors

from .target import KEY, MARKER, Run, target


def _settings_seeds() -> list[bytes]:
    vault = f"KMS_PROVIDER=vault\nKMS_VAULT_ADDR=https://vault.test\nKMS_VAULT_KEY=kravn\nKMS_VAULT_TOKEN={MARKER}"
    azure = "KMS_PROVIDER=azure\nKMS_AZURE_VAULT_URL=https://kravn.vault.azure.net\nKMS_AZURE_KEY=kravn"
    pinned = "KMS_PINNED_KEYS=0123456789abcdef, 0123456789abcde0\nKMS_TIMEOUT=5\nLEASE=60\nFENCE=transaction"
    secret = f"SECRET={MARKER * 2}\nSECRET_RETIRED={MARKER}\nDEPLOYMENT_ID=00000000-0000-0000-0000-000000000001"
    return [text.encode() for text in (vault, azure, pinned, secret, "KMS_PROXY=http://proxy.test:3128", "SECRT=1")]


@target(allowed=(errors.ConfigurationError,), seeds=_settings_seeds, share=0.2)
def settings() -> Run:
    from sqlalchemy_kravn_crypto.configuration import provider_of
    from sqlalchemy_kravn_crypto.settings import Settings

    def run(data: bytes) -> object:
        # As the environment is decoded: what is no UTF-8 is in it as lone surrogates.
        lines = data.replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
        pairs = (line.partition("=") for line in lines if "=" in line)
        # A name is shown on purpose; and no file but those of the seeds is to be read.
        environment = {
            f"KRAVN_{name}": value
            for name, _, value in pairs
            if name and MARKER[:4] not in name and not name.upper().endswith("_FILE")
        }
        with mock.patch.dict(os.environ, environment, clear=True):
            return provider_of(Settings.from_environment())

    return run


@target(
    allowed=(errors.SecretFileError,),
    seeds=lambda: [KEY.hex().encode(), KEY.hex().encode() + b"\n", KEY.hex().upper().encode(), MARKER.encode()],
    secrets=(KEY, MARKER.encode()),
    share=0.5,
)
def secret_key() -> Run:
    from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret

    descriptor, name = tempfile.mkstemp()
    os.close(descriptor)
    path = Path(name)

    def run(data: bytes) -> object:
        path.write_bytes(data)
        return BootstrapSecret.from_file(path)

    return run
