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

import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_routes import ROUTES
from hub_store import (
    GITATTRIBUTES,
    INVALID_TOKEN,
    Answer,
    Commit,
    File,
    Refusal,
    Repository,
    Request,
    goes_by_lfs,
)

# What can go wrong besides an answer with another status, and for which methods.
FAULTS = {
    'drop request': ('POST', 'PUT'),
    'drop answer': ('GET', 'POST'),
    'truncate': ('GET', 'POST'),
    'wrong size': ('HEAD',),
    'damage': ('GET',),
}


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
            new = {path: File(data, goes_by_lfs(path, data)) for path, data in files.items()}
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
        for methods, pattern, function in ROUTES:
            if request.method in methods and (match := pattern.fullmatch(request.path)):
                groups = {name: unquote(value) for name, value in match.groupdict().items()}
                return function(self, request, **groups)
        raise Refusal(404, f'This Hub does not know {request.method} {request.path}.')


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
