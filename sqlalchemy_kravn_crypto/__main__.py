"""``python -m sqlalchemy_kravn_crypto``."""

from .cli import main

main()
