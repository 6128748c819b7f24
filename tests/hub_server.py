"""A Hugging Face Hub on this machine, for tests with the real client over real HTTP.

    with HubServer(tokens={'hf_writer': 'user'}) as hub:
        done = run_python(hub, 'from huggingface_hub import ...; ...', tmp_path)
        assert done.returncode == 0, done.stderr
        assert hub.files('user/model')['config.json'] == b'{}'

The client reads its environment when it is imported, so it belongs into a process of its own:
`run_python`, or any command with `env=hub.environment(folder)`. Each folder is a fresh cache. There
the waits of the client between two attempts are cut to 10 ms.

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
- A user may write only below the own name. `read_only` tokens may not write at all. Who may not see
  a private repository gets the same answer as for one that does not exist: 401 without a token, 404
  with one. An unknown token is refused everywhere.

Not here: Xet (the client must run with HF_HUB_DISABLE_XET), data sets and spaces, names without a
user, pages of long lists, .gitignore.

A test makes requests go wrong by `hub.fail`, looks at `hub.requests`, and puts what it needs into
the Hub by `hub.create` and `hub.commit`, without a client.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
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
# The kinds of faults besides a status, and the methods that each can befall.
FAULTS = {
    'drop request': ('POST', 'PUT'),
    'drop answer': ('GET', 'POST', 'PUT'),
    'truncate': ('GET', 'POST'),
    'wrong size': ('HEAD',),
    'damage': ('GET',),
}


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
        if revision in self.refs:
            return self.refs[revision]
        for head in self.refs.values():
            for commit in head.history:
                if commit.id == revision:
                    return commit
        raise Refusal(404, f'Invalid rev id: {revision}', code='RevisionNotFound')

    def commit(self, ref: str, parent: Commit, message: str, files: dict[str, File]) -> Commit:
        if files != parent.files:
            parent = Commit(parent, message, files)
        self.refs[ref] = parent
        return parent


@dataclass
class Fault:
    """What `HubServer.fail` asked for."""

    method: str
    path: str
    times: int | None
    kind: str | None
    status: int | None
    headers: Mapping[str, str]
    count: int = 0


@dataclass
class Request:
    """What came; `status` is what was answered, None as long as nothing was."""

    method: str
    path: str  # still quoted, without the query
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes = b''
    status: int | None = None

    @property
    def token(self) -> str | None:
        """What the Authorization header held; None if there was none."""
        header = self.headers.get('Authorization')
        return header and header.removeprefix('Bearer ')

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Refusal(400, f'Invalid JSON: {error}') from error


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]

    @classmethod
    def json(
        cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> Answer:
        headers = {'Content-Type': 'application/json', **(headers or {})}
        return cls(status, json.dumps(value).encode(), headers)


class Refusal(Exception):
    def __init__(self, status: int, message: str, *, code: str = '', **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = {name.replace('_', '-'): value for name, value in headers.items()}

    def answer(self, request: Request) -> Answer:
        code = self.code
        # For an https address the client takes each such 401 for a repository that it cannot see;
        # for an http address only with this code.
        on_repository = request.path.startswith('/api/models/') or '/resolve/' in request.path
        if self.status == 401 and on_repository and self.message != INVALID_TOKEN:
            code = code or 'RepoNotFound'
        headers = {'X-Error-Message': self.message, **({'X-Error-Code': code} if code else {})}
        return Answer.json({'error': self.message}, self.status, {**headers, **self.headers})


class HubServer:
    """See the module's docstring.

    Args:
        tokens: the user's name for each token that may read and write.
        read_only: the same for tokens that may only read.
    """

    def __init__(
        self, tokens: Mapping[str, str], *, read_only: Mapping[str, str] | None = None
    ) -> None:
        self.tokens = dict(tokens)
        self.read_only = dict(read_only or {})
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []  # this server's own; leaving the block raises them
        self.lock = threading.RLock()
        self._server = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self._server.hub = self
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        # Another host to the client, which must keep its token from it.
        self.storage = f'http://localhost:{self._server.server_port}/storage'
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True
        )

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self.errors:
            raise RuntimeError('The loopback Hub has a bug.') from self.errors[0]
        unused = [fault for fault in self.faults if not fault.count]
        if unused and kind is None:
            raise RuntimeError(f'No request met the fault {unused[0]}.')

    def close(self) -> None:
        """From now on there is no Hub at this address. Harmless if called twice."""
        self._server.shutdown()
        self._server.server_close()

    # What a test looks at and puts in

    def environment(
        self, folder: Path, *, token: str | None = 'the first', **changes: str
    ) -> dict[str, str]:
        """All variables for a process that takes this server for the Hub.

        Args:
            folder: where the cache goes, made if it does not exist.
            token: for HF_TOKEN; without it the first of the server's tokens, None for no token.
            **changes: set above the rest.
        """
        site = folder / 'site'
        site.mkdir(parents=True, exist_ok=True)
        (site / 'sitecustomize.py').write_text(
            'import time\nsleep = time.sleep\ntime.sleep = lambda s: sleep(min(s, 0.01))\n'
        )
        outside = re.compile(r'(?i)(HF_|HUGGING_?FACE|TRANSFORMERS_|XDG_CACHE|.*_PROXY$)')
        kept = {name: value for name, value in os.environ.items() if not outside.match(name)}
        python_path = [str(site), *filter(None, [kept.get('PYTHONPATH')])]
        if token == 'the first':
            token = next(iter(self.tokens))
        return {
            **kept,
            'PYTHONPATH': os.pathsep.join(python_path),
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(folder / 'hf'),
            **({'HF_TOKEN': token} if token else {}),
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'HF_HUB_ETAG_TIMEOUT': '5',
            'HF_HUB_DOWNLOAD_TIMEOUT': '5',
            **changes,
        }

    def fail(
        self,
        method: str,
        path: str,
        kind: str | None = None,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        times: int | None = 1,
    ) -> None:
        """Let the next requests of this method go wrong whose path the regular expression finds.

        LFS files come and go by a path with /storage/; the download's ends with the file's name.
        Leaving the server's block is an error if no request met the fault.

        Args:
            method: 'GET', 'HEAD', 'POST' or 'PUT'.
            path: searched in the quoted path, without the query.
            kind: 'drop request': the connection breaks in the middle of reading the body;
                'drop answer': the request is obeyed, and the connection breaks in the middle of the
                answer; 'truncate': it ends there, in good order; 'wrong size': a HEAD announces one
                byte more than there is; 'damage': one byte of the answer differs.
            status: or an answer with this status. The request is not obeyed.
            headers: of that answer, such as `{'Retry-After': '1'}`.
            times: how many requests; None for all to come.
        """
        if (kind is None) == (status is None):
            raise ValueError('Give either a kind of fault or a status.')
        if kind is not None and method not in FAULTS[kind]:
            raise ValueError(f'{kind!r} befalls only {" and ".join(FAULTS[kind])}, not {method}.')
        self.faults.append(Fault(method, path, times, kind, status, headers or {}))

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
            return repository.commit(revision, head, 'by the test', {**head.files, **new}).id

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        files = self.repositories[repo_id].find(revision).files
        return {path: file.content for path, file in files.items()}

    def history(self, repo_id: str, revision: str = 'main') -> list[Commit]:
        """The commits, newest first. The last one is the Hub's own."""
        return self.repositories[repo_id].find(revision).history

    # What the routes ask

    def user(self, request: Request) -> str | None:
        token = request.token
        if token is not None and token not in self.tokens and token not in self.read_only:
            raise Refusal(401, INVALID_TOKEN)
        return token and (self.tokens.get(token) or self.read_only[token])

    def readable(self, request: Request, repo_id: str) -> Repository:
        user = self.user(request)
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split('/')[0]):
            raise Refusal(404 if user else 401, 'Repository not found', code='RepoNotFound')
        return repository

    def writable(self, request: Request, repo_id: str, *, pull: bool = False) -> Repository:
        """A pull request may come from anyone who can write somewhere and read here."""
        repository = self.readable(request, repo_id)
        if request.token is None:
            raise Refusal(401, 'Invalid username or password.')
        owner = self.user(request) == repo_id.split('/')[0]
        if request.token in self.read_only or not (owner or pull):
            raise Refusal(403, 'Authorization error.')
        return repository

    def _fault_for(self, request: Request) -> Fault | None:
        for fault in self.faults:
            left = fault.times is None or fault.count < fault.times
            if left and fault.method == request.method and re.search(fault.path, request.path):
                fault.count += 1
                return fault
        return None

    def _answer(self, request: Request) -> Answer:
        for method, pattern, function in _ROUTES:
            if request.method in method.split('|') and (match := pattern.fullmatch(request.path)):
                groups = {name: unquote(value) for name, value in match.groupdict().items()}
                return function(self, request, **groups)
        raise Refusal(404, f'This Hub does not know {request.method} {request.path}.')


# The routes, in the order of the client's work

_Route = Callable[..., Answer]
_ROUTES: list[tuple[str, re.Pattern[str], _Route]] = []


def _route(method: str, pattern: str) -> Callable[[_Route], _Route]:
    """`{name}` in the pattern is one part of the quoted path; {repo} and {path} hold slashes."""
    parts = {'repo': '[^/]+/[^/]+', 'path': '.+'}
    compiled = re.sub(r'{(\w+)}', lambda m: f'(?P<{m[1]}>{parts.get(m[1], "[^/]+")})', pattern)

    def register(function: _Route) -> _Route:
        _ROUTES.append((method, re.compile(compiled), function))
        return function

    return register


@_route('GET', '/api/whoami-v2')
def _whoami(hub: HubServer, request: Request) -> Answer:
    user = hub.user(request)
    if user is None:
        raise Refusal(401, 'Invalid username or password.')
    role = 'read' if request.token in hub.read_only else 'write'
    auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': role}}
    return Answer.json({'type': 'user', 'name': user, 'fullname': user, 'orgs': [], 'auth': auth})


@_route('POST', '/api/repos/create')
def _create_repo(hub: HubServer, request: Request) -> Answer:
    user, value = hub.user(request), request.json
    owner = value.get('organization') or user
    if user is None:
        raise Refusal(401, 'Invalid username or password.')
    if request.token in hub.read_only or owner != user:
        message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
        raise Refusal(403, message)
    repo_id = f'{owner}/{value["name"]}'
    answer = {'url': f'{hub.url}/{repo_id}', 'name': repo_id}
    if repo_id in hub.repositories:
        return Answer.json({'error': 'You already created this model repo', **answer}, 409)
    hub.create(repo_id, private=value.get('visibility') == 'private')
    return Answer.json(answer)


@_route('POST', '/api/validate-yaml')
def _validate_card(hub: HubServer, request: Request) -> Answer:
    content = request.json['content']
    errors, warnings = [], []
    if REGEX_YAML_BLOCK.search(content):
        try:
            base_model = ModelCard(content).data.base_model or []
            for name in [base_model] if isinstance(base_model, str) else base_model:
                validate_repo_id(name)
        except (ValueError, yaml.YAMLError) as error:
            errors.append(str(error))
    else:
        warnings.append('empty or missing yaml metadata in repo card')
    found = {'errors': errors, 'warnings': warnings}
    found = {key: [{'message': message} for message in value] for key, value in found.items()}
    return Answer.json(found, 400 if errors else 200)


@_route('POST', '/api/models/{repo}/branch/{branch}')
def _create_branch(hub: HubServer, request: Request, repo: str, branch: str) -> Answer:
    repository = hub.writable(request, repo)
    start = repository.find((request.json or {}).get('startingPoint', 'main'))
    if branch in repository.refs:
        raise Refusal(409, 'Reference already exists')
    repository.refs[branch] = start
    return Answer.json({})


@_route('POST', '/api/models/{repo}/preupload/{revision}')
def _preupload(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    """How to send each file; the `oid` of what is there lets the client leave out equal ones."""
    head = hub.writable(request, repo, pull='create_pr' in request.query).find(revision)
    answer = []
    for file in request.json['files']:
        by_lfs = _goes_by_lfs(file['path'], base64.b64decode(file['sample']), file['size'])
        there = head.files.get(file['path'])
        oid = {'oid': there.etag} if there else {}
        mode = 'lfs' if by_lfs else 'regular'
        answer.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, **oid})
    return Answer.json({'files': answer})


@_route('POST', '/{repo}.git/info/lfs/objects/batch')
def _lfs_batch(hub: HubServer, request: Request, repo: str) -> Answer:
    repository = hub.writable(request, repo, pull='ref' not in request.json)
    objects = []
    for asked in request.json['objects']:
        actions = {'upload': {'href': f'{hub.storage}/{repo}/{asked["oid"]}'}}
        missing = asked['oid'] not in repository.uploads
        objects.append({**asked, **({'actions': actions} if missing else {})})
    return Answer.json({'transfer': 'basic', 'objects': objects})


@_route('PUT', '/storage/{repo}/{sha256}')
def _lfs_upload(hub: HubServer, request: Request, repo: str, sha256: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != sha256:
        raise Refusal(400, 'The content does not have the sha256 that was announced.')
    hub.repositories[repo].uploads[sha256] = request.body
    return Answer(200, b'', {})


@_route('POST', '/api/models/{repo}/commit/{revision}')
def _commit(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    pull = 'create_pr' in request.query
    repository = hub.writable(request, repo, pull=pull)
    head = repository.find(revision)
    if not pull and revision not in repository.refs:
        raise Refusal(400, f'{revision} is neither a branch nor a pull request.')
    try:
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if header['key'] != 'header':
            raise ValueError('the first line is not the header')
        files = dict(head.files)
        for operation in operations:
            _apply(files, repository, operation['key'], operation['value'])
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise Refusal(400, f'Invalid commit: {error!r}') from error
    if header['value'].get('parentCommit', head.id) != head.id:
        raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
    ref, answer = revision, {}
    if pull:
        number = 1 + sum(name.startswith('refs/pr/') for name in repository.refs)
        ref = f'refs/pr/{number}'
        answer = {'pullRequestUrl': f'{hub.url}/{repo}/discussions/{number}'}
    new = repository.commit(ref, head, header['value']['summary'], files)
    url = f'{hub.url}/{repo}/commit/{new.id}'
    return Answer.json({'success': True, 'commitOid': new.id, 'commitUrl': url, **answer})


def _apply(files: dict[str, File], repository: Repository, key: str, value: Any) -> None:
    path = PurePosixPath(value['path'])
    if path.is_absolute() or '..' in path.parts:
        raise ValueError(f'the path {path} leaves the repository')
    if key == 'file':
        files[str(path)] = File(base64.b64decode(value['content'], validate=True))
    elif key == 'lfsFile':
        content = repository.uploads[value['oid']]
        if value.get('size', len(content)) != len(content):
            raise ValueError(f'{path} has {len(content)} bytes')
        files[str(path)] = File(content, lfs=True)
    elif key in ('deletedFile', 'deletedFolder'):
        gone = [p for p in files if p == str(path) or path in PurePosixPath(p).parents]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", code='EntryNotFound')
        for name in gone:
            del files[name]
    else:
        raise ValueError(f'unknown operation {key}')


def _goes_by_lfs(path: str, sample: bytes, size: int = 0) -> bool:
    return path.endswith(LFS_SUFFIXES) or b'\0' in sample or max(size, len(sample)) >= LFS_SIZE


@_route('GET', '/api/models/{repo}')
@_route('GET', '/api/models/{repo}/revision/{revision}')
def _model_info(hub: HubServer, request: Request, repo: str, revision: str = 'main') -> Answer:
    repository = hub.readable(request, repo)
    commit = repository.find(revision)
    siblings = [{'rfilename': path} for path in sorted(commit.files)]
    info = {'id': repo, 'author': repo.split('/')[0], 'sha': commit.id, 'siblings': siblings}
    return Answer.json({**info, 'private': repository.private, 'gated': False, 'disabled': False})


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """What a tree lists for each file and folder."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        size = len(file.content)
        lfs = {'oid': file.sha256, 'size': size, 'pointerSize': len(file.pointer)}
        entry = {'type': 'file', 'path': path, 'size': size, 'oid': file.blob}
        entries[path] = entry | ({'lfs': lfs} if file.lfs else {})
        for folder in map(str, PurePosixPath(path).parents[:-1]):
            oid = hashlib.sha1(f'{commit.id} {folder}'.encode()).hexdigest()
            entries[folder] = {'type': 'directory', 'path': folder, 'size': 0, 'oid': oid}
    return entries


@_route('GET', '/api/models/{repo}/tree/{revision}')
@_route('GET', '/api/models/{repo}/tree/{revision}/{path}')
def _tree(hub: HubServer, request: Request, repo: str, revision: str, path: str = '.') -> Answer:
    entries = _entries(hub.readable(request, repo).find(revision))
    if path != '.' and path not in entries:
        raise Refusal(404, f'{path} does not exist on "{revision}"', code='EntryNotFound')
    deep = request.query.get('recursive') == ['true']
    listed = []
    for name, entry in entries.items():
        parents = list(map(str, PurePosixPath(name).parents))
        if path in (parents if deep else parents[:1]):
            listed.append(entry)
    return Answer.json(listed)


@_route('POST', '/api/models/{repo}/paths-info/{revision}')
def _paths_info(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    entries = _entries(hub.readable(request, repo).find(revision))
    paths = parse_qs(request.body.decode()).get('paths', [])
    return Answer.json([entries[path] for path in paths if path in entries])


@_route('HEAD|GET', '/{repo}/resolve/{revision}/{path}')
def _resolve(hub: HubServer, request: Request, repo: str, revision: str, path: str) -> Answer:
    commit = hub.readable(request, repo).find(revision)
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, 'Entry not found', code='EntryNotFound', X_Repo_Commit=commit.id)
    headers = {'X-Repo-Commit': commit.id, 'ETag': f'"{file.etag}"'}
    if not file.lfs:
        return _content(file.content, request, headers)
    headers |= {'X-Linked-Size': str(len(file.content)), 'X-Linked-Etag': f'"{file.etag}"'}
    headers['Location'] = f'{hub.storage}/{repo}/{file.sha256}/{quote(path)}'
    return Answer(302, b'Found. Redirecting', headers)


@_route('HEAD|GET', '/storage/{repo}/{sha256}/{path}')
def _lfs_download(hub: HubServer, request: Request, repo: str, sha256: str, path: str) -> Answer:
    return _content(hub.repositories[repo].uploads[sha256], request, {'ETag': f'"{sha256}"'})


def _content(content: bytes, request: Request, headers: Mapping[str, str]) -> Answer:
    headers = {'Content-Type': 'application/octet-stream', 'Accept-Ranges': 'bytes', **headers}
    match = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
    if match is None:
        return Answer(200, content, headers)
    first, last = int(match[1]), int(match[2] or len(content) - 1)
    if first >= len(content):
        raise Refusal(416, 'Range not satisfiable', Content_Range=f'bytes */{len(content)}')
    part = content[first : last + 1]
    headers['Content-Range'] = f'bytes {first}-{first + len(part) - 1}/{len(content)}'
    return Answer(206, part, headers)


# HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, *_: object) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        address = urlsplit(self.path)
        request = Request(self.command, address.path, parse_qs(address.query), self.headers)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self.hub._fault_for(request)
        length = int(self.headers.get('Content-Length', 0))
        if fault and fault.kind == 'drop request':
            self.rfile.read(length // 2)
            return self._break()
        request.body = self.rfile.read(length)
        if len(request.body) < length:
            raise ConnectionAbortedError
        try:
            if fault and fault.status:
                raise Refusal(fault.status, 'A fault for this test.', **fault.headers)
            with self.hub.lock:
                answer = self.hub._answer(request)
        except Refusal as refusal:
            answer = refusal.answer(request)
        self._send(request, answer, fault.kind if fault else None)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, request: Request, answer: Answer, fault: str | None) -> None:
        body, headers = answer.body, dict(answer.headers)
        headers['Content-Length'] = str(len(body))
        if fault == 'wrong size':
            for name in headers.keys() & {'Content-Length', 'X-Linked-Size'}:
                headers[name] = str(int(headers[name]) + 1)
        if fault == 'damage':
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method == 'HEAD':
            return
        if fault not in ('drop answer', 'truncate'):
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True
        if fault == 'drop answer':
            self._break()

    def _break(self) -> None:
        """Close as a crash would: the client gets a reset, not an end."""
        self.close_connection = True
        linger = struct.pack('ii', 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


def run_python(
    hub: HubServer, script: str, folder: Path, *, token: str | None = 'the first', **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own; the arguments are those of `HubServer.environment`."""
    return subprocess.run(
        [sys.executable, '-c', script],
        env=hub.environment(folder, token=token, **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )
