"""The proxy that connections to a KMS go through: a tunnel that it sees nothing of."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

from ..exceptions import SettingsError
from ..secrecy import KeepsSecret

_ADDRESS: Final = re.compile(
    r"http://(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})/?"
)
_USER: Final = re.compile(r"[^:\x00-\x1f\x7f]{1,256}")
_PASSWORD: Final = re.compile(r"[^\x00-\x1f\x7f]{0,1024}")


@dataclass(frozen=True, slots=True)
class Proxy(KeepsSecret):
    """An HTTP proxy that is asked to ``CONNECT``, and sees nothing of what then travels inside of TLS.

    :param host: its host name or IP address.
    :param port: its port.
    :param user: who it lets pass, if it asks (RFC 7617).
    :param password: their password.
    """

    host: str
    port: int
    user: str | None = None
    password: str = field(default="", repr=False)

    @property
    def authorization(self) -> str | None:
        """The value of the header ``Proxy-Authorization``, if there is a user."""
        if self.user is None:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    @property
    def url(self) -> str:
        """The proxy as a URL, with the password in it; not for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        who = "" if self.user is None else f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@"
        return f"http://{who}{host}:{self.port}"


def proxy_of(address: str | None, user: str | None = None, password: str | None = None) -> Proxy | None:
    """Return the proxy that the settings name, if they do.

    :param address: ``http://host:port``.
    :raises SettingsError: if one of them is not what it must be.
    """
    if address is None:
        if user is not None or password is not None:
            raise SettingsError("KRAVN_KMS_PROXY_USER and KRAVN_KMS_PROXY_PASSWORD need KRAVN_KMS_PROXY.")
        return None
    found = _ADDRESS.fullmatch(address)
    if not found or int(found["port"]) not in range(1, 65536):
        raise SettingsError(
            "KRAVN_KMS_PROXY must be http:// with a host and a port, and nothing after it: the proxy is asked to "
            "CONNECT, and TLS begins behind it. Who it lets pass goes into KRAVN_KMS_PROXY_USER."
        )
    if password is not None and user is None:
        raise SettingsError("KRAVN_KMS_PROXY_PASSWORD needs KRAVN_KMS_PROXY_USER.")
    if (user is not None and not _USER.fullmatch(user)) or not _PASSWORD.fullmatch(password or ""):
        raise SettingsError(
            "KRAVN_KMS_PROXY_USER must have 1 to 256 characters and no colon, KRAVN_KMS_PROXY_PASSWORD at most 1,024; "
            "neither may hold control characters."
        )
    return Proxy(found["host"].strip("[]"), int(found["port"]), user, password or "")
