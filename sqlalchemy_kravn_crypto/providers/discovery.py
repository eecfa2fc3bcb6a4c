"""The KMS of somebody else: found by an entry point, and made from the environment.

The entry point is of the group ``sqlalchemy_kravn_crypto.providers`` and names a subclass of
:class:`~sqlalchemy_kravn_crypto.providers.base.KeyProvider`. The parameters of its constructor are its settings: where
the entry point is ``acme``, the parameter ``key_name`` is ``KRAVN_KMS_ACME_KEY_NAME``.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from ..exceptions import KravnCryptoError, SettingsError
from .base import KeyProvider, detached
from .credentials import Credential, read_secret

logger = logging.getLogger(__name__)

GROUP: Final = "sqlalchemy_kravn_crypto.providers"

NAME: Final = re.compile(r"[a-z][a-z0-9]{0,31}")
"""The name of a provider: part of a variable, and at most as long as a row of the key store holds."""

RESERVED: Final = frozenset(
    {"aws", "azure", "gcp", "none", "pinned", "pkcs11", "provider", "provision", "proxy", "timeout", "vault"}
)
"""What cannot be the name of an entry point: the variables that begin with it have a meaning already."""

_PARAMETER: Final = re.compile(r"[a-z][a-z0-9_]*")
_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_CREDENTIAL: Final = re.compile(r"\bCredential\b")
_KUBERNETES: Final = re.compile(r"SERVICE_(HOST|PORT).*|PORT(_.*)?")
"""What Kubernetes sets for a service that is called ``kravn-kms-acme``, behind the prefix."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One setting of a provider.

    :ivar variable: its environment variable.
    :ivar is_required: whether the provider cannot be made without it.
    :ivar is_credential: whether it is annotated as a ``Credential``; the others are strings.
    """

    variable: str
    is_required: bool
    is_credential: bool


@cache
def installed() -> Mapping[str, tuple[EntryPoint, ...]]:
    """Return the entry points of providers by name; a name that several have is refused when it is configured.

    One whose name no variable could stand for, or that has a meaning already, is left out with a warning.
    """
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=GROUP):
        if NAME.fullmatch(point.name) and point.name not in RESERVED:
            found[point.name] = (*found.get(point.name, ()), point)
        else:
            logger.warning(
                "the provider %r (%s) is left out: its name must be 1 to 32 lower-case letters and digits, beginning "
                "with a letter, and none of %s",
                point.name,
                point.value,
                ", ".join(sorted(RESERVED)),
            )
    return found


def parameters(name: str, prefix: str) -> Mapping[str, Parameter]:
    """Return the settings of a provider by the parameters of its constructor.

    :param name: the name of its entry point.
    :param prefix: what its variables begin with, such as ``KRAVN_KMS_ACME_``.
    :raises SettingsError: if it cannot be loaded, or its constructor takes what no variable can stand for.
    """
    accepted = {}
    for one in inspect.signature(_loaded(name)).parameters.values():
        is_required = one.default is one.empty and one.kind not in _VARIADIC
        if one.kind in _NAMED and _PARAMETER.fullmatch(one.name):
            # As text: what it names may be imported for the type checker only.
            is_credential = bool(_CREDENTIAL.search(inspect.formatannotation(one.annotation)))
            accepted[one.name] = Parameter(prefix + one.name.upper(), is_required, is_credential)
        elif is_required:
            raise SettingsError(
                f"The provider {name} cannot be made from the environment: the parameter {one.name} of its constructor "
                "must be in lower case and passed by name. Report it there."
            )
    return accepted


def provider_from(name: str, environment: Mapping[str, str], prefix: str) -> KeyProvider:
    """Construct a provider from what the environment says of it.

    Each setting is a string, without white space around it. Where ``…_FILE`` is set instead, it is what the file of
    that name holds; a parameter that is annotated as a ``Credential`` is given one that reads the file at every
    operation.

    :param name: the name of its entry point.
    :param prefix: what its variables begin with, such as ``KRAVN_KMS_ACME_``.
    :raises SettingsError: if a setting is missing, set twice or none of the provider's, or it does not accept one.
    """
    accepted = parameters(name, prefix)
    given: dict[str, str | Credential] = {}
    for variable, value in sorted(environment.items()):
        said = variable.upper().removeprefix(prefix)
        if said == variable.upper() or not value.strip():
            continue
        setting = _setting(said.lower(), accepted)
        if setting is None:
            if _KUBERNETES.fullmatch(said):
                continue
            known = ", ".join(one.variable for one in accepted.values())
            raise SettingsError(f"{variable} is no setting of the provider {name}. It has {known or 'none'}.")
        if setting in given:
            raise SettingsError(f"{accepted[setting].variable} is set twice, or beside its form with _FILE. Unset one.")
        path = None if said.lower() == setting else Path(value.strip())
        given[setting] = _value(accepted[setting], value.strip(), path)
    missing = [one.variable for setting, one in accepted.items() if one.is_required and setting not in given]
    if missing:
        raise SettingsError(f"The provider {name} also needs {', '.join(missing)}.")
    return _made(name, given)


def _setting(said: str, accepted: Mapping[str, Parameter]) -> str | None:
    """Return which parameter a variable stands for, without its prefix and in lower case."""
    return next((setting for setting in (said, said.removesuffix("_file")) if setting in accepted), None)


def _value(parameter: Parameter, value: str, path: Path | None) -> str | Credential:
    if path is not None:
        value, reason = read_secret(path)
        if reason:
            raise SettingsError(f"{parameter.variable}_FILE names {path}, which cannot be used: {reason}.")
    if not parameter.is_credential:
        return value
    return Credential(parameter.variable, value=value) if path is None else Credential(parameter.variable, path=path)


def _loaded(name: str) -> type[KeyProvider]:
    points = installed()[name]
    if len(points) > 1:
        raise SettingsError(
            f"Several packages bring a provider {name}: {', '.join(map(_origin, points))}. Uninstall all but one."
        )
    failure, found = "", None
    try:
        found = points[0].load()
    except Exception as error:  # noqa: BLE001 - it is anybody's module
        failure = type(error).__name__
    where = f"The entry point {name} ({points[0].value})"
    if failure:
        raise SettingsError(f"{where} cannot be imported: {failure}. Try: python -c 'import {points[0].module}'")
    if not (isinstance(found, type) and issubclass(found, KeyProvider)) or inspect.isabstract(found):
        raise SettingsError(f"{where} is no subclass of KeyProvider with a wrap and an unwrap. Report it there.")
    return found


def _origin(point: EntryPoint) -> str:
    return point.value if point.dist is None else point.dist.name


def _made(name: str, given: Mapping[str, str | Credential]) -> KeyProvider:
    made = _constructed(name, given)
    if isinstance(made, KravnCryptoError):
        raise detached(made)
    if getattr(made, "name", None) != name:
        raise SettingsError(
            f"The entry point {name} leads to a provider whose name is another. The two must be the same, since the "
            "key store records the name. Report it there."
        )
    return made


def _constructed(name: str, given: Mapping[str, str | Credential]) -> KeyProvider | KravnCryptoError:
    make = _loaded(name)
    try:
        return make(**given)
    except KravnCryptoError as error:
        return error
    except Exception as error:  # noqa: BLE001 - what anybody's constructor raises may quote a secret
        return SettingsError(
            f"The provider {name} failed with {type(error).__name__} when it was made. Check its settings; if they are "
            "right, this is a defect of the provider. Report it there."
        )
