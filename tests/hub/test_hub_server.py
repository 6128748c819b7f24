"""The loopback Hub, as the real client sees it: what it keeps, whom it refuses, how it fails."""

import ast
import hashlib
import json
import re
import socket

import pytest
from hub_server import HubServer, run_python

WEIGHTS = bytes(range(256)) * 4000  # too much for a socket's buffers to hide half an upload
TOKENS = {'hf_writer': 'user', 'hf_stranger': 'stranger'}

# For all scripts: `attempt` prints an error as the list of its types, and its message, in a line.
PRELUDE = """
from pathlib import Path
from huggingface_hub import (
    CommitOperationAdd, create_branch, create_commit, create_repo, get_paths_info, hf_hub_download,
    list_repo_tree, model_info, ModelCard, repo_exists, snapshot_download, upload_file,
    upload_folder, whoami,
)

def attempt(name, function, *args, **kwargs):
    try:
        value = function(*args, **kwargs)
    except Exception as error:
        cause = type(error.__cause__).__name__
        value = f'{type(error).__name__} < {cause}: ' + ' '.join(str(error).split())
    print([name, str(value)])
"""


@pytest.fixture
def hub():
    with HubServer(TOKENS, read_only={'hf_reader': 'user'}) as server:
        yield server


def run(hub, script, folder, **changes):
    """What a script's attempts came to, by their names."""
    done = run_python(hub, PRELUDE + script, folder, **changes)
    assert done.returncode == 0, done.stderr
    return dict(ast.literal_eval(line) for line in done.stdout.splitlines())


UPLOAD = """
folder = Path(SOURCE)
attempt('who', lambda: whoami()['name'])
attempt('before', repo_exists, 'user/model')
create_repo('user/model', private=True)
attempt('again', create_repo, 'user/model')
create_repo('user/model', exist_ok=True)
upload = lambda **kwargs: upload_folder(repo_id='user/model', folder_path=folder, **kwargs).oid
attempt('first', upload, commit_message='the first')
attempt('second', upload, commit_message='the second')
ModelCard.load(folder / 'README.md').validate()

create_branch('user/model', branch='v/1')
(folder / 'sub' / 'a.txt').write_text('of the branch')
attempt('branch', upload, revision='v/1')
(folder / 'sub' / 'a.txt').write_text('of the pull request')
attempt('pull request', upload, create_pr=True)
attempt('nowhere', upload, revision='v/2')

attempt('paths', lambda: [p.path for p in get_paths_info('user/model', ['sub', 'README.md', 'no'])])
tree = lambda: [entry.path for entry in list_repo_tree('user/model')]
attempt('tree', lambda: sorted(tree()))
for name, card in {'bad base': 'base_model: /here', 'bad yaml': 'a: ['}.items():
    content = f'---\\n{card}\\n---\\n'.encode()
    attempt(name, upload_file, path_or_fileobj=content, path_in_repo='README.md',
            repo_id='user/model')
"""
DOWNLOAD = """
attempt('snapshot', snapshot_download, 'user/model')
attempt('info', lambda: model_info('user/model').sha)
for revision in REVISIONS:
    attempt(revision, lambda: Path(hf_hub_download('user/model', 'sub/a.txt', revision=revision))
            .read_text())
attempt('no file', hf_hub_download, 'user/model', 'no.txt')
attempt('no revision', hf_hub_download, 'user/model', 'README.md', revision='none')
"""


def test_round_trip(hub, tmp_path):
    source = tmp_path / 'source'
    (source / 'sub').mkdir(parents=True)
    (source / 'model.safetensors').write_bytes(WEIGHTS)
    (source / 'README.md').write_text('---\nbase_model: timm/resnet18\n---\n# A model\n')
    (source / 'sub' / 'a.txt').write_text('of main')
    wanted = {str(p.relative_to(source)): p.read_bytes() for p in source.rglob('*') if p.is_file()}

    came = run(hub, UPLOAD.replace('SOURCE', repr(str(source))), tmp_path / 'a')
    assert (came['who'], came['before']) == ('user', 'False')
    assert re.match("HfHubHTTPError.*'409 ", came['again'])
    assert came['paths'] == "['sub', 'README.md']"
    assert came['tree'] == "['.gitattributes', 'README.md', 'model.safetensors', 'sub']"
    assert came['nowhere'].startswith('RevisionNotFoundError')
    for name in ('bad base', 'bad yaml'):
        assert came[name].startswith('ValueError'), name

    files = hub.files('user/model')
    del files['.gitattributes']
    assert files == wanted
    head = hub.history('user/model')[0]
    assert came['first'] == came['second'] == head.id, 'an equal upload made a commit'
    assert [c.message for c in hub.history('user/model')] == ['the first', 'initial commit']
    assert [path for path, file in head.files.items() if file.lfs] == ['model.safetensors']
    assert len(hub.seen('PUT', '/storage/')) == 1, 'weights that were there were sent again'

    script = DOWNLOAD.replace('REVISIONS', repr(['main', 'v/1', 'refs/pr/1', head.id]))
    got = run(hub, script, tmp_path / 'b')
    assert (tmp_path / 'b' / 'hf') in (tmp_path / got['snapshot']).parents
    snapshot = tmp_path / got['snapshot']
    assert {path: (snapshot / path).read_bytes() for path in wanted} == wanted
    assert got['info'] == head.id == snapshot.name
    assert got['main'] == got[head.id] == 'of main'
    assert got['v/1'] == 'of the branch'
    assert got['refs/pr/1'] == 'of the pull request'
    assert came['pull request'] == hub.history('user/model', 'refs/pr/1')[0].id
    assert got['no file'].startswith('RemoteEntryNotFoundError')
    assert got['no revision'].startswith('RevisionNotFoundError')

    stored = [request for request in hub.requests if request.path.startswith('/storage/')]
    assert {request.method for request in stored} == {'PUT', 'GET'}
    assert not any(request.token for request in stored), 'another host saw the token'
    assert {request.token for request in hub.seen('POST', '/commit/')} == {'hf_writer'}


ACCESS = """
add = lambda: [CommitOperationAdd('new.txt', b'new')]
for token in TOKENS:
    # No two of them share what one has loaded.
    load = lambda: Path(hf_hub_download(repo, 'a.txt', token=token, cache_dir=CACHE + str(token)))
    push = lambda **kwargs: create_commit(repo, add(), commit_message='m', token=token, **kwargs)
    for repo in ('user/none', 'user/private', 'user/public'):
        attempt(f'{token} info {repo}', lambda: model_info(repo, token=token).id)
        attempt(f'{token} load {repo}', lambda: load().name)
        attempt(f'{token} push {repo}', push)
    attempt(f'{token} propose', lambda: push(create_pr=True).pr_revision)
    attempt(f'{token} create', create_repo, 'user/created', token=token)
"""


def test_access(hub, tmp_path):
    for name in ('private', 'public'):
        hub.create(f'user/{name}', private=name == 'private')
        hub.commit(f'user/{name}', {'a.txt': b'a'})
    tokens = [False, 'hf_unknown', 'hf_stranger', 'hf_reader']
    script = ACCESS.replace('TOKENS', repr(tokens)).replace('CACHE', repr(f'{tmp_path}/cache'))
    came = run(hub, script, tmp_path, HF_TOKEN='')

    def refused(what, error, status):
        return came[what].startswith(error) and str(status) in came[what]

    hidden, other = 'RepositoryNotFoundError', 'HfHubHTTPError'
    for work in ('info', 'load', 'push'):
        for repo in ('user/private', 'user/none'):
            assert refused(f'False {work} {repo}', hidden, 401)
            assert refused(f'hf_stranger {work} {repo}', hidden, 404)
        assert refused(f'hf_reader {work} user/none', hidden, 404)
        for repo in ('user/private', 'user/public', 'user/none'):
            assert refused(f'hf_unknown {work} {repo}', other, 401)
    for token in (False, 'hf_stranger'):
        assert came[f'{token} info user/public'] == 'user/public'
        assert came[f'{token} load user/public'] == 'a.txt'
    for repo in ('user/private', 'user/public'):
        assert came[f'hf_reader load {repo}'] == 'a.txt'
        assert refused(f'hf_reader push {repo}', other, 403)
        assert hub.files(repo).keys() == {'.gitattributes', 'a.txt'}
    assert refused('False push user/public', hidden, 401)
    assert refused('hf_stranger push user/public', other, 403)
    assert refused('False propose', hidden, 401)
    assert refused('hf_reader propose', other, 403)
    assert came['hf_stranger propose'] == 'refs/pr/1'
    assert hub.files('user/public', 'refs/pr/1')['new.txt'] == b'new'
    for token, status in {
        False: 401,
        'hf_unknown': 401,
        'hf_stranger': 403,
        'hf_reader': 403,
    }.items():
        assert refused(f'{token} create', other, status)
    assert {request.token for request in hub.requests} == {None, *tokens[1:]}


# Faults. Each meets a repository of its own, which has its name, as often as the client tries. So
# the first attempt fails, and the second comes through.

PUSH = """
def push(repo):
    operations = [CommitOperationAdd('config.json', b'new'),
                  CommitOperationAdd('model.safetensors', bytes(range(256)) * 4000)]
    create_commit(repo, operations, commit_message='new')
    return 'done'

for repo in REPOSITORIES:
    attempt(f'{repo} 1', push, repo)
    attempt(f'{repo} 2', push, repo)
"""
STATUS = {401: 'RepositoryNotFoundError', 500: 'HfHubHTTPError < HTTPStatusError: Server error'}
# By chance of where the client was, it finds out in one of these ways.
BROKEN = '(Read|Write|RemoteProtocol)Error'
# The name -> method, path, kind, what the client says, and how often it tries.
PUSH_FAULTS = {
    **{
        f'commit-{status}': ('POST', '/commit/', status, STATUS.get(status, 'HfHubHTTPError'), 1)
        for status in (401, 403, 404, 409, 429, 500)
    },
    'commit-drop': ('POST', '/commit/', 'drop request', BROKEN, 1),
    'commit-lost': ('POST', '/commit/', 'drop answer', 'ReadError', 1),
    'asked-500': ('POST', '/preupload/', 500, 'HfHubHTTPError', 6),
    'batch-429': ('POST', '/batch$', 429, 'HfHubHTTPError', 6),
    'put-403': ('PUT', '/storage/', 403, 'RuntimeError < HfHubHTTPError: Error while uploading', 1),
    'put-500': ('PUT', '/storage/', 500, 'RuntimeError < HfHubHTTPError: Error while uploading', 6),
    'put-drop': ('PUT', '/storage/', 'drop request', f'RuntimeError < {BROKEN}', 6),
}


def test_failed_push_changes_nothing_and_can_be_repeated(hub, tmp_path):
    for name, (method, path, kind, _, tries) in PUSH_FAULTS.items():
        hub.create(f'user/{name}')
        hub.commit(f'user/{name}', {'config.json': b'old', 'model.safetensors': b'old'})
        hub.fail(method, f'(?=.*user/{name}[/.]).*{path}', kind, times=tries)
    script = PUSH.replace('REPOSITORIES', repr([f'user/{name}' for name in PUSH_FAULTS]))
    came = run(hub, script, tmp_path)
    for name, (*_, error, _) in PUSH_FAULTS.items():
        repo = f'user/{name}'
        assert re.match(error, came[f'{repo} 1']), came[f'{repo} 1']
        assert came[f'{repo} 2'] == 'done', came[f'{repo} 2']
        # One commit is new, also where the first came through and only its answer was lost.
        assert [c.message for c in hub.history(repo)] == ['new', 'by the test', 'initial commit']
        files = {path: data for path, data in hub.files(repo).items() if path[0] != '.'}
        assert files == {'config.json': b'new', 'model.safetensors': WEIGHTS}


def test_push_outlives_a_short_fault(hub, tmp_path):
    hub.create('user/model')
    hub.fail('POST', '/preupload/', 429, **{'Retry-After': '7'})
    hub.fail('POST', '/batch$', 'drop answer')
    hub.fail('PUT', '/storage/', 'drop request')
    script = PRELUDE + PUSH.replace('REPOSITORIES', "['user/model']")
    done = run_python(hub, script, tmp_path)
    assert "['user/model 1', 'done']" in done.stdout
    assert 'Rate limited. Waiting 8.0s' in done.stderr
    assert hub.files('user/model')['model.safetensors'] == WEIGHTS


PULL = """
import os
from hashlib import sha256

for repo in REPOSITORIES:
    for name in ('config.json', 'model.safetensors'):
        pull = lambda: sha256(Path(hf_hub_download(repo, name)).read_bytes()).hexdigest()
        attempt(f'{repo} {name} 1', pull)
        cache = Path(os.environ['HF_HOME'], 'hub', 'models--' + repo.replace('/', '--'))
        attempt(f'{repo} {name} kept', lambda: [p.name for p in cache.rglob(name)])
        attempt(f'{repo} {name} 2', pull)
"""
AWAY = 'LocalEntryNotFoundError < HfHubHTTPError: An error happened while trying to locate'
# The name -> method, kind, what the client says, how often it tries.
PULL_FAULTS = {
    'head-401': ('HEAD', 401, 'RepositoryNotFoundError', 1),
    'head-403': ('HEAD', 403, AWAY, 1),
    'head-404': ('HEAD', 404, AWAY, 1),
    'head-409': ('HEAD', 409, AWAY, 1),
    'head-429': ('HEAD', 429, AWAY, 7),
    'head-500': ('HEAD', 500, AWAY, 7),
    'get-403': ('GET', 403, 'HfHubHTTPError', 1),
    'get-404': ('GET', 404, 'HfHubHTTPError', 1),
    'get-409': ('GET', 409, 'HfHubHTTPError', 1),
    'get-429': ('GET', 429, 'HfHubHTTPError', 6),
    'get-500': ('GET', 500, 'HfHubHTTPError', 1),
    'drop': ('GET', 'drop answer', 'ReadError', 1),
    'truncate': ('GET', 'truncate', 'RemoteProtocolError', 6),
    'size': ('HEAD', 'wrong size', 'OSError < NoneType: Consistency check failed', 1),
}


def test_failed_pull_leaves_nothing_and_can_be_repeated(hub, tmp_path):
    files = {'config.json': b'{}', 'model.safetensors': WEIGHTS}
    for name, (method, kind, _, tries) in PULL_FAULTS.items():
        hub.create(f'user/{name}')
        hub.commit(f'user/{name}', files)
        for file in files:
            hub.fail(method, f'user/{name}/.*{file}', kind, times=tries)
    script = PULL.replace('REPOSITORIES', repr([f'user/{name}' for name in PULL_FAULTS]))
    came = run(hub, script, tmp_path)
    for name, (_, _, error, _) in PULL_FAULTS.items():
        for file, content in files.items():
            what = f'user/{name} {file}'
            assert came[f'{what} 1'].startswith(error), came[f'{what} 1']
            assert came[f'{what} kept'] == '[]', what
            assert came[f'{what} 2'] == hashlib.sha256(content).hexdigest(), came[f'{what} 2']


def test_pull_outlives_a_short_fault_but_not_damage(hub, tmp_path):
    """The client does not compare a content with its hash: what uses it must."""
    hub.create('user/model')
    hub.commit('user/model', {'config.json': b'{}', 'model.safetensors': WEIGHTS})
    hub.fail('HEAD', 'config.json', 500, times=2)
    hub.fail('GET', 'config.json', 'truncate')
    hub.fail('GET', 'model.safetensors', 'damage')
    came = run(hub, PULL.replace('REPOSITORIES', "['user/model']"), tmp_path)
    assert came['user/model config.json 1'] == hashlib.sha256(b'{}').hexdigest()
    damaged = bytearray(WEIGHTS)
    damaged[len(WEIGHTS) // 2] ^= 1
    for attempt in (1, 2):
        came_as = came[f'user/model model.safetensors {attempt}']
        assert came_as == hashlib.sha256(damaged).hexdigest()


def test_no_server(hub, tmp_path):
    hub.close()
    script = """
attempt('push', create_commit, 'user/model', [], commit_message='m')
attempt('pull', hf_hub_download, 'user/model', 'config.json')
"""
    came = run(hub, script, tmp_path)
    assert came['push'].startswith('ConnectError')
    assert came['pull'].startswith('LocalEntryNotFoundError < ConnectError')


# What the client would never send


def send(hub, *parts, close=False):
    """One request, byte for byte; the status line of the answer."""
    with socket.create_connection(('127.0.0.1', int(hub.url.rsplit(':', 1)[1]))) as connection:
        connection.sendall(b''.join(parts))
        if close:
            connection.shutdown(socket.SHUT_WR)
        return connection.makefile('rb').readline().decode().strip()


def commit_request(*lines, length=None):
    body = b''.join(json.dumps(line).encode() + b'\n' for line in lines)
    head = 'POST /api/models/user/model/commit/main HTTP/1.1\r\nAuthorization: Bearer hf_writer\r\n'
    return f'{head}Content-Length: {length or len(body)}\r\n\r\n'.encode(), body


HEADER = {'key': 'header', 'value': {'summary': 'by hand'}}
GOOD = {'key': 'file', 'value': {'path': 'a.txt', 'content': 'YQ==', 'encoding': 'base64'}}


@pytest.mark.parametrize(
    ('lines', 'answer'),
    [
        ([HEADER, GOOD, {'key': 'lfsFile', 'value': {'path': 'b', 'oid': '0' * 64}}], '400'),
        ([HEADER, GOOD, {'key': 'file', 'value': {'path': '../b', 'content': 'YQ=='}}], '400'),
        ([HEADER, GOOD, {'key': 'file', 'value': {'path': 'b', 'content': 'Y'}}], '400'),
        ([HEADER, GOOD, {'key': 'deletedFile', 'value': {'path': 'b'}}], '404'),
        ([GOOD, GOOD], '400'),
        ([{'key': 'header', 'value': {'summary': 's', 'parentCommit': '0' * 40}}, GOOD], '412'),
    ],
    ids=['content', 'path', 'base64', 'delete', 'header', 'parent'],
)
def test_invalid_commit_changes_nothing(hub, lines, answer):
    hub.create('user/model')
    assert answer in send(hub, *commit_request(*lines))
    assert len(hub.history('user/model')) == 1


def test_half_a_commit_changes_nothing(hub):
    """Every line that came is whole, and the client is gone before the rest of them."""
    hub.create('user/model')
    assert send(hub, *commit_request(HEADER, GOOD, length=1000), close=True) == ''
    assert len(hub.history('user/model')) == 1
    assert '200' in send(hub, *commit_request(HEADER, GOOD))
    assert hub.files('user/model')['a.txt'] == b'a'


def test_upload_of_other_content_than_announced(hub):
    hub.create('user/model')
    oid = hashlib.sha256(b'this').hexdigest()
    head = f'PUT /storage/user/model/{oid} HTTP/1.1\r\nContent-Length: 4\r\n\r\n'.encode()
    assert '400' in send(hub, head, b'that')
    assert not hub.repositories['user/model'].uploads


def test_fault_that_nothing_meets():
    with pytest.raises(RuntimeError, match='No request met'), HubServer(TOKENS) as hub:
        hub.fail('GET', '/resolve/', 404)
    with pytest.raises(ValueError, match="'truncate' befalls only GET and POST"):
        hub.fail('HEAD', '/resolve/', 'truncate')
