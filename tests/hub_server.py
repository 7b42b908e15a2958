"""A Hub on loopback: as much of the Hugging Face Hub's HTTP interface as pushing and loading a model needs.

State lives in memory; tests read and change it directly. Large files go up by Git LFS, for which the client needs
`HF_HUB_DISABLE_XET=1`, and come down, as on the real Hub, by a redirect to another host.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".model")


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]
    """Whole content of each path at this commit."""


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        history = self.branches.setdefault(branch, [])
        state = repr((len(history), title, sorted(files.items()))).encode()
        history.append(Commit(hashlib.sha1(state).hexdigest(), title, files))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for history in self.branches.values() for commit in history)
        return next((commit for commit in commits if commit.oid == revision), None)

    @property
    def head(self) -> Commit:
        return self.branches["main"][-1]

    @property
    def titles(self) -> list[str]:
        return [commit.title for commit in self.branches["main"]]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match, `METHOD path`.

    Kinds: a status code (the answer); "cut" (the connection breaks while the body is sent); "lost" (the request is
    carried out, the connection breaks before the answer).
    """

    request: str
    kind: int | str
    times: int = 1


class HubServer(ThreadingHTTPServer):
    """`users` maps a token to the names that it may write under, its own one first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users = {"good-token": ["someone", "org"], "other-token": ["other"], "read-token": []}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.leaked_tokens: list[str] = []
        """Requests to the storage host that carried a token; none should."""

    @cached_property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @cached_property
    def storage(self) -> str:
        return f"http://localhost:{self.server_port}/storage"

    def handle_error(self, request, client_address) -> None:
        """Clients of these tests go away in the middle of things; that is no news."""


class _Answer(Exception):
    def __init__(self, status: int, body: object = b"", code: str = "", message: str = "", **headers: str):
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if message:
            self.body, self.headers["X-Error-Message"] = json.dumps({"error": message}).encode(), message
        if code:
            self.headers["X-Error-Code"] = code


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        self.server.requests.append(line)
        faults = [fault for fault in self.server.faults if fault.times > 0 and re.fullmatch(fault.request, line)]
        kind = faults[0].kind if faults else None
        if faults:
            faults[0].times -= 1
        size = int(self.headers.get("Content-Length", 0))
        if kind == "cut":
            self.rfile.read(size // 2)
            self._break()
            return
        body = self._read_chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(size)
        try:
            if isinstance(kind, int):
                raise _Answer(kind, message="as the test wants it")
            self._route(line, parse_qs(url.query), body)
        except _Answer as answer:
            if kind == "lost":
                self._break()
                return
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.body)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _break(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().strip(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # Who may do what

    def _names(self) -> list[str] | None:
        """The names that the caller may write under; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.server.users:
            raise _Answer(401, message="Invalid credentials in Authorization header")
        return self.server.users[token]

    def _repository(self, name: str, write: bool = False) -> Repository:
        names, repository = self._names(), self.server.repositories.get(name)
        owns = names is not None and name.split("/")[0] in names
        if repository is None or repository.private and not owns:
            # Who asks without a token is not even told whether there is such a repository.
            raise _Answer(404 if names is not None else 401, code="RepoNotFound", message="Repository not found")
        if write and not owns:
            if names is None:
                raise _Answer(401, message="Invalid username or password.")
            raise _Answer(403, message=f"You don't have the rights to write to {name}")
        return repository

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise _Answer(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
        return commit

    # What there is

    def _route(self, line: str, query: dict[str, list[str]], body: bytes) -> None:
        for pattern, act in _ROUTES:
            match = re.fullmatch(pattern, line)
            if match:
                act(self, *match.groups(), query=query, body=body)
        raise _Answer(404, message=f"No route for {line}")

    def who(self, **_) -> None:
        names = self._names()
        if names is None:
            raise _Answer(401, message="Invalid username or password.")
        orgs = [{"name": name, "type": "org"} for name in names[1:]]
        raise _Answer(200, {"type": "user", "name": names[0] if names else "reader", "orgs": orgs})

    def create(self, body: bytes, **_) -> None:
        asked, names = json.loads(body), self._names()
        if names is None:
            raise _Answer(401, message="Invalid username or password.")
        owner = asked.get("organization") or (names or ["reader"])[0]
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{name}", "name": name}
        if owner not in names:
            raise _Answer(403, message=f"You don't have the rights to create a model under the namespace {owner!r}.")
        if name in self.server.repositories:
            raise _Answer(409, url)
        self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
        raise _Answer(200, url)

    def validate(self, body: bytes, **_) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(header.group(1)) if header else {}
        except yaml.YAMLError as error:
            raise _Answer(400, {"errors": [{"message": str(error)}], "warnings": []}) from error
        errors = [{"message": '"license" must be a string'}] if isinstance(data.get("license"), dict) else []
        raise _Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, name: str, revision: str | None, **_) -> None:
        repository = self._repository(name)
        commit = self._commit(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        raise _Answer(
            200, {"id": name, "sha": commit.oid, "private": repository.private, "tags": [], "siblings": siblings}
        )

    def tree(self, name: str, revision: str, folder: str | None, query: dict, **_) -> None:
        commit = self._commit(self._repository(name), revision)
        start = f"{folder}/" if folder else ""
        paths = [path for path in sorted(commit.files) if path.startswith(start)]
        if folder and not paths:
            raise _Answer(404, code="EntryNotFound", message=f"{folder} does not exist on {revision}")
        if query.get("recursive", ["false"])[0].lower() != "true":
            paths = [path for path in paths if "/" not in path[len(start) :]]
        raise _Answer(200, [_entry(path, commit.files[path]) for path in paths])

    def refs(self, name: str, **_) -> None:
        branches = self._repository(name).branches
        targets = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": h[-1].oid} for n, h in branches.items()]
        raise _Answer(200, {"branches": targets, "tags": [], "converts": []})

    def branch(self, name: str, branch: str, **_) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise _Answer(409, message="Reference already exists")
        repository.branches[branch] = list(repository.branches["main"])
        raise _Answer(200, {})

    def may(self, name: str, write: str | None, **_) -> None:
        self._repository(name, write=bool(write))
        raise _Answer(200, {})

    # Uploading

    def preupload(self, name: str, revision: str, body: bytes, **_) -> None:
        commit = self._commit(self._repository(name, write=True), revision)
        answer = []
        for file in json.loads(body)["files"]:
            path, there = file["path"], commit.files.get(file["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = None if there is None else _etag(path, there)
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise _Answer(200, {"files": answer})

    def batch(self, name: str, body: bytes, **_) -> None:
        self._repository(name, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            href, verify = f"{self.server.storage}/{asked['oid']}", f"{self.server.endpoint}/{name}.git/verify"
            is_new = asked["oid"] not in self.server.objects
            actions = {"actions": {"upload": {"href": href}, "verify": {"href": verify}}} if is_new else {}
            objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes, **_) -> None:
        self._note_token()
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Answer(400, message="The content is not what was announced")
        self.server.objects[oid] = body
        raise _Answer(200)

    def verify(self, name: str, body: bytes, **_) -> None:
        self._repository(name, write=True)
        asked = json.loads(body)
        is_whole = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
        raise _Answer(200 if is_whole else 404, {})

    def commit(self, name: str, branch: str, body: bytes, **_) -> None:
        repository = self._repository(name, write=True)
        parent = self._commit(repository, branch)
        files, title = dict(parent.files), ""
        for one in map(json.loads, body.splitlines()):
            key, value = one["key"], one["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", parent.oid) != parent.oid:
                    raise _Answer(412, message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise _Answer(400, message=f"{value['path']} was never uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                if value["path"] not in files:
                    raise _Answer(404, code="EntryNotFound", message="A file with this name doesn't exist")
                del files[value["path"]]
            else:
                raise _Answer(400, message=f"Unknown operation {key}")
        oid = repository.commit(branch, title, files).oid
        raise _Answer(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    # Downloading

    def resolve(self, name: str, revision: str, path: str, **_) -> None:
        commit = self._commit(self._repository(name), revision)
        here = {"X_Repo_Commit": commit.oid}
        if path not in commit.files:
            raise _Answer(404, code="EntryNotFound", message="Entry not found", **here)
        content = commit.files[path]
        etag = f'"{_etag(path, content)}"'
        if not path.endswith(LFS_SUFFIXES):
            raise _Answer(200, content, ETag=etag, **here)
        linked = {"X_Linked_Etag": etag, "X_Linked_Size": str(len(content)), "ETag": '"of-the-redirect"'}
        self.server.objects.setdefault(etag.strip('"'), content)
        raise _Answer(302, b"", Location=f"{self.server.storage}/" + etag.strip('"'), **linked, **here)

    def fetch(self, oid: str, **_) -> None:
        self._note_token()
        if oid not in self.server.objects:
            raise _Answer(403, b"<Error/>")
        raise _Answer(200, self.server.objects[oid], ETag='"of-the-storage"')

    def _note_token(self) -> None:
        if self.headers.get("Authorization"):
            self.server.leaked_tokens.append(self.path)


_NAME = r"([\w.-]+/[\w.-]+)"
_REVISION = r"([^/]+|refs/[^/]+/[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.who),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_NAME}(?:/revision/{_REVISION})?", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}(?:/(.+))?", _Handler.tree),
    (rf"GET /api/models/{_NAME}/refs", _Handler.refs),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (rf"GET /api/models/{_NAME}/auth-check(/write)?", _Handler.may),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"POST /{_NAME}\.git/verify", _Handler.verify),
    (r"PUT /storage/(\w+)", _Handler.store),
    (r"GET /storage/(\w+)", _Handler.fetch),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/{_REVISION}/(.+)", _Handler.resolve),
]


def _etag(path: str, content: bytes) -> str:
    """SHA-256 of a large file, Git's blob id of a small one."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _etag(path, content)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
    return entry


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()
