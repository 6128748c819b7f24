"""A Hugging Face Hub on this machine, for tests with the real client over real HTTP.

    with HubServer(tokens={'hf_writer': 'user'}) as hub:
        done = run_python(hub, 'from huggingface_hub import ...; ...', tmp_path)
        assert done.returncode == 0, done.stderr
        assert hub.files('user/model')['config.json'] == b'{}'

The client reads its environment when it is imported, so it belongs into a process of its own:
`run_python`, or any command with `env=hub.environment(folder)`. Each folder is a fresh cache.

What it speaks is what huggingface_hub 2.4 asks of the Hub for models: whoami, create_repo,
repo_exists, model_info, list_repo_tree, get_paths_info, create_branch, the check of a card,
create_commit and upload_folder (also as a pull request), hf_hub_download and snapshot_download. As
on the Hub:

- A repository starts with a commit of .gitattributes. Its branches and pull requests
  (`refs/pr/1`) point to commits, a commit has its parent and files, and nothing moves before a
  whole and valid request has come. A commit that changes nothing is none.
- Text goes into the commit's request. Weights, other binary files and files from 10 MB on go by
  LFS: batch and PUT. They come back through a redirect. Both lead to another host (the same server
  under another name), which must never see a token.
- A user may write only below the own name, and propose pull requests elsewhere. Read-only tokens do
  neither. Who may not see a private repository gets the same answer as for one that does not exist:
  401 without a token, 404 with one. An unknown token is refused everywhere.

Not here: Xet (the client must run with HF_HUB_DISABLE_XET), data sets and spaces, names without a
user, long lists in pages, downloads of a part, .gitignore.

A test makes requests go wrong by `hub.fail`, looks at `hub.requests`, and puts what it needs into
the Hub by `hub.create` and `hub.commit`, without a client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

LFS_SUFFIXES = ('.bin', '.npy', '.npz', '.onnx', '.pt', '.pth', '.safetensors', '.zip')
LFS_SIZE = 10_000_000
GITATTRIBUTES = ''.join(f'*{s} filter=lfs diff=lfs merge=lfs -text\n' for s in LFS_SUFFIXES)
INVALID_TOKEN = 'Invalid credentials in Authorization header'
# What can go wrong besides an answer with another status, and for which methods.
FAULTS = {
    'drop request': ('POST', 'PUT'),
    'drop answer': ('GET', 'POST'),
    'truncate': ('GET', 'POST'),
    'wrong size': ('HEAD',),
    'damage': ('GET',),
}


# What a repository holds


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git itself keeps of an LFS file."""
        version = 'version https://git-lfs.github.com/spec/v1'
        return f'{version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n'.encode()

    @cached_property
    def blob(self) -> str:
        """git's name for it."""
        content = self.pointer if self.lfs else self.content
        return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


@dataclass(frozen=True)
class Commit:
    parent: Commit | None
    message: str
    files: dict[str, File]

    @cached_property
    def id(self) -> str:
        blobs = sorted((path, file.blob) for path, file in self.files.items())
        text = repr((self.parent and self.parent.id, self.message, blobs))
        return hashlib.sha1(text.encode()).hexdigest()

    @property
    def history(self) -> list[Commit]:
        """Itself and what came before, newest first."""
        return [self, *(self.parent.history if self.parent else [])]


@dataclass
class Repository:
    private: bool
    refs: dict[str, Commit]  # by branch name or 'refs/pr/1'
    uploads: dict[str, bytes] = field(default_factory=dict)  # what came by LFS, by its sha256

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a pull request or an id."""
        commits = {commit.id: commit for head in self.refs.values() for commit in head.history}
        commit = self.refs.get(revision) or commits.get(revision)
        if commit is None:
            raise Refusal(404, f'Invalid rev id: {revision}', code='RevisionNotFound')
        return commit

    def commit(self, ref: str, parent: Commit, message: str, files: dict[str, File]) -> str:
        changed = files != parent.files
        self.refs[ref] = Commit(parent, message, files) if changed else parent
        return self.refs[ref].id


# What comes and goes


@dataclass
class Request:
    """What came. `status` is what was answered, None as long as nothing was."""

    method: str
    path: str  # still quoted, without the query
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes = b''
    status: int | None = None

    @property
    def token(self) -> str | None:
        """What the Authorization header held, None if there was none."""
        header = self.headers.get('Authorization')
        return header and header.removeprefix('Bearer ')

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]


class Refusal(Exception):
    def __init__(self, status: int, message: str, *, code: str = '', **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def answer(self, request: Request) -> Answer:
        # At an https address the client takes every such 401 for a repository that it cannot see;
        # at an http address only with this code.
        hidden = self.status == 401 and self.message != INVALID_TOKEN
        if hidden and re.match('/api/models/|.*/resolve/', request.path):
            self.code = 'RepoNotFound'
        headers = {'X-Error-Message': self.message, 'X-Error-Code': self.code, **self.headers}
        return _json({'error': self.message}, self.status, **headers)


def _json(value, status=200, **headers):
    headers = {'Content-Type': 'application/json', **headers}
    return Answer(status, json.dumps(value).encode(), headers)


@dataclass
class Fault:
    """What `HubServer.fail` asked for."""

    method: str
    path: str
    kind: str | int
    times: int | None
    headers: Mapping[str, str]
    count: int = 0

    def meets(self, request: Request) -> bool:
        left = self.times is None or self.count < self.times
        return left and self.method == request.method and bool(re.search(self.path, request.path))


class HubServer:
    """See the module's docstring.

    Args:
        tokens: the user's name for each token that may read and write.
        read_only: the same for tokens that may only read.
    """

    def __init__(self, tokens: Mapping[str, str], read_only: Mapping[str, str] = {}) -> None:
        self.users = {**tokens, **read_only}
        self.read_only = read_only
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []  # this server's own; leaving the block raises them
        self.lock = threading.RLock()
        self._server = _Server(self)
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        self.storage = f'http://localhost:{self._server.server_port}/storage'

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self.errors:
            raise RuntimeError('The loopback Hub has a bug.') from self.errors[0]
        for fault in self.faults:
            if not fault.count and kind is None:
                raise RuntimeError(f'No request met {fault}.')

    def close(self) -> None:
        """From now on there is no Hub at this address."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, folder: Path, **changes: str) -> dict[str, str]:
        """All variables for a process that takes this server for the Hub.

        There the waits of the client between two attempts are cut to 10 ms.

        Args:
            folder: where the cache goes, made if it does not exist.
            **changes: set above the rest. HF_TOKEN is the server's first token; give '' for none.
        """
        site = folder / 'site'
        site.mkdir(parents=True, exist_ok=True)
        (site / 'sitecustomize.py').write_text(
            'import time\nsleep = time.sleep\ntime.sleep = lambda s: sleep(min(s, 0.01))\n'
        )
        outside = re.compile(r'HF_|HUGGING_?FACE|TRANSFORMERS_|XDG_CACHE|.*_PROXY$', re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not outside.match(name)}
        return {
            **kept,
            'PYTHONPATH': f'{site}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'.strip(os.pathsep),
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(folder / 'hf'),
            'HF_TOKEN': next(iter(self.users)),
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'HF_HUB_ETAG_TIMEOUT': '5',
            'HF_HUB_DOWNLOAD_TIMEOUT': '5',
            **changes,
        }

    def fail(
        self, method: str, path: str, kind: str | int, *, times: int | None = 1, **headers: str
    ) -> None:
        """Let the next requests of this method go wrong whose path the regular expression finds.

        LFS files come and go by a path with /storage/; the download's ends with the file's name.
        Leaving the server's block is an error if no request met the fault.

        Args:
            method: 'GET', 'HEAD', 'POST' or 'PUT'.
            path: searched in the quoted path, without the query.
            kind: a status: the answer, and the request is not obeyed;
                'drop request': the connection breaks in the middle of reading the body;
                'drop answer': the request is obeyed, and the connection breaks in the middle of the
                answer; 'truncate': the answer ends there, in good order;
                'wrong size': a HEAD announces one byte more than there is;
                'damage': one byte of the answer differs.
            times: how many requests; None for all to come.
            **headers: of an answer with a status, such as `**{'Retry-After': '1'}`.
        """
        if isinstance(kind, str) and method not in FAULTS[kind]:
            raise ValueError(f'{kind!r} befalls only {" and ".join(FAULTS[kind])}, not {method}.')
        self.faults.append(Fault(method, path, kind, times, headers))

    def seen(self, method: str, path: str) -> list[Request]:
        """The requests of this method whose quoted path the regular expression finds."""
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    def create(self, repo_id: str, *, private: bool = False) -> None:
        first = Commit(None, 'initial commit', {'.gitattributes': File(GITATTRIBUTES.encode())})
        self.repositories[repo_id] = Repository(private, {'main': first})

    def commit(self, repo_id: str, files: Mapping[str, bytes], *, revision: str = 'main') -> str:
        """Add or replace files, and return the commit's id."""
        with self.lock:
            repository = self.repositories[repo_id]
            head = repository.refs[revision]
            new = {path: File(data, _goes_by_lfs(path, data)) for path, data in files.items()}
            repository.uploads.update({f.sha256: f.content for f in new.values() if f.lfs})
            return repository.commit(revision, head, 'by the test', {**head.files, **new})

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        files = self.repositories[repo_id].find(revision).files
        return {path: file.content for path, file in files.items()}

    def history(self, repo_id: str, revision: str = 'main') -> list[Commit]:
        """The commits, newest first. The last one is the Hub's own."""
        return self.repositories[repo_id].find(revision).history

    # What the routes ask

    def user(self, request: Request) -> str | None:
        if request.token and request.token not in self.users:
            raise Refusal(401, INVALID_TOKEN)
        return request.token and self.users[request.token]

    def writer(self, request: Request) -> str:
        user = self.user(request)
        if user is None:
            raise Refusal(401, 'Invalid username or password.')
        if request.token in self.read_only:
            raise Refusal(403, 'Authorization error.')
        return user

    def readable(self, request: Request, repo_id: str) -> Repository:
        user, repository = self.user(request), self.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split('/')[0]):
            raise Refusal(404 if user else 401, 'Repository not found', code='RepoNotFound')
        return repository

    def writable(self, request: Request, repo_id: str, *, pull: bool = False) -> Repository:
        repository = self.readable(request, repo_id)
        if self.writer(request) != repo_id.split('/')[0] and not pull:
            raise Refusal(403, 'Authorization error.')
        return repository

    def answer(self, request: Request) -> Answer:
        for methods, pattern, function in _ROUTES:
            if request.method in methods and (match := pattern.fullmatch(request.path)):
                groups = {name: unquote(value) for name, value in match.groupdict().items()}
                return function(self, request, **groups)
        raise Refusal(404, f'This Hub does not know {request.method} {request.path}.')


# The routes, in the order of the client's work. Each takes the server, the request and, unquoted,
# the named parts of the path, and returns an Answer.

_ROUTES: list[tuple[str, re.Pattern[str], Any]] = []


def _route(methods, pattern):
    """{name} is one part of the quoted path, {repo} has one slash, {path} as many as it likes."""
    parts = {'repo': '[^/]+/[^/]+', 'path': '.+'}
    compiled = re.sub(r'{(\w+)}', lambda m: f'(?P<{m[1]}>{parts.get(m[1], "[^/]+")})', pattern)

    def register(function):
        _ROUTES.append((methods, re.compile(compiled), function))
        return function

    return register


@_route('GET', '/api/whoami-v2')
def _whoami(hub, request):
    user = hub.user(request)
    if user is None:
        raise Refusal(401, 'Invalid username or password.')
    return _json({'type': 'user', 'name': user, 'fullname': user, 'orgs': []})


@_route('POST', '/api/repos/create')
def _create_repo(hub, request):
    user, value = hub.writer(request), request.json
    owner = value['organization'] or user
    if owner != user:
        message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
        raise Refusal(403, message)
    repo_id = f'{owner}/{value["name"]}'
    answer = {'url': f'{hub.url}/{repo_id}', 'name': repo_id}
    if repo_id in hub.repositories:
        return _json({'error': 'You already created this model repo', **answer}, 409)
    hub.create(repo_id, private=value.get('visibility') == 'private')
    return _json(answer)


@_route('POST', '/api/validate-yaml')
def _validate_card(hub, request):
    content, found = request.json['content'], {'errors': [], 'warnings': []}
    if REGEX_YAML_BLOCK.search(content):
        try:
            base_model = ModelCard(content).data.base_model or []
            for name in [base_model] if isinstance(base_model, str) else base_model:
                validate_repo_id(name)
        except (ValueError, yaml.YAMLError) as error:
            found['errors'].append({'message': str(error)})
    else:
        found['warnings'].append({'message': 'empty or missing yaml metadata in repo card'})
    return _json(found, 400 if found['errors'] else 200)


@_route('POST', '/api/models/{repo}/branch/{branch}')
def _create_branch(hub, request, repo, branch):
    repository = hub.writable(request, repo)
    start = repository.find(request.json.get('startingPoint', 'main'))
    if branch in repository.refs:
        raise Refusal(409, 'Reference already exists')
    repository.refs[branch] = start
    return _json({})


@_route('POST', '/api/models/{repo}/preupload/{revision}')
def _preupload(hub, request, repo, revision):
    """How to send each file. By the `oid` of what is there the client leaves out equal ones."""
    head = hub.writable(request, repo, pull='create_pr' in request.query).find(revision)
    files = []
    for file in request.json['files']:
        there = head.files.get(file['path'])
        by_lfs = _goes_by_lfs(file['path'], base64.b64decode(file['sample']), file['size'])
        mode = {'uploadMode': 'lfs' if by_lfs else 'regular', 'shouldIgnore': False}
        files.append({'path': file['path'], 'oid': there.etag if there else None, **mode})
    return _json({'files': files})


@_route('POST', '/{repo}.git/info/lfs/objects/batch')
def _lfs_batch(hub, request, repo):
    """Where to send what is not there yet. For a pull request the client names no revision."""
    repository = hub.writable(request, repo, pull='ref' not in request.json)
    objects = request.json['objects']
    for asked in objects:
        if asked['oid'] not in repository.uploads:
            asked['actions'] = {'upload': {'href': f'{hub.storage}/{repo}/{asked["oid"]}'}}
    return _json({'transfer': 'basic', 'objects': objects})


@_route('PUT', '/storage/{repo}/{sha256}')
def _lfs_upload(hub, request, repo, sha256):
    if hashlib.sha256(request.body).hexdigest() != sha256:
        raise Refusal(400, 'The content does not have the sha256 that was announced.')
    hub.repositories[repo].uploads[sha256] = request.body
    return Answer(200, b'', {})


@_route('POST', '/api/models/{repo}/commit/{revision}')
def _commit(hub, request, repo, revision):
    pull = 'create_pr' in request.query
    repository = hub.writable(request, repo, pull=pull)
    head = repository.find(revision)
    try:
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        message, parent = header['value']['summary'], header['value'].get('parentCommit', head.id)
        files = dict(head.files)
        for operation in operations:
            _apply(files, repository, operation['key'], operation['value'])
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(400, f'Invalid commit: {error!r}') from error
    if parent != head.id or (revision not in repository.refs and not pull):
        raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
    number = 1 + sum(name.startswith('refs/pr/') for name in repository.refs)
    new = repository.commit(f'refs/pr/{number}' if pull else revision, head, message, files)
    answer = {'commitOid': new, 'commitUrl': f'{hub.url}/{repo}/commit/{new}'}
    return _json({**answer, 'pullRequestUrl': f'{hub.url}/{repo}/discussions/{number}'})


def _apply(files, repository, key, value):
    path = PurePosixPath(value['path'])
    if path.is_absolute() or '..' in path.parts:
        raise ValueError(f'{path} leaves the repository')
    if key == 'file':
        files[str(path)] = File(base64.b64decode(value['content'], validate=True))
    elif key == 'lfsFile':
        files[str(path)] = File(repository.uploads[value['oid']], lfs=True)
    elif key in ('deletedFile', 'deletedFolder'):
        gone = [p for p in files if p == str(path) or path in PurePosixPath(p).parents]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", code='EntryNotFound')
        for name in gone:
            del files[name]
    else:
        raise ValueError(f'unknown operation {key}')


def _goes_by_lfs(path, sample, size=0):
    return path.endswith(LFS_SUFFIXES) or b'\0' in sample or max(size, len(sample)) >= LFS_SIZE


@_route('GET', '/api/models/{repo}')
@_route('GET', '/api/models/{repo}/revision/{revision}')
def _model_info(hub, request, repo, revision='main'):
    repository = hub.readable(request, repo)
    commit = repository.find(revision)
    siblings = [{'rfilename': path} for path in sorted(commit.files)]
    info = {'id': repo, 'author': repo.split('/')[0], 'sha': commit.id, 'siblings': siblings}
    return _json({**info, 'private': repository.private, 'gated': False, 'disabled': False})


@_route('GET', '/api/models/{repo}/tree/{revision}')
@_route('GET', '/api/models/{repo}/tree/{revision}/{path}')
def _tree(hub, request, repo, revision, path='.'):
    entries = _entries(hub.readable(request, repo).find(revision))
    if path != '.' and path not in entries:
        raise Refusal(404, f'{path} does not exist on "{revision}"', code='EntryNotFound')
    depth = None if request.query.get('recursive') == ['true'] else 1
    parents = {name: [*map(str, PurePosixPath(name).parents)][:depth] for name in entries}
    return _json([entry for name, entry in entries.items() if path in parents[name]])


@_route('POST', '/api/models/{repo}/paths-info/{revision}')
def _paths_info(hub, request, repo, revision):
    entries = _entries(hub.readable(request, repo).find(revision))
    paths = parse_qs(request.body.decode()).get('paths', [])
    return _json([entries[path] for path in paths if path in entries])


def _entries(commit):
    """What is listed for each file and folder, by its path."""
    entries = {}
    for path, file in sorted(commit.files.items()):
        size = len(file.content)
        entries[path] = {'type': 'file', 'path': path, 'size': size, 'oid': file.blob}
        if file.lfs:
            lfs = {'oid': file.sha256, 'size': size, 'pointerSize': len(file.pointer)}
            entries[path]['lfs'] = lfs
        for folder in map(str, PurePosixPath(path).parents[:-1]):
            oid = hashlib.sha1(f'{commit.id} {folder}'.encode()).hexdigest()
            entries[folder] = {'type': 'directory', 'path': folder, 'size': 0, 'oid': oid}
    return entries


@_route('HEAD GET', '/{repo}/resolve/{revision}/{path}')
def _resolve(hub, request, repo, revision, path):
    commit = hub.readable(request, repo).find(revision)
    file, headers = commit.files.get(path), {'X-Repo-Commit': commit.id}
    if file is None:
        raise Refusal(404, 'Entry not found', code='EntryNotFound', **headers)
    headers['ETag'] = f'"{file.etag}"'
    if not file.lfs:
        return Answer(200, file.content, headers)
    headers |= {'X-Linked-ETag': headers['ETag'], 'X-Linked-Size': str(len(file.content))}
    headers['Location'] = f'{hub.storage}/{repo}/{file.sha256}/{quote(path)}'
    return Answer(302, b'Found. Redirecting', headers)


@_route('HEAD GET', '/storage/{repo}/{sha256}/{path}')
def _lfs_download(hub, request, repo, sha256, path):
    return Answer(200, hub.repositories[repo].uploads[sha256], {'ETag': f'"{sha256}"'})


# HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub):
        self.hub = hub
        super().__init__(('127.0.0.1', 0), _Handler)

    def handle_error(self, *_):
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.errors.append(sys.exception())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _handle(self):
        hub, address = self.server.hub, urlsplit(self.path)
        request = Request(self.command, address.path, parse_qs(address.query), self.headers)
        with hub.lock:
            hub.requests.append(request)
            fault = next((fault for fault in hub.faults if fault.meets(request)), None)
            if fault is not None:
                fault.count += 1
        kind = fault and fault.kind
        length = int(self.headers.get('Content-Length', 0))
        if kind == 'drop request':
            self.rfile.read(length // 2)
            return self._break()
        request.body = self.rfile.read(length)
        if len(request.body) < length:
            raise ConnectionAbortedError
        try:
            if isinstance(kind, int):
                raise Refusal(kind, 'A fault for this test.', **fault.headers)
            with hub.lock:
                answer = hub.answer(request)
        except Refusal as refusal:
            answer = refusal.answer(request)
        self._send(request, answer, kind)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, request, answer, kind):
        body, middle = answer.body, len(answer.body) // 2
        headers = {**answer.headers, 'Content-Length': str(len(body))}
        if kind == 'wrong size':
            for name in headers.keys() & {'Content-Length', 'X-Linked-Size'}:
                headers[name] = str(int(headers[name]) + 1)
        if kind == 'damage':
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if kind in ('drop answer', 'truncate'):
            body, self.close_connection = body[:middle], True
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != 'HEAD':
            self.wfile.write(body)
        if kind == 'drop answer':
            self._break()

    def _break(self):
        """Close as a crash would: the client gets a reset, not an end."""
        self.close_connection = True
        linger = struct.pack('ii', 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


def run_python(
    hub: HubServer, script: str, folder: Path, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with `hub.environment(folder, **changes)`."""
    return subprocess.run(
        [sys.executable, '-c', script],
        env=hub.environment(folder, **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )
