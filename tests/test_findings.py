"""How findings are put into words: lengths of time, ends of validity, clocks that are apart."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from sqlalchemy_kravn_crypto.providers.base import Finding, Level
from sqlalchemy_kravn_crypto.providers.findings import (
    bad,
    clocks_apart,
    good,
    span,
    unchecked,
    valid_until,
    validity_of,
    warning,
)

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY = timedelta(days=1)


def test_the_levels() -> None:
    assert good("a", "b") == Finding("a", Level.GOOD, "b", "")
    assert warning("a", "b", "c") == Finding("a", Level.WARNING, "b", "c")
    assert bad("a", "b", "c") == Finding("a", Level.BAD, "b", "c")
    assert unchecked("a", "why.", "c") == Finding("a", Level.WARNING, "Not checked: why.", "c")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (1.9, "1 second"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7199, "119 minutes"),
        (7200, "2 hours"),
        (172_799, "47 hours"),
        (172_800, "2 days"),
        (86_400 * 1000, "1000 days"),
    ],
)
def test_a_length_of_time(seconds: float, text: str) -> None:
    assert span(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    ("left", "lifetime", "level"),
    [
        (15 * DAY, None, Level.GOOD),
        (14 * DAY, None, Level.GOOD),
        (14 * DAY - timedelta(seconds=1), None, Level.WARNING),
        (timedelta(seconds=1), None, Level.WARNING),
        (timedelta(), None, Level.BAD),
        (-DAY, None, Level.BAD),
        # What is long-lived is warned of as early, what is short-lived not all the time.
        (13 * DAY, 365 * DAY, Level.WARNING),
        (15 * DAY, 365 * DAY, Level.GOOD),
        (timedelta(minutes=21), timedelta(hours=1), Level.GOOD),
        (timedelta(minutes=19), timedelta(hours=1), Level.WARNING),
        (-DAY, timedelta(hours=1), Level.BAD),
    ],
)
def test_until_when_something_is_valid(left: timedelta, lifetime: timedelta | None, level: Level) -> None:
    end = NOW + left
    validity = None if lifetime is None else end - lifetime, end
    finding = valid_until("tls", "It", validity, advice="Renew it.", now=NOW)
    assert finding.level is level
    assert f"{NOW + left:%Y-%m-%d %H:%M} UTC" in finding.message
    assert finding.advice == ("" if level is Level.GOOD else "Renew it.")
    assert ("has expired" in finding.message) is (level is Level.BAD)


@pytest.mark.parametrize(
    ("claims", "validity"),
    [
        ({}, None),
        ({"iat": 1}, None),
        ({"exp": 60}, (None, datetime(1970, 1, 1, 0, 1, tzinfo=UTC))),
        ({"exp": 60.5, "iat": 1}, (datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), datetime.fromtimestamp(60.5, UTC))),
        ({"exp": 60, "iat": 61}, (None, datetime(1970, 1, 1, 0, 1, tzinfo=UTC))),
        ({"exp": "60"}, None),
        ({"exp": -1}, None),
        ({"exp": float("nan")}, None),
        ({"exp": float("inf")}, None),
        ({"exp": 10**400}, None),
        ({"exp": 60, "iat": [1]}, (None, datetime(1970, 1, 1, 0, 1, tzinfo=UTC))),
    ],
)
def test_from_when_until_when_a_jwt_says_that_it_is_valid(
    claims: dict[str, object], validity: tuple[datetime | None, datetime] | None
) -> None:
    assert validity_of(claims) == validity


@pytest.mark.parametrize(
    ("there", "level", "words"),
    [
        (0, Level.GOOD, "less than 60 seconds"),
        (59, Level.GOOD, "less than 60 seconds"),
        (60, Level.WARNING, "60 seconds behind"),
        (299, Level.WARNING, "4 minutes behind"),
        (300, Level.BAD, "5 minutes behind"),
        (-60, Level.GOOD, "less than 60 seconds"),  # what it showed has no fractions of a second
        (-61, Level.WARNING, "60 seconds ahead of"),
        (-300, Level.WARNING, "4 minutes ahead of"),
        (-301, Level.BAD, "5 minutes ahead of"),
        (-86_400 * 365, Level.BAD, "364 days ahead of"),
    ],
)
def test_how_far_two_clocks_are_apart(there: float, level: Level, words: str) -> None:
    finding = clocks_apart(NOW + timedelta(seconds=there), "the Vault", before=NOW, after=NOW)
    assert finding.level is level
    assert words in finding.message
    assert "the Vault" in finding.message


def test_how_long_an_answer_took_is_not_for_the_clock_to_answer() -> None:
    after = NOW + timedelta(seconds=100)
    for moment in (NOW, NOW + timedelta(seconds=50), after):
        assert clocks_apart(moment, "the Vault", before=NOW, after=after).level is Level.GOOD
    assert clocks_apart(after + timedelta(seconds=60), "it", before=NOW, after=after).level is Level.WARNING
    assert clocks_apart(NOW - timedelta(seconds=61), "it", before=NOW, after=after).level is Level.WARNING
