"""A hub on this machine: folders as repositories, served as `huggingface_hub` asks for them.

`HF_ENDPOINT` is read when that library is imported, so tests/conftest.py sets it to a port that refuses connections,
and `Hub` listens on it. Tests that do not start one have no network.
"""

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

ADDRESS = re.compile(
    r"/(?:(api)/)?(?:(datasets|models)/)?([^/]+/[^/]+)(?:/(resolve|revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
)
_RESERVED: list[socket.socket] = []


def reserve_endpoint() -> None:
    """Name a port in `HF_ENDPOINT` that nobody else can take, and that refuses connections."""
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    _RESERVED.append(reserved)
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{reserved.getsockname()[1]}"


class Repository(NamedTuple):
    """A repository: its files lie in `folder`, and each state of them that is asked for is a commit.

    `branches`: the files of those beside main. `refusal`: the status and the code of the error for all who have not
    this `token`.
    """

    folder: Path
    commits: dict[str, dict[str, bytes]]
    branches: dict[str, dict[str, bytes]]
    refusal: tuple[int, str] | None = None
    token: str | None = None

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files; None if there is no such revision."""
        if revision in self.commits:
            return revision, self.commits[revision]
        if revision not in ("main", *self.branches):
            return None
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        files = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}
        files = self.branches.get(revision, files)
        commit = hashlib.sha1(repr(files).encode()).hexdigest()
        return commit, self.commits.setdefault(commit, files)


class Hub:
    """A hub that serves while it is entered; `asked` has the method and path of every request.

    Args:
        folder: Where the repositories lie.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []

    def add(self, name: str, files: dict[str, bytes] | None = None, **access: Any) -> Path:
        """Make a repository (`owner/name`, of a model or a data set), and return its folder; see `Repository`."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        for path, content in (files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        self.repositories[name] = Repository(folder, {}, {}, **access)
        return folder

    def downloads(self, file: str) -> int:
        """How often the content of a file was asked for."""
        return sum(asked.startswith("GET ") and asked.endswith(file) for asked in self.asked)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections for a while."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def __enter__(self) -> "Hub":
        port = int(os.environ["HF_ENDPOINT"].rpartition(":")[2])
        while _RESERVED:
            _RESERVED.pop().close()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub = self.server.hub  # type: ignore[attr-defined]
        address = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        hub.asked.append(f"{self.command} {unquote(address.path)}")
        found = ADDRESS.fullmatch(address.path)
        repository = found and hub.repositories.get(found[3])
        if not repository:
            return self._refuse(404, "RepoNotFound")
        if repository.refusal and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._refuse(*repository.refusal)
        state = repository.at(unquote(found[5] or "main"))
        if state is None:
            return self._refuse(404, "RevisionNotFound")
        commit, files = state
        file = unquote(found[6] or "")
        if found[4] == "resolve":
            if file not in files:
                return self._refuse(404, "EntryNotFound", commit)
            return self._send(files[file], commit)
        if found[4] == "tree":
            recursive = parse_qs(address.query).get("recursive") == ["true"]
            entries = _tree(files, file, recursive)
            return self._send_json(entries, commit) if entries else self._refuse(404, "EntryNotFound", commit)
        if found[4] == "paths-info":
            wanted = parse_qs(body).get("paths", [])
            return self._send_json([entry for entry in _tree(files, "", True) if entry["path"] in wanted], commit)
        siblings = [{"rfilename": name} for name in files]
        return self._send_json({"id": found[3], "sha": commit, "siblings": siblings, "tags": []}, commit)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: Any, commit: str) -> None:
        self._send(json.dumps(value).encode(), commit, "application/json")

    def _send(self, content: bytes, commit: str, kind: str = "application/octet-stream") -> None:
        etag = hashlib.sha1(content).hexdigest()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        self.send_response(206 if part else 200)
        if part:
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    """What lies in a folder of a repository."""
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for count in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:count])
            entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            entries[path] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
    return list(entries.values())
