"""Programs that the tests need and a machine may not have, from Debian's packages: by root, where there is apt-get."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from filelock import FileLock

from tests.processes import UnavailableError, run

_INSTALL_TIMEOUT: Final = 300.0
_INSTALL: Final = ("install", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120")
# Where an ordinary user's PATH does not lead.
_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def program(name: str) -> str:
    """Return where a program is, and nothing if it is nowhere."""
    return shutil.which(name, path=_PATH) or ""


def installer(missing: str, packages: Sequence[str]) -> str:
    """Return the program that can install the packages which have what is missing.

    :raises UnavailableError: if there is none for this user.
    """
    found = program("apt-get")
    if not found:
        raise UnavailableError(f"There is no {missing} here, and no apt-get to install {', '.join(packages)} with.")
    if os.geteuid() != 0:
        raise UnavailableError(f"There is no {missing} here, and only root can install {', '.join(packages)}.")
    return found


def to_be_installed(missing: str, packages: Sequence[str]) -> str:
    """Say from which packages what is missing will come.

    :raises UnavailableError: as :func:`installer` does.
    """
    return f"to be installed from {', '.join(packages)} with {installer(missing, packages)}"


def ensure(missing: Callable[[], str], packages: Sequence[str]) -> None:
    """Install packages if something is missing.

    :param missing: tells what, and returns an empty text if nothing is.
    :raises UnavailableError: if it is missing still.
    """
    if not missing():
        return
    # Workers that need something come at once.
    with FileLock(Path(tempfile.gettempdir(), f"kravn-crypto-packages-{os.getuid()}.lock")):
        if not (wanted := missing()):
            return
        command = installer(wanted, packages)
        for arguments in (("update", "-qq"), (*_INSTALL, *packages)):
            run([command, *arguments], timeout=_INSTALL_TIMEOUT, environment={"DEBIAN_FRONTEND": "noninteractive"})
        if wanted := missing():
            raise UnavailableError(f"{', '.join(packages)} are installed, but there is no {wanted}.")
