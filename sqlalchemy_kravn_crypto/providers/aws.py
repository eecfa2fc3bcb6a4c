"""Data keys wrapped by a symmetric key of AWS KMS.

The rights it needs are ``kms:Encrypt`` and ``kms:Decrypt`` on the key; a boot needs the second only.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ..base64_text import from_base64, to_base64
from ..derivation import KEY_ID_SIZE, KEY_SIZE, split_length_prefixed
from ..exceptions import (
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    SettingsError,
    UnwrapRefusedError,
)
from .aws_examination import ExaminedAws, examine_aws
from .aws_login import NAME, PARTITIONS, AwsLogin, refusal
from .base import Deadline, Finding, KeyProvider, WrappedKey
from .inspection import Server
from .proxy import Proxy
from .transport import Resolve, Route, as_given, json_object, tls_context

_CA_BUNDLE: Final = "KRAVN_KMS_AWS_CA_BUNDLE"
_ALGORITHM: Final = "SYMMETRIC_DEFAULT"

_UUID: Final = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_KEY: Final = re.compile(
    rf"arn:(?P<partition>{'|'.join(PARTITIONS)}):kms:(?P<region>[a-z]{{2,5}}(?:-[a-z]{{2,10}}){{1,3}}-[0-9]{{1,2}})"
    rf":(?P<account>[0-9]{{12}}):key/(?P<id>{_UUID}|mrk-[0-9a-f]{{32}})"
)
_ENDPOINT: Final = re.compile(
    r"https://(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(?::(?P<port>[0-9]{1,5}))?/?"
)

_HEADERS: Final = {"Content-Type": "application/x-amz-json-1.1", "User-Agent": "sqlalchemy-kravn-crypto"}

_NOT_FOUND: Final = frozenset({"InvalidArnException", "NotFoundException"})
_UNUSABLE: Final = frozenset({"DisabledException", "InvalidKeyUsageException", "KMSInvalidStateException"})
_REFUSED: Final = frozenset({"IncorrectKeyException", "InvalidCiphertextException"})
_DENIED: Final = frozenset({"AccessDeniedException", "InvalidGrantTokenException"})


class AwsProvider(KeyProvider):
    """Wraps data keys under a symmetric encryption key, bound by its encryption context.

    KMS takes a map of strings where others take bytes, shows it in CloudTrail, and lets policies test it. So the
    binding is taken apart into ``application``, ``keyring``, ``deployment`` and ``key-id``.

    :param key: the ARN of the key; an alias could be pointed at another one.
    :param endpoint: ``https://host[:port]`` in place of the region's own, for a VPC or FIPS endpoint.
    :param ca_bundle: a PEM file with the CA certificates to trust instead of the public ones.
    :param profile: the profile of the shared configuration whose credentials to use.
    :param role: the ARN of a role to assume.
    :param external_id: what the role's trust policy asks for, if it does.
    :param proxy: what all requests go through, if anything.
    :param resolve: maps the host and port of a URL to those that are connected to.
    :param sleep: waits a number of seconds between two attempts.
    :raises SettingsError: if one of them is not what it must be.
    """

    name = NAME
    authenticates = True
    binds = True

    def __init__(  # noqa: PLR0913 - one for each setting
        self,
        *,
        key: str,
        endpoint: str | None = None,
        ca_bundle: Path | str | None = None,
        profile: str | None = None,
        role: str | None = None,
        external_id: str | None = None,
        proxy: Proxy | None = None,
        resolve: Resolve = as_given,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        found = _KEY.fullmatch(key)
        if found is None:
            raise SettingsError(
                "KRAVN_KMS_AWS_KEY must be the ARN of a key, not of an alias, such as "
                "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab."
            )
        self._key = key
        self._in_any_region = _in_any_region(found)
        self._endpoint = _checked_endpoint(endpoint) if endpoint else _own_endpoint(found)
        self._ca_bundle = ca_bundle
        self._route = Route(tls_context(ca_bundle, _CA_BUNDLE), resolve, sleep, proxy)
        self._role = role
        self._login = AwsLogin(found["region"], self._route, profile=profile, role=role, external_id=external_id)

    def __repr__(self) -> str:
        return f"<AwsProvider {self._key}>"

    @property
    def master_key(self) -> str:
        """The ARN of the key."""
        return self._key

    def recognises(self, master_key: str) -> bool:
        """Tell whether ``master_key`` is the configured ARN, or that of its replica in another region.

        A multi-Region key, one whose id begins with ``mrk-``, is the same key in all its regions.
        """
        found = _KEY.fullmatch(master_key)
        return found is not None and _in_any_region(found) == self._in_any_region

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        """Wrap a data key under the current material of the master key."""
        return WrappedKey(self._key, self._call("Encrypt", "Plaintext", data_key, "CiphertextBlob", binding, deadline))

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        """Unwrap a data key under that material of the master key that wrapped it, which KMS keeps."""
        if not self.recognises(wrapped.master_key):
            raise UnwrapRefusedError(
                f"The data key is recorded as wrapped under the master key {wrapped.master_key}, which is not "
                f"{self._key}. Check KRAVN_KMS_AWS_KEY.",
                provider=self.name,
            )
        data_key = self._call("Decrypt", "CiphertextBlob", wrapped.blob, "Plaintext", binding, deadline)
        if len(data_key) != KEY_SIZE:
            raise self._malformed()
        return data_key

    def examine(self, deadline: Deadline) -> Iterator[Finding]:
        """Find out of what sort the credentials are; of their other rights, AWS tells nobody without rights in IAM."""
        server = Server("AWS", f"{self._endpoint}/", "KRAVN_KMS_AWS_ENDPOINT", _CA_BUNDLE, self._ca_bundle)
        return examine_aws(ExaminedAws(server, self._route, self._login, self._role), deadline)

    def _call(  # noqa: PLR0913, PLR0917 - the names of an operation and its two fields
        self, operation: str, field: str, value: bytes, result: str, binding: bytes, deadline: Deadline
    ) -> bytes:
        """Have KMS do one operation under the one key, and return the field of the answer that matters."""
        sent = {
            "KeyId": self._key,
            "EncryptionAlgorithm": _ALGORITHM,
            "EncryptionContext": encryption_context(binding),
            field: to_base64(value),
        }
        headers = {**_HEADERS, "X-Amz-Target": f"TrentService.{operation}"}
        response = self._login.post("kms", self._endpoint + "/", headers, json.dumps(sent).encode(), deadline)
        answer = json_object(response.content)
        if response.status_code != 200:
            raise self._refusal(response.status_code, _code(answer), operation)
        # Also for a multi-Region key: KMS names the replica that it was asked for.
        if (answer.get("KeyId"), answer.get("EncryptionAlgorithm")) != (self._key, _ALGORITHM):
            raise self._malformed()
        decoded = from_base64(answer.get(result))
        if not decoded:
            raise self._malformed()
        return decoded

    def _refusal(self, status: int, code: str, operation: str) -> ProviderError:
        if code in _NOT_FOUND:
            return MasterKeyNotFoundError(
                f"AWS KMS has no key {self._key} in the region that was asked. Check KRAVN_KMS_AWS_KEY, and "
                "KRAVN_KMS_AWS_ENDPOINT if it is set. A key whose deletion has been carried out cannot be restored.",
                provider=self.name,
            )
        if code in _UNUSABLE:
            return MasterKeyUnusableError(
                f"AWS KMS does not allow {operation} with the key {self._key} as it is. It must be a symmetric "
                "encryption key that is enabled: aws kms enable-key; if it is pending deletion, first aws kms "
                "cancel-key-deletion; if its material is imported or in a key store of yours, it must be there.",
                provider=self.name,
            )
        if code in _DENIED:
            return ProviderDeniedError(
                f"AWS refused kms:{operation} with the key {self._key}. The key policy, or an IAM policy that it "
                "admits, must allow it to this identity for this encryption context; a VPC endpoint policy and the "
                "organisation must not deny it. A key of another account that does not exist is refused, too.",
                provider=self.name,
            )
        if code in _REFUSED:
            return UnwrapRefusedError(
                f"AWS KMS refused to unwrap a data key under the key {self._key}: the wrapped key was altered, is "
                "under another key, or belongs to another deployment. Check that the database and KRAVN_KMS_AWS_KEY "
                "belong together.",
                provider=self.name,
            )
        return refusal(code, status, "KMS") or self._malformed()

    def _malformed(self) -> ProviderResponseError:
        return ProviderResponseError(
            f"What answered at {self._endpoint} did not answer as AWS KMS does. Check KRAVN_KMS_AWS_ENDPOINT if it is "
            "set, and that no proxy is in between.",
            provider=self.name,
        )


def encryption_context(binding: bytes) -> dict[str, str]:
    """Take a binding apart into what KMS takes in its place. Each part gives one text, so no two give the same.

    :raises ProviderError: if it is no binding that this library makes.
    """
    try:
        application, keyring, deployment, key_id = split_length_prefixed(binding)
        if len(key_id) == KEY_ID_SIZE:
            return {
                "application": application.decode(),
                "keyring": keyring.decode(),
                "deployment": deployment.decode(),
                "key-id": key_id.hex(),
            }
    except ValueError:  # not four parts, or no UTF-8
        pass
    raise ProviderError(
        "What the data key is to be bound to is nothing that this library writes. This is a defect; report it.",
        provider=NAME,
    )


def _in_any_region(found: re.Match[str]) -> str:
    """Return what a key has in common with its replicas: all of its ARN, unless it is a multi-Region key."""
    if not found["id"].startswith("mrk-"):
        return found[0]
    return f"{found['partition']}:{found['account']}:{found['id']}"


def _own_endpoint(found: re.Match[str]) -> str:
    return f"https://kms.{found['region']}.{PARTITIONS[found['partition']]}"


def _checked_endpoint(endpoint: str) -> str:
    found = _ENDPOINT.fullmatch(endpoint)
    port = int(found["port"] or 443) if found else 0
    if found is None or port not in range(1, 65536):
        raise SettingsError(
            "KRAVN_KMS_AWS_ENDPOINT must be https:// and a host, with a port if it is not 443, and nothing after it."
        )
    # The default port is left out, since the host as it is sent is signed.
    return f"https://{found['host'].lower()}" + ("" if port == 443 else f":{port}")


def _code(answer: dict[str, object]) -> str:
    """Return the code of an error, which may stand behind the namespace of its shape."""
    code = answer.get("__type")
    return code.rpartition("#")[2] if isinstance(code, str) else ""
