"""The settings: from the environment, read once and validated as a whole, or given in code."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from . import provider_settings
from .bootstrap import MIN_SECRET_LENGTH, SECRET_FILE_NAME, STRONG_SECRET_LENGTH
from .derivation import KEY_ID_SIZE
from .exceptions import SettingsError
from .provider_settings import AzureAuth, Mechanism, Provider, ProviderSettings, VaultAuth, required
from .providers.credentials import Credential, read_secret
from .providers.discovery import installed
from .secrecy import KeepsSecret

__all__ = [
    "PREFIX",
    "SECRETS",
    "STANDBY_PREFIX",
    "AzureAuth",
    "Fence",
    "Mechanism",
    "Provider",
    "Provision",
    "Settings",
    "StandbySettings",
    "VaultAuth",
]

logger = logging.getLogger(__name__)

PREFIX: Final = "KRAVN_"
STANDBY_PREFIX: Final = "KRAVN_STANDBY_"
"""Before the settings of a second KMS, that only the commands on a standby read."""

SECRETS: Final = ("secret", "secret_next", "secret_retired", *provider_settings.SECRETS)
"""The settings that are secrets. Each has a form that ends in ``_FILE`` and names a file that holds it."""

MAX_TIMEOUT: Final = 120.0
"""Bound on ``KRAVN_KMS_TIMEOUT``, in seconds; the lock on the key store is held meanwhile."""

_SIMILAR: Final = 0.84  # ratio from which difflib's measure means a slip of the finger: one or two letters in a name
_KUBERNETES: Final = re.compile(r"KRAVN_(.*_)?(SERVICE_(HOST|PORT).*|PORT(_.*)?)")
_KEY_ID: Final = re.compile(rf"[0-9a-f]{{{2 * KEY_ID_SIZE}}}")


class Provision(StrEnum):
    """Whether a boot may make the first data key."""

    AUTO = "auto"
    NEVER = "never"


class Fence(StrEnum):
    """What keeps a process from writing under a data key that is no longer the primary."""

    LEASE = "lease"
    TRANSACTION = "transaction"


class Settings(KeepsSecret, ProviderSettings, BaseSettings):
    """All settings. Each is read from the environment variable of its name, in capitals, behind ``KRAVN_``.

    Given in code they are named without the prefix, as in ``Settings(kms_provider="vault")``; what is not given comes
    from the environment. Printing one shows no secret, and it cannot be pickled.

    :raises SettingsError: if one is missing, misspelt, malformed or too weak; the message names it.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        # Pydantic would quote the value that it refuses.
        hide_input_in_errors=True,
        str_strip_whitespace=True,
        env_ignore_empty=True,
    )

    secret: SecretStr | None = None
    """The deployment's own secret: the bootstrap key and the row MACs come from it."""

    secret_next: SecretStr | None = None
    """The secret that is to take its place: rows may already be authenticated with it."""

    secret_retired: SecretStr | None = None
    """Secrets that were in its place, one a line: they decrypt what is still under them, and authenticate nothing."""

    look_interval: float = Field(default=15.0, ge=0.05, le=600)
    """How many seconds after a look at the key store the next one is due."""

    lease: float = Field(default=180.0, ge=0.2, le=86_400)
    """For how many seconds after a look at the key store values are encrypted."""

    fence: Fence = Fence.LEASE
    """``transaction``: every transaction that writes encrypted values locks the primary."""

    destroy_after_days: float = Field(default=7.0, ge=0, le=3650)
    """How many days a data key must have been disabled before it may be destroyed."""

    data_dir: Path = Path("data")
    """The directory of ``secret.key``, which is used where there is no ``secret``."""

    deployment_id: UUID | None = None
    """What the key store must say; a cloned database with an id of its own is refused."""

    kms_provider: str = Provider.NONE
    """A :class:`Provider`, or the name of an entry point."""

    kms_provision: Provision = Provision.AUTO
    """``never`` leaves making the first data key to ``kravn-crypto provision``."""

    kms_timeout: float = Field(default=10.0, gt=0, le=MAX_TIMEOUT)
    """Bound on one whole KMS operation, in seconds."""

    kms_pinned_keys: Annotated[frozenset[str], NoDecode] = frozenset()
    """The key ids that may be loaded, separated by commas or spaces."""

    # Where those secrets are read from that are in files.
    _files: dict[str, Path] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        message = ""
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = error.errors(include_input=False, include_url=False)
            message = "; ".join(_described(details, str(self.model_config["env_prefix"])) for details in found)
        if message:
            raise SettingsError(message)
        in_files = {name: self._file_of(name) for name in SECRETS if name not in values}
        self._files = {name: path for name, path in in_files.items() if path is not None}
        self._check_whole()

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the environment.

        :raises SettingsError: see :class:`Settings`.
        """
        refuse_misspelt(os.environ)
        return cls()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Look in the code, the environment, and the files that the environment names."""
        return init_settings, env_settings, _SecretFiles(settings_cls)

    @field_validator("kms_provider")
    @classmethod
    def _check_provider(cls, value: str) -> str:
        built_in = [provider.value for provider in Provider]
        if value in built_in:
            return Provider(value)
        if value not in installed():
            msg = f"must be one of {', '.join([*built_in, *sorted(installed())])}"
            raise ValueError(msg)
        return value

    @field_validator("kms_pinned_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return frozenset(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("kms_pinned_keys")
    @classmethod
    def _check_key_ids(cls, value: frozenset[str]) -> frozenset[str]:
        if not all(map(_KEY_ID.fullmatch, value)):
            msg = f"must be key ids of {2 * KEY_ID_SIZE} lower-case hexadecimal characters, separated by commas"
            raise ValueError(msg)
        return value

    def _check_whole(self) -> None:
        """Check what concerns more than one setting."""
        for name, value in self._secrets():
            if len(value) < MIN_SECRET_LENGTH:
                raise SettingsError(
                    f"{name} is too short: it must have at least {MIN_SECRET_LENGTH} characters, better "
                    f"{STRONG_SECRET_LENGTH} random ones. Make one with: openssl rand -hex 32"
                )
        if self.lease < 2 * self.look_interval:
            raise SettingsError(
                f"KRAVN_LEASE is {self.lease:g} seconds: it must be at least twice KRAVN_LOOK_INTERVAL "
                f"({self.look_interval:g}), or one look that fails keeps a process from writing."
            )
        prefix = str(self.model_config["env_prefix"])
        missing = [prefix + name.upper() for name in required(self, self.kms_provider) if not getattr(self, name)]
        if missing:
            raise SettingsError(f"{prefix}KMS_PROVIDER={self.kms_provider} also needs {', '.join(missing)}.")

    def credential(self, name: str) -> Credential | None:
        """Return a secret that is needed at every KMS operation: read anew then, if it is in a file."""
        path, value = self._files.get(name), getattr(self, name)
        setting = str(self.model_config["env_prefix"]) + name.upper()
        if path is not None:
            return Credential(setting, path=path)
        return None if value is None else Credential(setting, value=value.get_secret_value())

    @classmethod
    def _file_of(cls, name: str) -> Path | None:
        path = _from_environment(f"{cls.model_config['env_prefix']}{name.upper()}_FILE")
        return Path(path) if path else None

    def weaknesses(self) -> list[str]:
        """Return what is accepted but should be better."""
        return [
            f"{name} has fewer than {STRONG_SECRET_LENGTH} characters. Whoever reads kms_keys can test guesses at it; "
            "make a random one with: openssl rand -hex 32"
            for name, value in self._secrets()
            if len(value) < STRONG_SECRET_LENGTH
        ]

    def _secrets(self) -> list[tuple[str, str]]:
        """Return the deployment's own secrets and the variables that they are in."""
        found = [("KRAVN_SECRET", self.secret), ("KRAVN_SECRET_NEXT", self.secret_next)]
        return [
            *((name, secret.get_secret_value()) for name, secret in found if secret is not None),
            *(("KRAVN_SECRET_RETIRED", secret) for secret in self.retired_secrets),
        ]

    @property
    def retired_secrets(self) -> tuple[str, ...]:
        """The secrets in ``secret_retired``."""
        retired = "" if self.secret_retired is None else self.secret_retired.get_secret_value()
        return tuple(filter(None, map(str.strip, retired.splitlines())))

    @property
    def secret_file(self) -> Path:
        """Where ``secret.key`` is, or would be, from the root of the file system."""
        return (self.data_dir / SECRET_FILE_NAME).absolute()


class StandbySettings(Settings):
    """The settings of a second KMS: those that begin with ``kms_``, behind ``KRAVN_STANDBY_``."""

    model_config = SettingsConfigDict(env_prefix=STANDBY_PREFIX)

    @classmethod
    def from_environment(cls) -> StandbySettings:
        """Read the environment.

        :raises SettingsError: see :class:`Settings`; also if they name no KMS.
        """
        refuse_misspelt(os.environ)
        settings = cls()
        if settings.kms_provider == Provider.NONE:
            raise SettingsError(
                "There is no standby KMS: set KRAVN_STANDBY_KMS_PROVIDER and the settings that go with it."
            )
        return settings


class _SecretFiles(PydanticBaseSettingsSource):
    """Reads ``KRAVN_…_FILE``: a file that holds a secret."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 - fixed
        """Return what the file of one setting holds."""
        if field_name not in SECRETS:
            return None, field_name, False
        name = str(self.config["env_prefix"]) + field_name.upper()
        path = _from_environment(f"{name}_FILE")
        return (_read_secret(name, Path(path)) if path else None), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return what the files hold."""
        found = {name: self.get_field_value(None, name)[0] for name in SECRETS}
        return {name: value for name, value in found.items() if value is not None}


def _from_environment(name: str) -> str | None:
    """Return a variable's value as pydantic does: in capitals or not, and not if it is empty."""
    return next((value for found, value in os.environ.items() if value and found.upper() == name), None)


def _read_secret(name: str, path: Path) -> str:
    if _from_environment(name):
        raise SettingsError(f"{name} and {name}_FILE are both set. Unset one of them.")
    content, reason = read_secret(path)
    if reason:
        raise SettingsError(f"{name}_FILE names {path}, which cannot be used: {reason}.")
    return content


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def known_variables() -> tuple[str, ...]:
    """Return the environment variables that are read."""
    own = (*map(variable, Settings.model_fields), *(f"{variable(name)}_FILE" for name in SECRETS))
    of_kms = tuple(name.removeprefix(PREFIX) for name in own if name.startswith(f"{PREFIX}KMS_"))
    return (*own, *(STANDBY_PREFIX + name for name in of_kms))


def provider_prefix(provider: str, prefix: str = PREFIX) -> str:
    """Return what the variables of a provider begin with."""
    return f"{prefix}KMS_{provider.upper()}_"


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that look like settings but are none, with escapes for all that is not printable ASCII.

    What Kubernetes sets for a service does not count, nor what is of a provider that an entry point adds: its own
    settings are looked at when it is made.
    """
    known = known_variables()
    foreign = tuple(provider_prefix(name, prefix) for name in installed() for prefix in (PREFIX, STANDBY_PREFIX))
    return sorted(
        ascii(name)[1:-1]  # as a name of no UTF-8 cannot be written to most logs
        for name in environment
        if (found := name.upper()).startswith(PREFIX)
        and found not in known
        and not found.startswith(foreign)
        and not _KUBERNETES.fullmatch(found)
    )


def refuse_misspelt(environment: Mapping[str, str]) -> None:
    """Warn of variables that are no settings, and refuse those that almost are one.

    :raises SettingsError: naming the variable and the setting that was probably meant.
    """
    for name in unknown_variables(environment):
        meant = difflib.get_close_matches(name.upper(), known_variables(), n=1, cutoff=_SIMILAR)
        if meant:
            raise SettingsError(f"{name} is no setting. Did you mean {meant[0]}? Correct or unset it.")
        logger.warning("%s is no setting of this library and is ignored", name)


def _described(details: Mapping[str, Any], prefix: str) -> str:
    """Return what pydantic found, without the value in which it found it."""
    name = prefix + str(details["loc"][0]).upper() if details["loc"] else "The settings"
    if details["type"] == "extra_forbidden":
        return f"{name} is no setting"
    if details["type"] == "enum":
        return f"{name} must be {details['ctx']['expected']}"
    if str(details["type"]).startswith("uuid"):
        return f"{name} must be a UUID"
    message = str(details["msg"]).removeprefix("Value error, ")
    return f"{name}: {message[:1].lower()}{message[1:]}"
