"""What is fuzzed: a plain function for every parser, what it may raise, and valid inputs to begin with.

The first bytes of most inputs say how much of the structure is right. What follows them may be taken as it is, or go
where a mutation at random would hardly ever get: into the payload of a frame under the right key, into a row that is
authenticated again, behind the headers of an answer over HTTP.
"""

from __future__ import annotations

from . import answers, files, logins, rows, values
from .target import TARGETS, FindingError, Target, check, prepared

__all__ = ["TARGETS", "FindingError", "Target", "answers", "check", "files", "logins", "prepared", "rows", "values"]
