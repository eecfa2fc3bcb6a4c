"""The command line: which commands there are."""

from __future__ import annotations

import logging
from collections.abc import Callable

import typer

from .commands import doctor, keys, reports, setup, standby, values
from .commands.running import reporting

app = typer.Typer(
    name="kravn-crypto",
    help="Encrypted SQLAlchemy columns whose data key is wrapped by your own key manager.",
    no_args_is_help=True,
    add_completion=False,
    # Typer's own traceback shows the local variables of every frame, secrets included.
    pretty_exceptions_enable=False,
)

_standby = typer.Typer(
    help="A second KMS that can unwrap the same data keys.", no_args_is_help=True, pretty_exceptions_enable=False
)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()


def _add(to: typer.Typer, name: str, command: Callable[..., int], panel: str | None = None) -> None:
    to.command(name, rich_help_panel=panel)(reporting(command))


_add(app, "migrate", setup.migrate, "To begin with")
_add(app, "provision", setup.provision, "To begin with")
_add(app, "demo", setup.demo, "To begin with")
_add(app, "doctor", doctor.doctor, "What there is")
_add(app, "status", reports.status, "What there is")
_add(app, "census", values.census, "What there is")
_add(app, "evidence", reports.evidence, "What there is")
_add(app, "rotate", keys.rotate, "The life of a data key")
_add(app, "promote", keys.promote, "The life of a data key")
_add(app, "rekey", values.rekey, "The life of a data key")
_add(app, "disable", keys.disable, "The life of a data key")
_add(app, "enable", keys.enable, "The life of a data key")
_add(app, "destroy", keys.destroy, "The life of a data key")
_add(app, "forget-column", values.forget_column, "The life of a data key")
_add(app, "rewrap", keys.rewrap, "Master keys and secrets")
app.add_typer(_standby, name="standby", rich_help_panel="Master keys and secrets")
_add(_standby, "add", standby.add)
_add(_standby, "switch", standby.switch)
_add(_standby, "remove", standby.remove)
_add(app, "rotate-secret", keys.rotate_secret, "Master keys and secrets")
