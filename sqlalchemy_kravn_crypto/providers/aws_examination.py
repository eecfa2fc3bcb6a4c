"""What a configuration for AWS KMS is worth: the way there, and of what sort the credentials are.

Whether AWS accepts them shows when a key is wrapped. What else they allow, AWS tells only to those who have rights in
IAM, so that is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC

from ..exceptions import ProviderError, ProviderUnavailableError
from .aws_login import NAME, AwsLogin, CredentialSort
from .base import Deadline, Finding
from .findings import CREDENTIALS, REACHABILITY, RIGHTS, bad, good, unchecked, warning
from .inspection import Server, inspect_server
from .transport import Route


@dataclass(frozen=True, slots=True)
class ExaminedAws:
    """A provider's configuration, as it is examined.

    :ivar server: the endpoint of KMS.
    :ivar route: how it is reached.
    :ivar login: what finds the credentials.
    :ivar role: the ARN of the role to assume with them, if any.
    """

    server: Server
    route: Route
    login: AwsLogin
    role: str | None


def examine_aws(aws: ExaminedAws, deadline: Deadline) -> Iterator[Finding]:
    """Examine it. Nothing is changed."""
    yield from inspect_server(aws.server, deadline, NAME, aws.route)
    sort = _sort(aws, deadline)
    if isinstance(sort, ProviderError):
        yield bad(REACHABILITY if isinstance(sort, ProviderUnavailableError) else CREDENTIALS, str(sort))
        return
    yield from _credentials(sort)
    if aws.role is not None:
        yield good(CREDENTIALS, f"The role {aws.role} can be assumed.")
    yield unchecked(
        RIGHTS,
        "what else these credentials allow, which AWS tells only to those who have rights in IAM.",
        "They should allow kms:Encrypt and kms:Decrypt on the key, and nothing else. See with: aws iam "
        "simulate-principal-policy, or the IAM Access Analyzer.",
    )


def _sort(aws: ExaminedAws, deadline: Deadline) -> CredentialSort | ProviderError:
    try:
        return aws.login.sort(deadline)
    except ProviderError as error:
        return error


def _credentials(sort: CredentialSort) -> Iterator[Finding]:
    if not sort.is_temporary:
        yield warning(
            CREDENTIALS,
            f"The credentials are an access key that never ends (found by: {sort.method}).",
            "Give the process a role: of its pod, its task or its instance.",
        )
    elif sort.ends is None:
        yield unchecked(
            CREDENTIALS,
            f"until when the session token is valid, which was set from outside (found by: {sort.method}).",
            "Nothing renews it in a process that runs. Give the process a role.",
        )
    else:
        until = f"{sort.ends.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        message = f"The credentials are temporary, until {until}, and are had anew each time (found by: {sort.method})."
        yield good(CREDENTIALS, message)
