"""Links that expire, signed with itsdangerous under a key that rests on the KMS.

pip install itsdangerous
KRAVN_SECRET=$(openssl rand -hex 32) python examples/sign_with_itsdangerous.py
"""

import hashlib

from itsdangerous import URLSafeTimedSerializer
from sqlalchemy import MetaData, create_engine

from sqlalchemy_kravn_crypto import configure, kms_tables, signing_key


def serializer() -> URLSafeTimedSerializer:
    """Return one with the keys as they are now. Make it where it is used, so that it follows a rotation."""
    keys = signing_key("password-reset").all
    # itsdangerous signs with the last one and verifies with any.
    return URLSafeTimedSerializer(
        [one.key for one in reversed(keys)], salt="password-reset", signer_kwargs={"digest_method": hashlib.sha256}
    )


if __name__ == "__main__":
    engine = create_engine("sqlite://")
    metadata = MetaData()
    kms_tables(metadata)
    metadata.create_all(engine)
    configure(engine)
    link = serializer().dumps("ada")
    print(serializer().loads(link, max_age=3600))
