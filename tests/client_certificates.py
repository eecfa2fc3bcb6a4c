"""Certificates that TLS clients show, under an authority made for the occasion."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.certificates import Authority

_DAY = dt.timedelta(days=1)


@dataclass(frozen=True)
class ClientFiles:
    """A certificate and its private key, each in a PEM file."""

    certificate: Path
    key: Path


class ClientAuthority(Authority):
    """An authority that also issues certificates to clients."""

    def issue_client(
        self, name: str, *, expires: dt.datetime | None = None, passphrase: str | None = None
    ) -> ClientFiles:
        """Return the files of a new certificate; those of an earlier one of the same name are replaced.

        :param expires: when it ends; by default in a day.
        :param passphrase: what the private key is encrypted with.
        """
        end = dt.datetime.now(dt.UTC) + _DAY if expires is None else expires
        private = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(end - 2 * _DAY)
            .not_valid_after(end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
            .add_extension(issuer, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        encryption = (
            serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
        )
        files = ClientFiles(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        )
        return files
