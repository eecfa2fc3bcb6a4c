"""What a JWT must look like, and what it says of itself. Nothing is verified: that is for whom it is sent to."""

from __future__ import annotations

import base64
import re
from typing import Any, Final

from .credentials import Form
from .transport import json_object

JWT: Final = Form(
    re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+"),
    "a signed JWT: three parts in base64url, with a dot between each two",
)
"""RFC 7515, section 3.1."""


def claims_of(jwt: str) -> dict[str, Any]:
    """Return the claims of a JWT, or an empty dict if they cannot be read.

    :param jwt: of the form :data:`JWT`.
    """
    payload = jwt.split(".")[1]
    try:
        content = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    except ValueError:
        return {}
    return json_object(content)
