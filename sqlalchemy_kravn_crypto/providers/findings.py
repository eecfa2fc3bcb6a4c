"""How what is found out about a configuration is put into words, the same for every KMS."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from .base import Finding, Level

REACHABILITY: Final = "reachability"
TLS: Final = "tls"
CLOCK: Final = "clock"
CREDENTIALS: Final = "credentials"
RIGHTS: Final = "rights"

NOTICE: Final = timedelta(days=14)
"""How long before its end something that people renew is warned of."""

CLOCK_WARNING: Final = timedelta(seconds=60)
CLOCK_BAD: Final = timedelta(seconds=300)
"""How far two clocks may be apart: from here on signed requests and tokens are refused."""

Validity = tuple[datetime | None, datetime]
"""When something begins to be valid, if that is known, and when it ends."""

_LAST_MOMENT: Final = datetime(9000, 1, 1, tzinfo=UTC).timestamp()
_SECOND: Final = timedelta(seconds=1)  # the times that are compared have no fractions


def good(subject: str, message: str) -> Finding:
    """Find that something is as it should be."""
    return Finding(subject, Level.GOOD, message)


def warning(subject: str, message: str, advice: str = "") -> Finding:
    """Find that something works, and should be otherwise."""
    return Finding(subject, Level.WARNING, message, advice)


def bad(subject: str, message: str, advice: str = "") -> Finding:
    """Find that something does not work, or is dangerous."""
    return Finding(subject, Level.BAD, message, advice)


def unchecked(subject: str, reason: str, advice: str = "") -> Finding:
    """Find that something could not be found out."""
    return warning(subject, f"Not checked: {reason}", advice)


def utc_now() -> datetime:
    """Return the time of this machine."""
    return datetime.now(UTC)


def span(length: timedelta) -> str:
    """Return a length of time in the largest unit that it has two of, such as ``36 hours``; seconds at the least."""
    seconds = int(length.total_seconds())
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} second{'' if seconds == 1 else 's'}"


def valid_until(subject: str, what: str, validity: Validity, *, advice: str, now: datetime | None = None) -> Finding:
    """Find how long something lasts: good, a warning when its end is near, bad when it is over.

    What is short-lived is renewed all the time, and warned of in the last third only.

    :param what: what ends, as a sentence begins.
    :param advice: what to do about it.
    """
    start, end = validity
    left = end - (now or utc_now())
    moment = f"{end.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    if left <= timedelta():
        return bad(subject, f"{what} has expired, at {moment}.", advice)
    message = f"{what} is valid until {moment}, for {span(left)}."
    is_near = left < (NOTICE if start is None else min(NOTICE, (end - start) / 3))
    return warning(subject, message, advice) if is_near else good(subject, message)


def validity_of(claims: Mapping[str, object]) -> Validity | None:
    """Return from when until when something says that it is valid, with ``iat`` and ``exp`` as a JWT does."""
    start, end = (_moment(claims.get(name)) for name in ("iat", "exp"))
    if end is None:
        return None
    return (None if start is None or start > end else start), end


def _moment(seconds: object) -> datetime | None:
    if not isinstance(seconds, int | float) or not 0 <= seconds < _LAST_MOMENT:
        return None
    return datetime.fromtimestamp(seconds, UTC)


def clocks_apart(there: datetime, whose: str, *, before: datetime, after: datetime) -> Finding:
    """Find how far another clock is from this machine's.

    :param there: what it showed, to the second.
    :param whose: whose it is.
    :param before: when it was asked.
    :param after: when the answer was here.
    """
    earliest, latest = before - _SECOND, after
    ahead, behind = there - latest, earliest - there
    apart = max(ahead, behind, timedelta())
    if apart < CLOCK_WARNING:
        return good(CLOCK, f"This machine's clock is less than {span(CLOCK_WARNING)} from that of {whose}.")
    message = f"This machine's clock is {span(apart)} {'behind' if ahead > behind else 'ahead of'} that of {whose}."
    advice = "Correct it (NTP): signed requests, tokens and certificates are refused when clocks are apart."
    return (warning if apart < CLOCK_BAD else bad)(CLOCK, message, advice)
