"""As much of a model hub as reading and publishing ask for, with one folder on this machine."""

import base64
import hashlib
import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40
TOKEN = "hf_" + "t" * 34
"""The token that the fixture `hub` of `tests/conftest.py` takes."""


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments, folder: Path, token: str | None, gated: bool) -> None:
        self.folder, self.token, self.gated = folder, token, gated
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        """Making a repository, and a commit: small files in it, large ones (LFS) before it."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
            return
        if self.token is None or self.headers.get("Authorization") != f"Bearer {self.token}":
            self._refuse()
        elif self.path == "/api/repos/create":
            (self.folder / ".created.json").write_bytes(body)
            self._reply({"url": f"{self._address}/tiny/model"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            modes_of = {name: modes[name.endswith((".safetensors", ".gguf"))] for name in names}
            self._reply(
                {
                    "files": [
                        {"path": name, "uploadMode": mode, "shouldIgnore": False}
                        for name, mode in modes_of.items()
                    ]
                }
            )
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self._address}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
            url = f"{self._address}/tiny/model/commit/{COMMIT}"
            self._reply({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.send_error(404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        (self.folder / f".lfs-{self.path.rpartition('/')[2]}").write_bytes(content)
        self._reply({})

    def _commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                (self.folder / value["path"]).write_bytes(content)
            elif line["key"] == "lfsFile":
                (self.folder / f".lfs-{value['oid']}").rename(self.folder / value["path"])

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _reply(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

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
