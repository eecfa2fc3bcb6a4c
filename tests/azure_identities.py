"""What Microsoft Entra ID knows of applications and machines: secrets, certificates, issuers, managed identities."""

from __future__ import annotations

import base64
import datetime as dt
import json
import time
import uuid
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

FEDERATED_AUDIENCE = "api://AzureADTokenExchange"

_DAY = dt.timedelta(days=1)
_PADDINGS: dict[str, padding.AsymmetricPadding] = {
    "RS256": padding.PKCS1v15(),
    "PS256": padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH),
}


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """Return the private key of somebody; to make one takes long."""
    return rsa.generate_private_key(65537, 2048)


def padless(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@dataclass
class Token:
    """A JSON web token, taken apart."""

    header: dict[str, Any]
    claims: dict[str, Any]
    signed: bytes
    signature: bytes

    @classmethod
    def parsed(cls, text: str) -> Token:
        header, claims, signature = text.split(".")
        signed = f"{header}.{claims}".encode()
        return cls(json.loads(unpadded(header)), json.loads(unpadded(claims)), signed, unpadded(signature))

    def is_signed_with(self, key: rsa.RSAPublicKey) -> bool:
        try:
            key.verify(self.signature, self.signed, _PADDINGS[self.header["alg"]], hashes.SHA256())
        except InvalidSignature:
            return False
        return True

    def is_in_time(self) -> bool:
        return bool(self.claims.get("nbf", 0) <= time.time() + 300 and time.time() < self.claims.get("exp", 0))


class ClientCertificate:
    """A certificate that an application logs in with, and its private key, in one PEM file.

    :param path: the file.
    :param name: whose key it is.
    :param expires: how long from now, or before now.
    :param password: what the private key is encrypted with.
    :param elliptic: whether it is of a kind that Azure does not take.
    """

    def __init__(
        self,
        path: Path,
        name: str = "application",
        *,
        expires: dt.timedelta = _DAY,
        password: str | None = None,
        elliptic: bool = False,
    ) -> None:
        self.path = path
        key = ec.generate_private_key(ec.SECP256R1()) if elliptic else rsa_key(name)
        end = dt.datetime.now(dt.UTC) + expires
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(end - 2 * _DAY)
            .not_valid_after(end)
            .sign(key, hashes.SHA256())
        )
        encryption = (
            serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        )
        self.key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        self.certificate_pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        path.write_bytes(self.certificate_pem + self.key_pem)


class Issuer:
    """An issuer of tokens for workloads, such as that of a Kubernetes cluster."""

    url = "https://oidc.example/cluster"
    subject = "system:serviceaccount:default:kravn"

    def token(self, *, lifetime: float = 3600, signer: str = "issuer", **claims: Any) -> str:
        """Return a token; a claim that is given as ``None`` is left out."""
        now = int(time.time())
        usual = {"iss": self.url, "sub": self.subject, "aud": [FEDERATED_AUDIENCE], "iat": now, "exp": now + lifetime}
        kept = {name: value for name, value in {**usual, **claims}.items() if value is not None}
        parts = [{"alg": "RS256", "kid": "1", "typ": "JWT"}, {"jti": uuid.uuid4().hex, **kept}]
        signed = ".".join(padless(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{padless(rsa_key(signer).sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


@dataclass
class Application:
    """An app registration, and what it may log in with."""

    client_id: str
    secret: str
    expired_secret: str = ""
    certificates: list[x509.Certificate] = field(default_factory=list)
    issuer: Issuer | None = None
    assertions: list[Token] = field(default_factory=list)
    """Those that were sent, whether or not they were good."""

    def refusal(self, form: dict[str, str], token_endpoint: str) -> int:
        """Return the number of the error (``AADSTS...``) that a request for a token meets, or 0."""
        if form.get("client_id") != self.client_id:
            return 700016
        if "client_assertion" not in form:
            secret = form.get("client_secret")
            return {self.secret: 0, self.expired_secret: 7000222}.get(secret or "?", 7000215)
        if form.get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer":
            return 900144
        token = Token.parsed(form["client_assertion"])
        self.assertions.append(token)
        if "x5t" in token.header or "x5t#S256" in token.header:
            return self._certificate_refusal(token, token_endpoint)
        return self._federated_refusal(token)

    def _certificate_refusal(self, token: Token, token_endpoint: str) -> int:
        for certificate in self.certificates:
            key = certificate.public_key()
            assert isinstance(key, rsa.RSAPublicKey)
            if _names(token.header, certificate) and token.is_signed_with(key):
                break
        else:
            return 700027
        if token.claims["aud"] != token_endpoint:
            return 700023
        if not token.claims["iss"] == token.claims["sub"] == self.client_id:
            return 700021
        return 0 if token.is_in_time() else 700024

    def _federated_refusal(self, token: Token) -> int:
        if self.issuer is None or token.claims["iss"] != self.issuer.url:
            return 700211
        if not token.is_signed_with(rsa_key("issuer").public_key()):
            return 5000221
        if FEDERATED_AUDIENCE not in token.claims["aud"]:
            return 700212
        if token.claims["sub"] != self.issuer.subject:
            return 700213
        return 0 if token.is_in_time() else 700024


def _names(header: dict[str, Any], certificate: x509.Certificate) -> bool:
    """Tell whether the header of an assertion names a certificate by its thumbprint."""
    if "x5t#S256" in header:
        return header["alg"] == "PS256" and unpadded(header["x5t#S256"]) == certificate.fingerprint(hashes.SHA256())
    sha1 = certificate.fingerprint(hashes.SHA1())  # noqa: S303 - the header is defined so, and signs nothing
    return header["alg"] == "RS256" and unpadded(header["x5t"].rstrip("=")) == sha1
