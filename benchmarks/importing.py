"""Run in a process of its own: the seconds of importing what the package stands on, and of importing it after that.

With ``list``, print nothing but the modules of ``cryptography`` that the package has loaded once it is imported.
"""

import sys
from importlib import import_module
from time import perf_counter


def main(cryptography_modules: list[str]) -> None:
    """Import both and print how long each took."""
    began = perf_counter()
    for name in ("sqlalchemy", "sqlalchemy.orm", *cryptography_modules):
        import_module(name)
    there = perf_counter()
    import_module("sqlalchemy_kravn_crypto")
    sys.stdout.write(f"{there - began} {perf_counter() - there}\n")


def show() -> None:
    """Print what of ``cryptography`` the package imports."""
    import_module("sqlalchemy_kravn_crypto")
    sys.stdout.write("\n".join(name for name in sys.modules if name.partition(".")[0] == "cryptography"))


if __name__ == "__main__":
    if sys.argv[1:] == ["list"]:
        show()
    else:
        main(sys.argv[1:])
