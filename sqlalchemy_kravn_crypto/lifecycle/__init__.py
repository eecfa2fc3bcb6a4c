"""The life of a key, as plain functions; the command line calls the same."""

from .evidence import evidence, forget_column, record_census
from .rekeying import rekey_values
from .retirement import Targets, destroy, disable, enable
from .rewrapping import Rewrapped, add_standby, remove_standby, rewrap, switch_to_standby
from .rotation import promote, rotate, rotate_secret

__all__ = [
    "Rewrapped",
    "Targets",
    "add_standby",
    "destroy",
    "disable",
    "enable",
    "evidence",
    "forget_column",
    "promote",
    "record_census",
    "rekey_values",
    "remove_standby",
    "rewrap",
    "rotate",
    "rotate_secret",
    "switch_to_standby",
]
