"""What the Hub of the tests keeps, and what it is asked and answers; see hub_server.py."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

LFS_SUFFIXES = ('.bin', '.npy', '.npz', '.onnx', '.pt', '.pth', '.safetensors', '.zip')
LFS_SIZE = 10_000_000
GITATTRIBUTES = ''.join(f'*{s} filter=lfs diff=lfs merge=lfs -text\n' for s in LFS_SUFFIXES)
INVALID_TOKEN = 'Invalid credentials in Authorization header'


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


def goes_by_lfs(path, sample, size=0):
    return path.endswith(LFS_SUFFIXES) or b'\0' in sample or max(size, len(sample)) >= LFS_SIZE


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
        return json_answer({'error': self.message}, self.status, **headers)


def json_answer(value, status=200, **headers):
    headers = {'Content-Type': 'application/json', **headers}
    return Answer(status, json.dumps(value).encode(), headers)
