"""Flask-SQLAlchemy.

pip install flask-sqlalchemy
KRAVN_SECRET=$(openssl rand -hex 32) flask --app examples/with_flask.py run
curl localhost:5000/plugins/weather --json '{"token": "s3cr3t"}'
"""

import os
from typing import Any

from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, kms_tables


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


class Plugin(db.Model):  # type: ignore[name-defined, misc] # made at run time
    name: Mapped[str] = mapped_column(primary_key=True)
    credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


kms_tables(db.metadata)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ.get("DATABASE_URL", "sqlite:///example.db")
    db.init_app(app)
    with app.app_context():
        db.create_all()  # or migrations; `kravn-crypto migrate` makes the key tables
        configure(db.engine)  # a process that cannot have the keys does not start

    @app.post("/plugins/<name>")
    def write(name: str) -> tuple[str, int]:
        db.session.add(Plugin(name=name, credentials=request.get_json()))
        db.session.commit()
        return "", 201

    @app.get("/plugins/<name>")
    def read(name: str) -> dict[str, Any]:
        # What a client may see is chosen here: the names of the credentials, not their values.
        return {"name": name, "credentials": sorted(db.get_or_404(Plugin, name).credentials)}

    return app
