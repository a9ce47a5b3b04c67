"""A stand-in for the hub on the loopback: it serves repositories and takes commits, and counts every request."""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Files = Mapping[str, bytes]

_CODES = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403}


class RefusedError(Exception):
    """Of a request: the hub's own code for it, or the HTTP status."""


class HubServer:
    """Serves what is published, until it is closed.

    `private` names repositories that want the token; `gated` ones show their list and no file, as on the hub.
    """

    TOKEN = "hf_sesame"

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        """By method and path."""
        self.messages: list[str] = []
        """Of the commits that were taken."""
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.failing = 0
        """A status that every request is answered with."""
        self.stalls = threading.Event()
        """Set when a request for `stall_at` has come; it is answered by halves and then not at all."""
        self.stall_at: str | None = None
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self._branches: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._closing = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator["HubServer"]:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """From now on nothing listens there."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """For processes that use this hub, and keep what they download in `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": "", "HF_HUB_CACHE": str(home / "hub")}

    def publish(self, name: str, files: Files | Path, branch: str = "main") -> str:
        """Commit files, or those of a folder, to a branch; returns the commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._commits.setdefault(name, {})[commit] = dict(files)
        self._branches[name, branch] = commit
        return commit

    def fetched(self, method: str = "GET") -> Counter[str]:
        """How often the content of each file was sent, by repository and name."""
        found: Counter[str] = Counter()
        for (asked, path), count in self.requests.items():
            if asked == method and "/resolve/" in path:
                name, _, rest = path.strip("/").partition("/resolve/")
                found[f"{name}/{rest.partition('/')[2]}"] += count
        return found

    def _answer(self, path: str, token: str | None) -> tuple[bytes, dict[str, str]]:
        if self.failing:
            raise RefusedError(str(self.failing))
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            name, kind, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
            name = name if parts[1] == "models" else f"datasets/{name}"
            self._check(name, token)
            commit = self._commit(name, revision)
            files = self._commits[name][commit]
            told = {
                "id": "/".join(parts[2:4]),
                "sha": commit,
                "siblings": [{"rfilename": file} for file in files],
                "private": name in self.private,
                "cardData": _card_data(files),
            }
            return json.dumps([_entry(*item) for item in files.items()] if kind == "tree" else told).encode(), {}
        is_dataset = parts[0] == "datasets"
        if parts[2 + is_dataset : 3 + is_dataset] != ["resolve"]:  # huggingface_hub asks for other things, too
            raise RefusedError("404")
        name, (revision, *path_parts) = "/".join(parts[: 2 + is_dataset]), parts[3 + is_dataset :]
        file = "/".join(path_parts)
        self._check(name, token)
        if name in self.gated:
            raise RefusedError("GatedRepo")
        commit = self._commit(name, revision)
        content = self._commits[name][commit].get(file)
        if content is None:
            raise RefusedError("EntryNotFound")
        return content, {"ETag": f'"{_etag(file, content)}"', "X-Repo-Commit": commit}

    def _take(self, path: str, body: bytes, token: str | None) -> bytes:
        """Create a data set, say how its files are to be sent (all in the commit itself), or commit."""
        if token != f"Bearer {self.TOKEN}":
            raise RefusedError("401")
        parts = path.strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return json.dumps({"errors": [], "warnings": []}).encode()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['type']}s/{asked['organization']}/{asked['name']}"
            created = json.dumps({"url": f"{self.endpoint}/{name}"}).encode()
            if name in self._commits:
                raise RefusedError("409", created)
            self.publish(name, {})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.private.add(name)
            return created
        name, what, branch = "/".join(parts[1:4]), *parts[4:6]
        self._check(name, token)
        if what == "preupload":
            files = [one["path"] for one in json.loads(body)["files"]]
            told: dict[str, Any] = {
                "files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
            return json.dumps(told).encode()
        if what != "commit":
            raise RefusedError("404")
        kept = dict(self._commits[name][self._commit(name, branch)])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del kept[line["value"]["path"]]
            else:
                self.messages.append(line["value"]["summary"])
        commit = self.publish(name, kept, branch)
        return json.dumps({"commitUrl": f"{self.endpoint}/{name}/commit/{commit}", "commitOid": commit}).encode()

    def files(self, name: str) -> Files:
        """What the branch main of a repository has."""
        return self._commits[name][self._branches[name, "main"]]

    def _check(self, name: str, token: str | None) -> None:
        if token not in (None, f"Bearer {self.TOKEN}"):
            raise RefusedError("401")
        if name not in self._commits or (name in self.private and token is None):
            raise RefusedError("RepoNotFound")

    def _commit(self, name: str, revision: str) -> str:
        revision = unquote(revision)
        commit = revision if revision in self._commits[name] else self._branches.get((name, revision))
        if commit is None:
            raise RefusedError("RevisionNotFound")
        return commit

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                with hub._lock:
                    hub.requests[self.command, path] += 1
                if hub._closing.is_set():  # on a connection that was kept open
                    self.close_connection = True
                    return
                try:
                    content, headers = hub._answer(path, self.headers.get("Authorization"))
                except RefusedError as refused:
                    self._refuse(str(refused))
                    return
                self.send_response(200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if hub.stall_at and path.endswith(hub.stall_at):
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                    hub.stalls.set()
                    hub._closing.wait()
                    self.close_connection = True
                    return
                self.wfile.write(content)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                path = urlsplit(self.path).path
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with hub._lock:
                    hub.requests[self.command, path] += 1
                    try:
                        content = hub._take(path, body, self.headers.get("Authorization"))
                    except RefusedError as refused:
                        self._refuse(*refused.args)
                        return
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _refuse(self, reason: str, content: bytes = b"") -> None:
                self.send_response(_CODES.get(reason) or int(reason))
                if reason in _CODES:
                    self.send_header("X-Error-Code", reason)
                elif reason == "401":
                    self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        return Handler


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": _etag(name, content), "size": len(content), "pointerSize": 134}
    return entry


def _card_data(files: Files) -> Any:
    """The head of the card, as the hub shows it."""
    text = files.get("README.md", b"").decode()
    return yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None


def _etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else _git_id(content)


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
