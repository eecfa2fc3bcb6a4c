"""The one thing that Vault asks of a Kubernetes API server: to review the token of a service account."""

from __future__ import annotations

import json
import secrets
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

ISSUER = "https://kubernetes.default.svc.cluster.local"
_REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"


class KubernetesAPI:
    """Issues tokens to the pods of service accounts, and reviews them over TLS, as Kubernetes does.

    :param certificate: a PEM file with a certificate for ``localhost`` and its private key.
    """

    def __init__(self, certificate: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._pods: set[str] = set()
        self.reviewer = self.issue("vault-auth", "vault", audience=ISSUER)
        """The token of the one service account that may have others reviewed."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.api = self  # type: ignore[attr-defined]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def issue(self, account: str, namespace: str, *, audience: str = "vault", lifetime: float = 600) -> str:
        """Return what a new pod of a service account finds in its token file.

        :param lifetime: after how many seconds the token expires.
        """
        now = time.time()
        pod = secrets.token_hex(4)
        self._pods.add(pod)
        claims = {
            "iss": ISSUER,
            "sub": f"system:serviceaccount:{namespace}:{account}",
            "aud": [audience],
            "iat": int(now) - 1,
            "nbf": int(now) - 1,
            "exp": int(now + lifetime),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": {"name": account, "uid": f"uid-{namespace}-{account}"},
                "pod": {"name": pod, "uid": pod},
            },
        }
        return jwt.encode(claims, self._key, algorithm="ES256")

    def delete_pods(self) -> None:
        """Delete all pods, and with them their tokens."""
        self._pods.clear()

    def review(self, token: str, audiences: list[str]) -> dict[str, Any]:
        """Return the status of a TokenReview."""
        try:
            claims = jwt.decode(
                token, self._key.public_key(), algorithms=["ES256"], audience=audiences or [ISSUER], issuer=ISSUER
            )
        except jwt.InvalidTokenError:
            return {"error": "[invalid bearer token]"}
        bound = claims["kubernetes.io"]
        if bound["pod"]["uid"] not in self._pods:
            return {"error": "[invalid bearer token, pod has been deleted]"}
        namespace, account = bound["namespace"], bound["serviceaccount"]
        return {
            "authenticated": True,
            "user": {
                "username": f"system:serviceaccount:{namespace}:{account['name']}",
                "uid": account["uid"],
                "groups": ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"],
            },
            "audiences": audiences or [ISSUER],
        }

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        api: KubernetesAPI = self.server.api  # type: ignore[attr-defined]
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != _REVIEWS:
            self._answer(404, {"kind": "Status", "code": 404})
        elif self.headers["Authorization"] != f"Bearer {api.reviewer}":
            self._answer(403, {"kind": "Status", "code": 403, "reason": "Forbidden"})
        else:
            status = api.review(asked["spec"]["token"], asked["spec"].get("audiences", []))
            self._answer(201, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the output of the tests clean."""
