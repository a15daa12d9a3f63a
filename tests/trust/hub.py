"""As much of a model hub as `snapshot_download` asks for, serving one folder on this machine."""

import hashlib
import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments, folder: Path, token: str | None, gated: bool) -> None:
        self.folder, self.token, self.gated = folder, token, gated
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        is_known = self.headers.get("Authorization") == f"Bearer {self.token}"
        # Everybody may look at the page of a gated model, and nobody at a private one.
        is_open = self.token is None or (self.gated and "/resolve/" not in path)
        if not is_known and not is_open:
            self._refuse()
            return
        names = sorted(file.name for file in self.folder.iterdir())
        headers, status = {}, 200
        if "/resolve/" in path:
            name = path.rsplit("/", 1)[1]
            if name not in names:
                self.send_error(404)
                return
            body = (self.folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if wanted := self.headers.get("Range"):
                first = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                body, status = body[first:], 206
        elif "/tree/" in path:
            files = [self.folder / name for name in names]
            body = json.dumps(
                [
                    {
                        "type": "file",
                        "path": file.name,
                        "size": file.stat().st_size,
                        "oid": "0" * 40,
                    }
                    for file in files
                ]
            ).encode()
        else:
            siblings = [{"rfilename": name} for name in names]
            body = json.dumps({"id": "tiny/model", "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _refuse(self) -> None:
        self.send_response(403 if self.headers.get("Authorization") else 401)
        self.send_header("X-Error-Code", "GatedRepo" if self.gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that are killed in the middle of an answer are what this server is for."""


def hub_of(
    folder: Path, port: int, token: str | None = None, gated: bool = False
) -> ThreadingHTTPServer:
    """A server of this folder's files, as the model `tiny/model`.

    With a token the model is private, or gated, and only served to who sends that token.
    """
    handler = partial(_Hub, folder=folder, token=token, gated=gated)
    return _Server(("127.0.0.1", port), handler)
