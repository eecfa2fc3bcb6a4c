"""The AWS provider against moto; what moto does not do is scripted."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from requests import post
from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto import configure, reset
from sqlalchemy_kravn_crypto.derivation import length_prefixed
from sqlalchemy_kravn_crypto.exceptions import (
    CredentialExpiredError,
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
    UnwrapRefusedError,
)
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.providers.aws import AwsProvider, encryption_context
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.providers.proxy import Proxy
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.wrapping import binding
from tests.aws_server import (
    BINDING,
    DEPLOYMENT_ID,
    INSTANCE,
    KEY_ID,
    KMS,
    OTHER_KMS,
    ROLE,
    STS,
    UNUSED_KEY,
    VPC_ENDPOINT,
    WRAPPED,
    Answer,
    Aws,
    Credentials,
    Deployment,
    operate,
    refused,
    scripted,
    sts_refused,
)
from tests.connect_proxy import ConnectProxy
from tests.leaks import leaked

pytestmark = pytest.mark.usefixtures("aws_home")

MULTI_REGION_KEY = "arn:aws:kms:eu-central-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab"


def answer_of_kms(**fields: Any) -> Answer:
    return Answer(200, {"KeyId": UNUSED_KEY, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT", **fields})


@pytest.fixture
def deployment(aws: Aws) -> Deployment:
    return Deployment(aws)


# --- Wrapping and unwrapping -----------------------------------------------------------------------------------------


def test_a_data_key_comes_back(deployment: Deployment, aws_credentials: Credentials) -> None:
    wrapped = deployment.wrap()
    assert wrapped.master_key == deployment.key
    assert deployment.data_key not in wrapped.blob
    assert deployment.unwrap(wrapped) == deployment.data_key


def test_each_takes_one_request_and_that_to_kms(deployment: Deployment, aws_credentials: Credentials) -> None:
    deployment.unwrap(deployment.wrap())
    assert deployment.aws.operations() == ["Encrypt", "Decrypt"]
    assert deployment.aws.hosts() == {KMS}


def test_both_name_the_key_and_the_encryption_context(deployment: Deployment, aws_credentials: Credentials) -> None:
    deployment.unwrap(deployment.wrap())
    for request in deployment.aws.requests:
        sent = json.loads(request.body)
        assert sent["KeyId"] == deployment.key
        assert sent["EncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"
        assert sent["EncryptionContext"] == {
            "application": "sqlalchemy-kravn-crypto/wrap/v1",
            "keyring": "default",
            "deployment": DEPLOYMENT_ID,
            "key-id": "0001020304050607",
        }
        assert request.headers["user-agent"] == "sqlalchemy-kravn-crypto"


def test_threads_may_share_a_provider(deployment: Deployment, aws_credentials: Credentials) -> None:
    provider = deployment.provider()
    data_keys = [os.urandom(32) for _ in range(24)]

    def there_and_back(data_key: bytes) -> bytes:
        bound = binding("default", DEPLOYMENT_ID, data_key[:8])
        return provider.unwrap(provider.wrap(data_key, bound, Deadline(60)), bound, Deadline(60))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, data_keys)) == data_keys


@pytest.mark.parametrize(
    "other",
    [
        binding("row-mac", DEPLOYMENT_ID, KEY_ID),
        binding("default", "0b9e8f1c-5d2a-4f6e-9a3b-7c1d2e3f4a5c", KEY_ID),
        binding("default", DEPLOYMENT_ID, bytes(8)),
        length_prefixed(b"another application", b"default", DEPLOYMENT_ID.encode(), KEY_ID),
    ],
)
def test_another_binding_is_refused(deployment: Deployment, aws_credentials: Credentials, other: bytes) -> None:
    wrapped = deployment.wrap()
    with pytest.raises(UnwrapRefusedError) as caught:
        deployment.unwrap(wrapped, other)
    assert caught.value.provider == "aws"
    assert caught.value.__context__ is None


def test_an_altered_wrapped_key_is_refused(deployment: Deployment, aws_credentials: Credentials) -> None:
    wrapped = deployment.wrap()
    # The first 36 bytes are the id of the key in moto, which calls another one denied.
    for position in range(36, len(wrapped.blob), 5):
        blob = bytearray(wrapped.blob)
        blob[position] ^= 1
        with pytest.raises(UnwrapRefusedError):
            deployment.unwrap(WrappedKey(deployment.key, bytes(blob)))


def test_a_wrapped_key_of_another_master_key_is_refused(deployment: Deployment, aws_credentials: Credentials) -> None:
    other = Deployment(deployment.aws)
    with pytest.raises((UnwrapRefusedError, ProviderDeniedError)):
        deployment.unwrap(WrappedKey(deployment.key, other.wrap().blob))


def test_a_record_of_another_master_key_is_not_sent(deployment: Deployment, aws_credentials: Credentials) -> None:
    with pytest.raises(UnwrapRefusedError, match="KRAVN_KMS_AWS_KEY"):
        deployment.unwrap(WRAPPED)
    assert deployment.aws.requests == []


def test_rotating_the_master_key_leaves_old_wrapped_keys_readable(
    deployment: Deployment, aws_credentials: Credentials
) -> None:
    old = deployment.wrap()
    deployment.aws.kms.rotate_key_on_demand(KeyId=deployment.key)
    new = deployment.wrap()
    assert deployment.unwrap(old) == deployment.unwrap(new) == deployment.data_key


def test_a_life_in_the_key_store(deployment: Deployment, aws_credentials: Credentials, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'database'}")
    migrate(engine)
    secret = "a secret of more than thirty-two characters"
    configure(engine, Settings(secret=secret), provider=deployment.provider())
    assert deployment.aws.operations().count("Encrypt") == 1
    reset()
    deployment.aws.requests.clear()
    configure(engine, Settings(secret=secret), provider=deployment.provider())
    assert deployment.aws.operations() == ["Decrypt"]
    engine.dispose()


# --- The encryption context ------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def context_of(bound: bytes) -> dict[str, str] | None:
    try:
        return encryption_context(bound)
    except ProviderError:
        return None


@given(TEXT, TEXT, st.binary(min_size=8, max_size=8))
def test_a_binding_can_be_put_together_again(keyring: str, deployment: str, key_id: bytes) -> None:
    found = context_of(binding(keyring, deployment, key_id))
    assert found is not None
    assert list(found) == ["application", "keyring", "deployment", "key-id"]
    assert binding(found["keyring"], found["deployment"], bytes.fromhex(found["key-id"])) == binding(
        keyring, deployment, key_id
    )


@given(st.lists(st.binary(max_size=10), max_size=6).map(lambda parts: length_prefixed(*parts)) | st.binary(max_size=60))
def test_whatever_has_a_context_has_one_of_its_own(bound: bytes) -> None:
    found = context_of(bound)
    if found is not None:
        *texts, key_id = found.values()
        assert length_prefixed(*(text.encode() for text in texts), bytes.fromhex(key_id)) == bound


@pytest.mark.parametrize(
    "bound",
    [
        b"",
        b"what the data key belongs to",
        BINDING[:-1],
        BINDING + b"\0",
        BINDING + bytes(4),
        length_prefixed(b"application", b"default", DEPLOYMENT_ID.encode()),
        length_prefixed(b"application", b"default", DEPLOYMENT_ID.encode(), bytes(7)),
        length_prefixed(b"application", b"\xff", DEPLOYMENT_ID.encode(), KEY_ID),
    ],
)
def test_a_binding_of_another_form_is_not_sent(aws: Aws, aws_credentials: Credentials, bound: bytes) -> None:
    with pytest.raises(ProviderError, match="defect") as caught:
        scripted(aws).wrap(bytes(32), bound, Deadline(20))
    assert caught.value.__context__ is None
    with pytest.raises(ProviderError, match="defect"):
        scripted(aws).unwrap(WRAPPED, bound, Deadline(20))
    assert aws.requests == []


# --- What KMS answers ------------------------------------------------------------------------------------------------

BLOB = base64.b64encode(bytes(180)).decode()
DATA_KEY = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    "answer",
    [
        {"KeyId": UNUSED_KEY.replace("1234abcd", "1234abce")},
        {"KeyId": UNUSED_KEY.replace("eu-central-1", "eu-west-1")},
        {"KeyId": "1234abcd-12ab-34cd-56ef-1234567890ab"},
        {"KeyId": "arn:aws:kms:eu-central-1:111122223333:alias/kravn"},
        {"KeyId": None},
        {"KeyId": [UNUSED_KEY]},
        {"EncryptionAlgorithm": "RSAES_OAEP_SHA_256"},
        {"EncryptionAlgorithm": None},
        {"CiphertextBlob": None, "Plaintext": None},
        {"CiphertextBlob": "", "Plaintext": ""},
        {"CiphertextBlob": BLOB + "\n", "Plaintext": DATA_KEY + "\n"},
        {"CiphertextBlob": "A" * 8192, "Plaintext": "A" * 8192},
    ],
)
@pytest.mark.parametrize("operation", ["Encrypt", "Decrypt"])
def test_an_answer_that_is_not_for_the_request_is_refused(
    aws: Aws, aws_credentials: Credentials, operation: str, answer: dict[str, Any]
) -> None:
    aws.answers[KMS].append(answer_of_kms(**{"CiphertextBlob": BLOB, "Plaintext": DATA_KEY, **answer}))
    with pytest.raises(ProviderResponseError):
        operate(scripted(aws), operation)


def test_a_multi_region_key_is_the_same_in_all_its_regions(aws: Aws, aws_credentials: Credentials) -> None:
    replica = MULTI_REGION_KEY.replace("eu-central-1", "eu-west-1")
    provider = AwsProvider(**aws.settings(replica))
    aws.answers[OTHER_KMS].append(answer_of_kms(KeyId=replica, Plaintext=DATA_KEY))
    assert provider.unwrap(WrappedKey(MULTI_REGION_KEY, bytes(180)), BINDING, Deadline(20)) == bytes(32)
    [request] = aws.requests
    assert (request.host, json.loads(request.body)["KeyId"]) == (OTHER_KMS, replica)
    assert "/eu-west-1/kms/aws4_request" in request.headers["authorization"]


def test_what_it_recognises() -> None:
    it = AwsProvider(key=UNUSED_KEY)
    assert it.master_key == UNUSED_KEY
    assert it.recognises(UNUSED_KEY)
    for other in (
        "",
        f"{UNUSED_KEY}:v1",
        UNUSED_KEY.upper(),
        UNUSED_KEY.replace("eu-central-1", "eu-west-1"),
        UNUSED_KEY.replace("111122223333", "111122223334"),
        MULTI_REGION_KEY,
        "alias/kravn",
    ):
        assert not it.recognises(other)


def test_what_it_recognises_of_a_multi_region_key() -> None:
    it = AwsProvider(key=MULTI_REGION_KEY)
    assert it.recognises(MULTI_REGION_KEY)
    assert it.recognises(MULTI_REGION_KEY.replace("eu-central-1", "ap-southeast-3"))
    for other in (
        UNUSED_KEY,
        MULTI_REGION_KEY.replace("mrk-1", "mrk-2"),
        MULTI_REGION_KEY.replace("111122223333", "111122223334"),
        MULTI_REGION_KEY.replace("arn:aws:", "arn:aws-cn:"),
        MULTI_REGION_KEY.replace("eu-central-1", "EU"),
    ):
        assert not it.recognises(other)


ERRORS: dict[str, type[ProviderError]] = {
    "AccessDeniedException": ProviderDeniedError,
    "InvalidGrantTokenException": ProviderDeniedError,
    "NotFoundException": MasterKeyNotFoundError,
    "InvalidArnException": MasterKeyNotFoundError,
    "DisabledException": MasterKeyUnusableError,
    "KMSInvalidStateException": MasterKeyUnusableError,
    "InvalidKeyUsageException": MasterKeyUnusableError,
    "IncorrectKeyException": UnwrapRefusedError,
    "InvalidCiphertextException": UnwrapRefusedError,
    "com.amazonaws.kms#InvalidCiphertextException": UnwrapRefusedError,
    "KeyUnavailableException": ProviderUnavailableError,
    "DependencyTimeoutException": ProviderUnavailableError,
    "KMSInternalException": ProviderUnavailableError,
    "ThrottlingException": ProviderUnavailableError,
    "LimitExceededException": ProviderUnavailableError,
    "ServiceUnavailableException": ProviderUnavailableError,
    "ExpiredTokenException": CredentialExpiredError,
    "UnrecognizedClientException": ProviderDeniedError,
    "InvalidClientTokenId": ProviderDeniedError,
    "MissingAuthenticationTokenException": ProviderDeniedError,
    "InvalidSignatureException": ProviderDeniedError,
    "IncompleteSignatureException": ProviderDeniedError,
    "RequestExpired": ProviderDeniedError,
    "OptInRequired": ProviderDeniedError,
    "ValidationException": ProviderResponseError,
    "SomethingNewException": ProviderResponseError,
    "": ProviderResponseError,
}


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("operation", ["Encrypt", "Decrypt"])
def test_every_error_of_kms(aws: Aws, aws_credentials: Credentials, operation: str, code: str) -> None:
    message = "" if "Ciphertext" in code else f"words of {secrets.token_hex(8)}"
    aws.answers[KMS].extend([refused(code, message=message)] * 3)
    with pytest.raises(ProviderError) as caught:
        operate(scripted(aws), operation)
    assert caught.type is ERRORS[code]
    assert caught.value.provider == "aws"
    assert not message or leaked(caught.value, message) == []


@pytest.mark.parametrize("status", [500, 503])
def test_an_error_of_the_server_counts_more_than_its_code(aws: Aws, aws_credentials: Credentials, status: int) -> None:
    aws.answers[KMS].extend([refused("KeyUnavailableException", status)] * 3)
    with pytest.raises(ProviderUnavailableError, match=f"HTTP {status}"):
        operate(scripted(aws), "Decrypt")
    assert len(aws.requests) == 3


def test_a_key_pending_deletion_says_how_it_is_brought_back(aws: Aws, aws_credentials: Credentials) -> None:
    aws.answers[KMS].append(refused("KMSInvalidStateException"))
    with pytest.raises(MasterKeyUnusableError, match="cancel-key-deletion"):
        operate(scripted(aws), "Decrypt")


def test_a_key_that_is_missing_in_moto(aws: Aws, aws_credentials: Credentials) -> None:
    for operation in ("Encrypt", "Decrypt"):
        with pytest.raises(MasterKeyNotFoundError, match="KRAVN_KMS_AWS_KEY"):
            operate(scripted(aws), operation)


# --- Too many requests -----------------------------------------------------------------------------------------------


def test_what_comes_too_soon_is_tried_again(deployment: Deployment, aws_credentials: Credentials) -> None:
    pauses: list[float] = []
    deployment.aws.answers[KMS].extend([refused("ThrottlingException")] * 2)
    wrapped = deployment.wrap(sleep=pauses.append)
    assert deployment.unwrap(wrapped) == deployment.data_key
    assert pauses == [0.2, 0.8]
    assert deployment.aws.operations() == ["Encrypt"] * 3 + ["Decrypt"]


def test_what_always_comes_too_soon_is_given_up(aws: Aws, aws_credentials: Credentials) -> None:
    aws.answers[KMS].extend([refused("ThrottlingException")] * 5)
    with pytest.raises(ProviderUnavailableError, match="ThrottlingException"):
        operate(scripted(aws), "Decrypt")
    assert len(aws.requests) == 3


def test_nobody_waits_beyond_the_deadline(aws: Aws, aws_credentials: Credentials) -> None:
    pauses: list[float] = []
    moments = iter([0.0] * 100)
    aws.answers[KMS].append(refused("ThrottlingException"))
    provider = scripted(aws, sleep=pauses.append)
    with pytest.raises(ProviderUnavailableError):
        provider.unwrap(WRAPPED, BINDING, Deadline(0.15, lambda: next(moments)))
    assert pauses == []
    assert len(aws.requests) == 1


def test_sts_may_be_asked_too_soon_as_well(deployment: Deployment, aws_credentials: Credentials) -> None:
    deployment.aws.answers[STS].append(sts_refused("Throttling", 400))
    deployment.wrap(role=ROLE)
    assert deployment.aws.operations() == ["AssumeRole", "AssumeRole", "Encrypt"]


# --- The way there ---------------------------------------------------------------------------------------------------


def test_a_vpc_endpoint(deployment: Deployment, aws_credentials: Credentials) -> None:
    wrapped = deployment.wrap(endpoint=f"https://{VPC_ENDPOINT}")
    assert deployment.unwrap(wrapped, endpoint=f"https://{VPC_ENDPOINT.upper()}:443/") == deployment.data_key
    assert deployment.aws.hosts() == {VPC_ENDPOINT}
    assert {request.headers["host"] for request in deployment.aws.requests} == {VPC_ENDPOINT}


def test_an_endpoint_at_another_port(deployment: Deployment, aws_credentials: Credentials) -> None:
    deployment.wrap(endpoint=f"https://{VPC_ENDPOINT}:8443")
    assert deployment.aws.requests[0].headers["host"] == f"{VPC_ENDPOINT}:8443"


def test_login_does_not_go_to_the_endpoint_of_kms(deployment: Deployment, aws_credentials: Credentials) -> None:
    deployment.wrap(endpoint=f"https://{VPC_ENDPOINT}", role=ROLE)
    assert [request.host for request in deployment.aws.requests] == [STS, VPC_ENDPOINT]


@pytest.mark.parametrize(
    ("key", "host"),
    [
        (UNUSED_KEY, KMS),
        (UNUSED_KEY.replace("aws:kms:eu-central-1", "aws-cn:kms:cn-north-1"), "kms.cn-north-1.amazonaws.com.cn"),
        (
            UNUSED_KEY.replace("aws:kms:eu-central-1", "aws-us-gov:kms:us-gov-west-1"),
            "kms.us-gov-west-1.amazonaws.com",
        ),
        (UNUSED_KEY.replace("aws:kms:eu-central-1", "aws-iso:kms:us-iso-east-1"), "kms.us-iso-east-1.c2s.ic.gov"),
        (UNUSED_KEY.replace("aws:kms:eu-central-1", "aws-eusc:kms:eusc-de-east-1"), "kms.eusc-de-east-1.amazonaws.eu"),
    ],
)
def test_each_cloud_has_its_hosts(aws_credentials: Credentials, key: str, host: str) -> None:
    asked = []

    def resolve(*address: Any) -> tuple[str, int]:
        asked.append(address)
        raise OSError

    provider = AwsProvider(key=key, resolve=resolve, sleep=lambda _: None)
    with pytest.raises(ProviderUnavailableError):
        provider.wrap(bytes(32), BINDING, Deadline(20))
    assert set(asked) == {(host, 443)}


def test_all_of_it_goes_through_the_proxy(deployment: Deployment, aws_credentials: Credentials) -> None:
    port = deployment.aws.ports[0]
    proxy = ConnectProxy({f"{KMS}:443": port, f"{STS}:443": port})
    try:
        deployment.wrap(role=ROLE, proxy=Proxy("127.0.0.1", proxy.port))
        assert [request.partition(" HTTP")[0] for request in proxy.requests] == [
            f"CONNECT {STS}:443",
            f"CONNECT {KMS}:443",
        ]
    finally:
        proxy.close()


def test_metadata_does_not_go_through_the_proxy(deployment: Deployment) -> None:
    proxy = ConnectProxy({f"{KMS}:443": deployment.aws.ports[0]})
    deployment.aws.absent.remove(INSTANCE)
    try:
        deployment.wrap(proxy=Proxy("127.0.0.1", proxy.port))
        assert len(proxy.requests) == 1
    finally:
        proxy.close()


# --- Rights, as far as moto goes -------------------------------------------------------------------------------------


@contextmanager
def checked(aws: Aws) -> Iterator[None]:
    """Have moto verify signatures and look into the policies of users; it does not look into conditions and keys."""
    url = f"http://127.0.0.1:{aws.moto.port}/moto-api/reset-auth"
    post(url, data=b"0", timeout=20)
    try:
        yield
    finally:
        post(url, data=b"inf", timeout=20)


def become_user(aws: Aws, monkeypatch: pytest.MonkeyPatch, *actions: str) -> None:
    """Take on the credentials of a user who may do some actions."""
    name = f"user-{secrets.token_hex(4)}"
    statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    aws.iam.create_user(UserName=name)
    aws.iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=policy)
    made = aws.iam.create_access_key(UserName=name)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made["SecretAccessKey"])


def test_encrypt_and_decrypt_are_all_the_rights_it_needs(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_user(deployment.aws, monkeypatch, "kms:Encrypt", "kms:Decrypt")
    with checked(deployment.aws):
        assert deployment.unwrap(deployment.wrap()) == deployment.data_key


def test_a_boot_needs_the_right_to_unwrap_only(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    become_user(deployment.aws, monkeypatch, "kms:Decrypt")
    wrapped = deployment.wrap()
    with checked(deployment.aws):
        assert deployment.unwrap(wrapped) == deployment.data_key
        # Moto words this as IAM does and not as KMS, so the error is not the one that a denial has.
        with pytest.raises(ProviderError):
            deployment.wrap()


def test_a_wrong_secret_does_not_sign(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    become_user(deployment.aws, monkeypatch, "kms:Encrypt", "kms:Decrypt")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with checked(deployment.aws), pytest.raises(ProviderError):
        deployment.wrap()


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "",
        "1234abcd-12ab-34cd-56ef-1234567890ab",
        "alias/kravn",
        "arn:aws:kms:eu-central-1:111122223333:alias/kravn",
        UNUSED_KEY + "\n",
        UNUSED_KEY + "/",
        " " + UNUSED_KEY,
        UNUSED_KEY.upper(),
        UNUSED_KEY.replace("arn:aws:", "arn:aws-mars:"),
        UNUSED_KEY.replace(":kms:", ":s3:"),
        UNUSED_KEY.replace("eu-central-1", ""),
        UNUSED_KEY.replace("eu-central-1", "*"),
        UNUSED_KEY.replace("eu-central-1", "x.example/eu-central-1"),
        UNUSED_KEY.replace("111122223333", ""),
        UNUSED_KEY.replace("111122223333", "11112222333\u0663"),
        UNUSED_KEY.replace("1234abcd", "1234abc"),
        UNUSED_KEY.replace("1234abcd", "1234abcg"),
        UNUSED_KEY.replace("1234abcd-", "mrk-1234abcd-"),
        MULTI_REGION_KEY[:-1],
    ],
)
def test_a_key_that_is_no_arn_of_one(key: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_AWS_KEY"):
        AwsProvider(key=key)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://kms.eu-central-1.amazonaws.com",
        "kms.eu-central-1.amazonaws.com",
        "https://",
        "https://user@kms.example",
        "https://kms.example/path",
        "https://kms.example?x",
        "https://kms.example\n",
        "https://kms.example:0",
        "https://kms.example:65536",
        "https://-kms.example",
    ],
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_AWS_ENDPOINT"):
        AwsProvider(key=UNUSED_KEY, endpoint=endpoint)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("profile", ""),
        ("profile", "a\nb"),
        ("profile", "a]"),
        ("role", ""),
        ("role", "kravn"),
        ("role", "arn:aws:iam::123456789012:user/kravn"),
        ("role", "arn:aws:iam::12345678901:role/kravn"),
        ("role", "arn:aws:iam::123456789012:role/"),
        ("role", ROLE + "\n"),
        ("external_id", ""),
        ("external_id", "a"),
        ("external_id", "a b"),
        ("external_id", "a" * 1225),
    ],
)
def test_a_way_to_log_in_that_is_none(setting: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"KRAVN_KMS_AWS_{setting.upper()}"):
        AwsProvider(**{"key": UNUSED_KEY, "role": ROLE, setting: value})  # type: ignore[arg-type]


def test_an_external_id_needs_a_role() -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_AWS_ROLE"):
        AwsProvider(key=UNUSED_KEY, external_id="kravn:42")


def test_a_ca_bundle_that_is_none(aws_home: Path) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_AWS_CA_BUNDLE"):
        AwsProvider(key=UNUSED_KEY, ca_bundle=aws_home / "nothing")


def test_it_says_which_key_it_has_and_stays_in_its_process() -> None:
    it = AwsProvider(key=UNUSED_KEY)
    assert repr(it) == f"<AwsProvider {UNUSED_KEY}>"
    with pytest.raises(TypeError):
        pickle.dumps(it)


@pytest.mark.parametrize("missing", ["botocore", "botocore.credentials", "requests"])
def test_a_missing_package_names_the_extra(missing: str) -> None:
    program = f"""
import sys
sys.modules[{missing!r}] = None
from sqlalchemy_kravn_crypto.exceptions import MissingExtraError
try:
    import sqlalchemy_kravn_crypto.providers.aws
except MissingExtraError as error:
    assert error.__context__ is None and error.__cause__ is None
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "pip install 'sqlalchemy-kravn-crypto[aws]'" in ran.stdout


# --- docs/kms-aws.md -------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "kms-aws.md").read_text(encoding="utf-8")


def documents() -> list[dict[str, Any]]:
    """Return the policies that the page writes to files."""
    return [json.loads(text) for text in re.findall(r"<<EOF\n(.*?)\nEOF\n", PAGE, flags=re.DOTALL)]


def test_the_page_shows_the_encryption_context_that_is_sent() -> None:
    [shown] = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    example = json.loads(shown)
    assert encryption_context(binding("default", example["deployment"], bytes.fromhex(example["key-id"]))) == example


def test_the_policies_of_the_page_go_by_the_encryption_context_that_is_sent() -> None:
    key_policy, *_ = documents()
    context = encryption_context(BINDING)
    for statement in key_policy["Statement"][1:]:
        for name, value in statement["Condition"]["StringEquals"].items():
            part = name.removeprefix("kms:EncryptionContext:")
            assert value in {context[part], "$KRAVN_DEPLOYMENT_ID"}


def test_the_policies_of_the_page_allow_programs_no_more_than_is_needed() -> None:
    key_policy, _, endpoint_policy = documents()
    administration, making, booting = (statement["Action"] for statement in key_policy["Statement"])
    assert making == endpoint_policy["Statement"][0]["Action"] == ["kms:Encrypt", "kms:Decrypt"]
    assert booting == "kms:Decrypt"
    assert set(making).isdisjoint(administration)
