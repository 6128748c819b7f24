"""What the Hub of the tests does at each address; see hub_server.py."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote

import yaml
from hub_store import Answer, File, Refusal, goes_by_lfs, json_answer
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

# The routes, in the order of the client's work. Each takes the server, the request and, unquoted,
# the named parts of the path, and returns an Answer.

ROUTES: list[tuple[str, re.Pattern[str], Any]] = []


def _route(methods, pattern):
    """{name} is one part of the quoted path, {repo} has one slash, {path} as many as it likes."""
    parts = {'repo': '[^/]+/[^/]+', 'path': '.+'}
    compiled = re.sub(r'{(\w+)}', lambda m: f'(?P<{m[1]}>{parts.get(m[1], "[^/]+")})', pattern)

    def register(function):
        ROUTES.append((methods, re.compile(compiled), function))
        return function

    return register


@_route('GET', '/api/whoami-v2')
def _whoami(hub, request):
    user = hub.user(request)
    if user is None:
        raise Refusal(401, 'Invalid username or password.')
    return json_answer({'type': 'user', 'name': user, 'fullname': user, 'orgs': []})


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
        return json_answer({'error': 'You already created this model repo', **answer}, 409)
    hub.create(repo_id, private=value.get('visibility') == 'private')
    return json_answer(answer)


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
    return json_answer(found, 400 if found['errors'] else 200)


@_route('POST', '/api/models/{repo}/branch/{branch}')
def _create_branch(hub, request, repo, branch):
    repository = hub.writable(request, repo)
    start = repository.find(request.json.get('startingPoint', 'main'))
    if branch in repository.refs:
        raise Refusal(409, 'Reference already exists')
    repository.refs[branch] = start
    return json_answer({})


@_route('POST', '/api/models/{repo}/preupload/{revision}')
def _preupload(hub, request, repo, revision):
    """How to send each file. By the `oid` of what is there the client leaves out equal ones."""
    head = hub.writable(request, repo, pull='create_pr' in request.query).find(revision)
    files = []
    for file in request.json['files']:
        there = head.files.get(file['path'])
        by_lfs = goes_by_lfs(file['path'], base64.b64decode(file['sample']), file['size'])
        mode = {'uploadMode': 'lfs' if by_lfs else 'regular', 'shouldIgnore': False}
        files.append({'path': file['path'], 'oid': there.etag if there else None, **mode})
    return json_answer({'files': files})


@_route('POST', '/{repo}.git/info/lfs/objects/batch')
def _lfs_batch(hub, request, repo):
    """Where to send what is not there yet. For a pull request the client names no revision."""
    repository = hub.writable(request, repo, pull='ref' not in request.json)
    objects = request.json['objects']
    for asked in objects:
        if asked['oid'] not in repository.uploads:
            asked['actions'] = {'upload': {'href': f'{hub.storage}/{repo}/{asked["oid"]}'}}
    return json_answer({'transfer': 'basic', 'objects': objects})


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
    return json_answer({**answer, 'pullRequestUrl': f'{hub.url}/{repo}/discussions/{number}'})


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


@_route('GET', '/api/models/{repo}')
@_route('GET', '/api/models/{repo}/revision/{revision}')
def _model_info(hub, request, repo, revision='main'):
    repository = hub.readable(request, repo)
    commit = repository.find(revision)
    siblings = [{'rfilename': path} for path in sorted(commit.files)]
    info = {'id': repo, 'author': repo.split('/')[0], 'sha': commit.id, 'siblings': siblings}
    return json_answer({**info, 'private': repository.private, 'gated': False, 'disabled': False})


@_route('GET', '/api/models/{repo}/tree/{revision}')
@_route('GET', '/api/models/{repo}/tree/{revision}/{path}')
def _tree(hub, request, repo, revision, path='.'):
    entries = _entries(hub.readable(request, repo).find(revision))
    if path != '.' and path not in entries:
        raise Refusal(404, f'{path} does not exist on "{revision}"', code='EntryNotFound')
    depth = None if request.query.get('recursive') == ['true'] else 1
    parents = {name: [*map(str, PurePosixPath(name).parents)][:depth] for name in entries}
    return json_answer([entry for name, entry in entries.items() if path in parents[name]])


@_route('POST', '/api/models/{repo}/paths-info/{revision}')
def _paths_info(hub, request, repo, revision):
    entries = _entries(hub.readable(request, repo).find(revision))
    paths = parse_qs(request.body.decode()).get('paths', [])
    return json_answer([entries[path] for path in paths if path in entries])


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
