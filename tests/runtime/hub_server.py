"""The endpoints of the Hugging Face hub that huggingface_hub calls to push and to fetch, in memory and on this machine."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_for_this_test"  # noqa: S105


class Hub(ThreadingHTTPServer):
    """Repositories in memory: commits of whole trees, branches, large files by their hash."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repo -> sha -> path -> content
        self.branches: dict[str, dict[str, str]] = {}  # repo -> branch -> sha
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.errors: dict[str, tuple[int, str, str]] = {}  # path -> status, X-Error-Code, message
        self.lfs = False

    def tree(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[repo][self.branches[repo].get(revision, revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets, and the second would wait for an answer to the first
    server: Hub

    def log_message(self, *_):
        """Quiet."""

    def answer(self, value=None, status=200, content=None, **headers):
        body = content if content is not None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code="", message="no"):
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def do(self):
        length = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(length), unquote(urlsplit(self.path).path)
        hub = self.server
        hub.calls.append((self.command, path))
        for prefix, refusal in hub.errors.items():
            if path.startswith(prefix):
                return self.refuse(*refusal)
        for pattern, action in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.refuse(401, message="Invalid username or password.")
                return action(self, hub, body, *found.groups())
        return self.refuse(404, "RepoNotFound", f"{self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

    def create(self, hub, body):
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in hub.branches:
            return self.answer({"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}, 409)
        hub.private[repo] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        hub.branches[repo], hub.commits[repo] = {"main": "0" * 40}, {"0" * 40: {".gitattributes": b""}}
        return self.answer({"url": f"{hub.url}/{repo}"})

    def validate(self, hub, body):
        text = json.loads(body)["content"]
        assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "fewstep"
        self.answer({"errors": [], "warnings": []})

    def preupload(self, hub, body, repo, revision):
        def mode(path):
            return "lfs" if hub.lfs and path.endswith(".safetensors") else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in json.loads(body)["files"]]
        self.answer({"files": files})

    def batch(self, hub, body, repo):
        def uploading(entry):
            return {**entry, "actions": {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}}

        self.answer({"transfer": "basic", "objects": [uploading(entry) for entry in json.loads(body)["objects"]]})

    def put(self, hub, body, oid):
        hub.large[oid] = body
        self.answer({})

    def commit(self, hub, body, repo, revision):
        lines = [json.loads(line) for line in body.splitlines()]
        tree = dict(hub.tree(repo, revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                tree[value["path"]] = hub.large[value["oid"]]
        hub.messages.append(lines[0]["value"]["summary"])
        sha = hashlib.sha1(body).hexdigest()
        hub.commits[repo][sha], hub.branches[repo][revision] = tree, sha
        self.answer({"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def branch(self, hub, body, repo, name):
        if name in hub.branches[repo]:
            return self.refuse(409, message="Reference already exists")
        hub.branches[repo][name] = hub.branches[repo]["main"]
        return self.answer({})

    def info(self, hub, body, repo, revision=None):
        if repo not in hub.branches:
            return self.refuse(404, "RepoNotFound")
        sha = hub.branches[repo].get(revision or "main", revision)
        if sha not in hub.commits[repo]:
            return self.refuse(404, "RevisionNotFound")
        return self.answer({"id": repo, "sha": sha, "siblings": [{"rfilename": path} for path in hub.commits[repo][sha]]})

    def list(self, hub, body, repo, revision):
        def entry(path, data):
            return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

        self.answer([entry(path, data) for path, data in hub.tree(repo, revision).items()])

    def resolve(self, hub, body, repo, revision, path):
        data = hub.tree(repo, revision)[path]
        sha = hub.branches[repo].get(revision, revision)
        self.answer(content=data, X_Repo_Commit=sha, ETag=f'"{hashlib.sha1(data).hexdigest()}"')


REPO = "([^/ ]+/[^/ ]+)"
ROUTES = (
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate),
    (f"POST /api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    (f"POST /{REPO}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT /lfs/([0-9a-f]+)", Handler.put),
    (f"POST /api/models/{REPO}/commit/([^/]+)", Handler.commit),
    (f"POST /api/models/{REPO}/branch/([^/]+)", Handler.branch),
    (f"GET /api/models/{REPO}", Handler.info),
    (f"GET /api/models/{REPO}/revision/([^/]+)", Handler.info),
    (f"GET /api/models/{REPO}/tree/([^/]+)", Handler.list),
    (f"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
)
