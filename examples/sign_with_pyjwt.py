"""Tokens of a web application, signed with PyJWT under a key that rests on the KMS.

pip install pyjwt
KRAVN_SECRET=$(openssl rand -hex 32) python examples/sign_with_pyjwt.py
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
from sqlalchemy import MetaData, create_engine

from sqlalchemy_kravn_crypto import configure, kms_tables, signing_key

ALGORITHM = "HS256"


def sign(user: str) -> str:
    key = signing_key("sessions")
    claims = {"sub": user, "exp": datetime.now(UTC) + timedelta(minutes=30)}
    return jwt.encode(claims, key.key, ALGORITHM, headers={"kid": key.key_id})


def verify(token: str) -> dict[str, Any]:
    """Return the claims, or raise ``jwt.InvalidTokenError``."""
    # The header only says which of our own keys to take; it is not believed in anything.
    named = signing_key("sessions").with_id(jwt.get_unverified_header(token).get("kid", ""))
    if named is None:
        raise jwt.InvalidKeyError("The token was signed under a key that is no longer accepted.")
    return jwt.decode(token, named.key, [ALGORITHM], options={"require": ["sub", "exp"]})


if __name__ == "__main__":
    engine = create_engine("sqlite://")
    metadata = MetaData()
    kms_tables(metadata)
    metadata.create_all(engine)
    configure(engine)
    print(verify(sign("ada"))["sub"])
