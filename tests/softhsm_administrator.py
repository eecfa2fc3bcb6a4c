"""What the user of a token does with its keys, for the tests: one action for each process."""

import json
import sys
from typing import Any

import pkcs11
from pkcs11 import Attribute, KeyType, ObjectClass

MASTER_KEY = {
    Attribute.TOKEN: True,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.MODIFIABLE: False,
    Attribute.COPYABLE: False,
    Attribute.ENCRYPT: True,
    Attribute.DECRYPT: True,
    Attribute.WRAP: False,
    Attribute.UNWRAP: False,
    Attribute.SIGN: False,
    Attribute.VERIFY: False,
    Attribute.DERIVE: False,
}
SHOWN = ("LABEL", "ID", "KEY_TYPE", "SENSITIVE", "EXTRACTABLE", "NEVER_EXTRACTABLE", "WRAP", "UNWRAP", "MODIFIABLE")


def template(request: dict[str, Any]) -> dict[Attribute, Any]:
    return {
        **MASTER_KEY,
        Attribute.LABEL: request["key"],
        Attribute.ID: bytes.fromhex(request["key_id"]),
        **{Attribute[name]: value for name, value in request["attributes"].items()},
    }


def shown(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def act(session: Any, request: dict[str, Any]) -> Any:
    match request["action"]:
        case "create_key":
            session.generate_key(KeyType.AES, 256, template=template(request))
        case "import_key":
            value = {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.AES,
                Attribute.VALUE: bytes.fromhex(request["value"]),
            }
            session.create_object({**template(request), **value})
        case "create_generic_secret":
            value = {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
                Attribute.VALUE: bytes(32),
            }
            session.create_object({**template(request), **value})
        case "destroy_key":
            wanted = {Attribute.LABEL: request["key"], Attribute.ID: bytes.fromhex(request["key_id"])}
            for key in list(session.get_objects(wanted)):
                key.destroy()
        case "keys":
            keys = session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY})
            return [{name: shown(key[Attribute[name]]) for name in SHOWN} for key in keys]
    return None


def main() -> None:
    request = json.loads(sys.stdin.read())
    token = pkcs11.lib(request["module"]).get_token(token_label=request["token"])
    with token.open(rw=True, user_pin=request["pin"]) as session:
        json.dump(act(session, request), sys.stdout)


if __name__ == "__main__":
    main()
