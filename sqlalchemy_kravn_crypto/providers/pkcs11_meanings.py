"""What the answers of an HSM mean: errors that say what to do, and what there is to find about a master key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..exceptions import (
    CredentialError,
    CredentialExpiredError,
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderUnavailableError,
    UnwrapRefusedError,
)
from .base import Finding
from .findings import CREDENTIALS, REACHABILITY, RIGHTS, bad, good, unchecked, warning

NAME: Final = "pkcs11"

_CODE: Final = re.compile(r"[A-Z][A-Za-z0-9]{1,60}|0x[0-9a-f]{1,16}")
_STAGES: Final = frozenset({"library", "token", "login", "key", "use", "close"})
_MAX_SHOWN: Final = 300  # characters of what the loader of the operating system says


@dataclass(frozen=True, slots=True)
class Meaning:
    """What codes mean, for whoever runs the program.

    :param codes: names of python-pkcs11's errors, numbers of those that it has no name for, or codes of the worker's
        own, separated by spaces.
    :param kind: the error to raise.
    :param text: its message, with the words of :func:`refusal` in braces.
    """

    codes: str
    kind: type[ProviderError]
    text: str


_NOT_AUTHENTIC: Final = Meaning(
    # SoftHSM has but a general error for it. 0x42 is CKR_AEAD_DECRYPT_FAILED.
    "DataInvalid DataLenRange EncryptedDataInvalid EncryptedDataLenRange FunctionFailed GeneralError SignatureInvalid "
    "WrappedKeyInvalid WrappedKeyLenRange 0x42",
    UnwrapRefusedError,
    "The HSM refused to unwrap a data key under the master key {recorded} ({code}): the wrapped key was altered, "
    "belongs to another deployment, or the master key was made anew with the same label and id. Check that the "
    "database and the HSM belong together, and that the HSM is well.",
)
"""Only where it was asked to unwrap."""

_NOT_INITIALISED: Final = Meaning(
    "",
    ProviderUnavailableError,
    "The library {module} could not be initialised ({code}). Check its own configuration, such as the file that "
    "SOFTHSM2_CONF names, and that this program may read it.",
)
"""Whatever the code is, at the first stage."""

_WRONG_PIN: Final = Meaning(
    "PinIncorrect PinInvalid PinLenRange",
    ProviderDeniedError,
    "The token {token} refused the PIN. It was tried once and is not tried again, since a token locks itself after a "
    "few wrong ones. Correct {pin}, then start again.",
)

_UNKNOWN: Final = Meaning(
    "",
    ProviderError,
    "The library {module} failed with {code} at the stage '{stage}' of the operation. Look that up in the vendor's "
    "manual, and look in the HSM's log.",
)

_MEANINGS: Final = (
    Meaning(
        "NotLoaded",
        ProviderUnavailableError,
        "The library {module} cannot be loaded ({detail}). KRAVN_KMS_PKCS11_MODULE must be the PKCS#11 library of the "
        "HSM's vendor, for this machine's architecture, and what it needs itself must be installed.",
    ),
    Meaning(
        "NoToken",
        ProviderUnavailableError,
        "The library {module} sees no token. Check that the HSM is connected and switched on, and the library's own "
        "configuration.",
    ),
    Meaning(
        "NoSuchToken",
        MasterKeyNotFoundError,
        "The library {module} sees no token labelled {token}, though others. Check KRAVN_KMS_PKCS11_TOKEN, and that "
        "the HSM with that token is connected.",
    ),
    Meaning(
        "SeveralTokens",
        MasterKeyUnusableError,
        "The library {module} sees several tokens labelled {token}. Give them labels of their own, or have the "
        "library show a group of them as one.",
    ),
    _WRONG_PIN,
    Meaning(
        "PinLocked",
        CredentialExpiredError,
        "The PIN of the token {token} is locked, after too many wrong ones. Find out who tried them; the security "
        "officer can set a new one, which goes into {pin}.",
    ),
    Meaning(
        "PinExpired",
        CredentialExpiredError,
        "The PIN of the token {token} has expired. Change it with the vendor's tool and put the new one into {pin}.",
    ),
    Meaning(
        "UserPinNotInitialized",
        ProviderDeniedError,
        "The token {token} has no user PIN yet. The security officer sets it, with the vendor's tool or "
        "pkcs11-tool --init-pin.",
    ),
    Meaning(
        "UserNotLoggedIn",
        ProviderDeniedError,
        "The token {token} took the PIN, but not for the master key {master_key}. Check whose key it is.",
    ),
    Meaning(
        "UserAlreadyLoggedIn AnotherUserAlreadyLoggedIn UserTooManyTypes SessionReadWriteSOExists",
        ProviderUnavailableError,
        "Somebody is logged in to the token {token} already ({code}), though this operation has a process of its own: "
        "the security officer, or another program through a library that shares logins. Log them out, or name the "
        "vendor's own library in KRAVN_KMS_PKCS11_MODULE.",
    ),
    Meaning(
        "SessionCount",
        ProviderUnavailableError,
        "The token {token} has no session left. Raise its limit, or start fewer processes at once: each needs one for "
        "the moment that an operation takes.",
    ),
    Meaning(
        "DeviceRemoved SessionClosed SessionHandleInvalid SlotIDInvalid TokenNotPresent TokenNotRecognised",
        ProviderUnavailableError,
        "The token {token} was taken out, or the connection to the HSM was lost ({code}). Check both, then start "
        "again.",
    ),
    Meaning(
        "DeviceError DeviceMemory FunctionCancelled FunctionFailed FunctionRejected GeneralError HostMemory",
        ProviderUnavailableError,
        "The HSM failed ({code}). Check its health and its log, and that of the library {module}, then start again.",
    ),
    Meaning(
        "NoKey",
        MasterKeyNotFoundError,
        "The token {token} has no AES key {wanted} that the user of this PIN sees. Check KRAVN_KMS_PKCS11_KEY and "
        "KRAVN_KMS_PKCS11_KEY_ID, or make the key.",
    ),
    Meaning(
        "SeveralKeys",
        MasterKeyUnusableError,
        "The token {token} has several AES keys {wanted}, with these ids: {ids}. Say in KRAVN_KMS_PKCS11_KEY_ID which "
        "of them wraps; two with the same id cannot be told apart.",
    ),
    Meaning(
        "NoId",
        MasterKeyUnusableError,
        "The master key {master_key} has no CKA_ID, by which a later one of the same label could be told apart. Give "
        "it one, or make a key that has one.",
    ),
    Meaning(
        "NotPermitted 0x68",  # CKR_KEY_FUNCTION_NOT_PERMITTED
        MasterKeyUnusableError,
        "The master key {master_key} lacks an attribute that {mechanism} needs: CKA_ENCRYPT and CKA_DECRYPT "
        "for aes-gcm, CKA_WRAP and CKA_UNWRAP for aes-kwp. Make a key that has them, or correct "
        "KRAVN_KMS_PKCS11_MECHANISM.",
    ),
    Meaning(
        "MechanismInvalid FunctionNotSupported KeySizeRange KeyTypeInconsistent",
        MasterKeyUnusableError,
        "The HSM does not do {mechanism} with the master key {master_key} ({code}). Check that its firmware has the "
        "mechanism and its policy allows it, or take the other one: KRAVN_KMS_PKCS11_MECHANISM, with a master key of "
        "its own.",
    ),
    Meaning(
        "NotKWP",
        MasterKeyUnusableError,
        "What the HSM calls CKM_AES_KEY_WRAP_PAD is not RFC 5649, and it has no CKM_AES_KEY_WRAP_KWP. Take "
        "KRAVN_KMS_PKCS11_MECHANISM=aes-gcm, with a master key of its own.",
    ),
    Meaning(
        "MechanismParamInvalid ArgumentsBad OwnIV",
        MasterKeyUnusableError,
        "The HSM does not take the parameters of {mechanism} as they are given here ({code}): an initialisation "
        "vector of 12 bytes, which it may replace in place, the binding as additional authenticated data, and a tag of "
        "128 bits. Take KRAVN_KMS_PKCS11_MECHANISM=aes-kwp, with a master key of its own.",
    ),
    Meaning(
        "AttributeSensitive AttributeTypeInvalid AttributeValueInvalid KeyNotWrappable KeyUnextractable "
        "SessionReadOnly TemplateIncomplete TemplateInconsistent",
        MasterKeyUnusableError,
        "The HSM does not let a data key be an object of the session that the master key {master_key} wraps or unwraps "
        "({code}). Check its policy, or take KRAVN_KMS_PKCS11_MECHANISM=aes-gcm, with a master key of its own.",
    ),
)

_BY_CODE: Final = {code: meaning for meaning in _MEANINGS for code in meaning.codes.split()}


def refused_the_pin(answer: Mapping[str, Any]) -> bool:
    """Tell whether an answer of the worker is that the PIN was wrong."""
    return answer.get("stage") == "login" and str(answer.get("code")) in _WRONG_PIN.codes.split()


def refusal(answer: Mapping[str, Any], operation: str, words: Mapping[str, str]) -> ProviderError:
    """Return the error that an answer of the worker means.

    :param answer: it has a ``stage`` and a ``code``.
    :param operation: what was asked for: ``wrap``, ``unwrap`` or ``examine``.
    :param words: what the messages speak of: ``module``, ``token``, ``master_key``, ``recorded``, ``wanted``,
        ``mechanism``, and the setting ``pin``.
    """
    stage, code = str(answer.get("stage")), str(answer.get("code"))
    meaning = _BY_CODE.get(code, _UNKNOWN)
    if stage == "use" and operation == "unwrap" and code in _NOT_AUTHENTIC.codes.split():
        meaning = _NOT_AUTHENTIC
    elif stage == "library" and code != "NotLoaded":
        meaning = _NOT_INITIALISED
    shown = {
        "stage": stage if stage in _STAGES else "unknown",
        "code": code if _CODE.fullmatch(code) else "an error without a name",
        "detail": _shown(answer.get("detail")),
        "ids": _listed(answer.get("ids")),
    }
    return meaning.kind(meaning.text.format_map({**words, **shown}), provider=NAME)


def findings(answer: Mapping[str, Any], mechanism: str) -> Iterator[Finding]:
    """Return what is to be said about the HSM, the PIN and the master key.

    :param answer: what the worker answers where it is asked to examine: ``attributes``, ``flags`` and ``model``.
    :param mechanism: ``aes-gcm`` or ``aes-kwp``.
    """
    if _shown(answer.get("model")).startswith("SoftHSM"):
        yield warning(
            "provider",
            "This is SoftHSM: the master key is in a file, under nothing but the PIN.",
            "Take it for tests only.",
        )
    yield good(REACHABILITY, "The library can be loaded and sees the token.")
    yield good(CREDENTIALS, "The token takes the PIN. PKCS#11 does not tell how long it will.")
    yield from _about_pin(answer["flags"])
    excess = list(_excess(answer["attributes"], mechanism))
    yield from excess or [good(RIGHTS, "The master key cannot leave the HSM, and is there to wrap data keys alone.")]


def failure(error: ProviderError) -> Iterator[Finding]:
    """Return what is to be said if the worker could not examine anything."""
    if isinstance(error, ProviderDeniedError | CredentialError):
        yield bad(CREDENTIALS, str(error))
    elif isinstance(error, MasterKeyUnusableError | MasterKeyNotFoundError):
        yield bad(RIGHTS, str(error))
    else:
        yield bad(REACHABILITY, str(error))


def _about_pin(flags: list[Any]) -> Iterator[Finding]:
    """Say what the token told before the login, which resets it."""
    if "USER_PIN_FINAL_TRY" in flags:
        yield warning(
            CREDENTIALS,
            "One more wrong PIN would have locked the token.",
            "Find the program that tries wrong ones before it locks this one out.",
        )
    elif "USER_PIN_COUNT_LOW" in flags:
        yield warning(
            CREDENTIALS,
            "Somebody tried a wrong PIN since the last login.",
            "Find out who; a token locks itself after a few.",
        )
    if "USER_PIN_TO_BE_CHANGED" in flags:
        yield warning(CREDENTIALS, "The PIN is still the one that the security officer set.", "Change it.")


def _excess(attributes: Mapping[str, Any], mechanism: str) -> Iterator[Finding]:
    """Return what can be done with a master key and should not; attributes that the HSM does not tell are ``None``."""
    anew = "Make a new master key by the template in docs/kms-pkcs11.md, and rewrap."
    if attributes.get("EXTRACTABLE") is True or attributes.get("SENSITIVE") is False:
        yield bad(RIGHTS, "Whoever has the PIN can take the master key out of the HSM.", anew)
    elif attributes.get("NEVER_EXTRACTABLE") is False or attributes.get("ALWAYS_SENSITIVE") is False:
        yield warning(RIGHTS, "The master key could be taken out of the HSM once, or was brought in.", anew)
    elif attributes.get("EXTRACTABLE") is None or attributes.get("SENSITIVE") is None:
        yield unchecked(
            RIGHTS,
            "the HSM does not tell whether the master key can be taken out of it.",
            "Look for CKA_SENSITIVE and CKA_EXTRACTABLE with the vendor's own tool.",
        )
    if attributes.get("VALUE_LEN") not in (None, 32):
        yield warning(RIGHTS, "The master key is not of 256 bits, as the data keys are that it wraps.", anew)
    other = ("WRAP", "UNWRAP") if mechanism == "aes-gcm" else ("ENCRYPT", "DECRYPT")
    beyond = [f"CKA_{name}" for name in other if attributes.get(name) is True]
    if beyond:
        yield warning(
            RIGHTS,
            f"The master key has {' and '.join(beyond)}, which {mechanism} does not need: with all four, whoever has "
            "the PIN can read any key that may be wrapped.",
            anew,
        )
    if attributes.get("MODIFIABLE") is True:
        yield warning(RIGHTS, "Whoever has the PIN can change what the master key may be used for.", anew)
    if attributes.get("DESTROYABLE") is True:
        yield warning(
            RIGHTS,
            "Whoever has the PIN can destroy the master key, and with it all that is encrypted.",
            "Make it with CKA_DESTROYABLE false where the HSM can, and have a backup of it in any case.",
        )


def _shown(said: object) -> str:
    text = said if isinstance(said, str) else ""
    return "".join(character for character in text if character.isprintable())[:_MAX_SHOWN]


def _listed(ids: object) -> str:
    return ", ".join(_shown(one) or "none" for one in ids) if isinstance(ids, list) else ""
