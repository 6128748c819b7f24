"""Over real HTTP, with the real client, to a Hub on this machine: push, fresh cache, load; and what
a user is told when it goes wrong."""

import json
import re

import pytest
import timm
import torch
from distributed_checks import SMALL
from hub_server import HubServer, run_python
from huggingface_hub import ModelCard
from safetensors.torch import save
from small_models import backbone_of

import timm_fisher
from timm_fisher.hub.readme import BEGIN, END

WRITER = 'hf_writersecret'
TOKENS = {WRITER: 'user', 'hf_strangersecret': 'stranger'}
BACKBONE = timm.get_pretrained_cfg('test_resnet').hf_hub_id
FILES = ['.gitattributes', 'README.md', 'config.json', 'metrics.json', 'model.safetensors']

ON_RESNET = [head for head in timm_fisher.list_heads() if backbone_of(head) == 'test_resnet']

PRELUDE = (
    f'SMALL = {SMALL}'
    + """
import json, timm, torch, timm_fisher
from pathlib import Path
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

def create(head='sparse_fisher', seed=0, **arguments):
    torch.manual_seed(seed)
    arguments = {**SMALL.get(head, {}), **arguments}
    model = timm_fisher.create_model(
        'test_resnet', head=head, num_classes=3, pretrained=True, **arguments
    ).eval()
    for value in model.head.state_dict(keep_vars=True).values():  # from where they start
        if value.is_floating_point():
            value.data.mul_(1 + 0.1 * torch.rand_like(value))
    return model

def attempt(name, function, *args, **kwargs):
    try:
        value = function(*args, **kwargs)
    except Exception as error:
        value = f'{type(error).__name__}: {error}'
    print(json.dumps([name, str(value)]))
"""
)


@pytest.fixture
def hub():
    """With the backbone's repository, as timm has it."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet')
    with HubServer(TOKENS) as server:
        server.create(BACKBONE)
        server.commit(BACKBONE, {'model.safetensors': save(model.state_dict())})
        yield server


def run(hub, script, folder, **changes):
    """What a script's attempts came to, by their names; no token in anything it printed."""
    folder.mkdir(exist_ok=True)
    done = run_python(hub, PRELUDE + script, folder, **changes)
    assert done.returncode == 0, done.stderr
    assert 'secret' not in done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]
    return dict(map(json.loads, lines))


ROUND_TRIP = """
logits = {}
for head in HEADS:
    model = create(head)
    logits[head] = model(x).detach()
    for kind, adapter in (('adapter', None), ('whole', False)):
        timm_fisher.push_to_hub(model, f'user/{head}-{kind}', adapter=adapter, private=True)
save_file(logits, OUT)
"""
LOAD = """
expected = load_file(OUT)
for head in HEADS:
    for kind in ('adapter', 'whole'):
        name = f'hf-hub:user/{head}-{kind}'
        model = timm.create_model(name, pretrained=True).eval()
        attempt(f'{head} {kind}', torch.equal, model(x), expected[head])
        fresh = timm.create_model(name, pretrained=True, num_classes=7).eval()
        pool = lambda model: model.forward_head(model.forward_features(x), pre_logits=True)
        same = torch.equal(pool(fresh), pool(model)) and fresh(x).shape == (2, 7)
        attempt(f'{head} {kind} 7', lambda: same)
"""


@pytest.mark.slow  # test_adapters always runs
@pytest.mark.parametrize('heads', [['sparse_fisher'], ON_RESNET], ids=['one', 'all'])
def test_heads_come_back_from_the_hub(hub, tmp_path, heads):
    names = {'OUT': str(tmp_path / 'logits.safetensors'), 'HEADS': heads}
    names = ''.join(f'{name} = {value!r}\n' for name, value in names.items())
    run(hub, names + ROUND_TRIP, tmp_path)
    results = run(hub, names + LOAD, tmp_path / 'fresh')
    assert len(results) == 4 * len(heads)
    assert set(results.values()) == {'True'}
    for head in heads:
        adapter, whole = (hub.files(f'user/{head}-{kind}') for kind in ('adapter', 'whole'))
        assert sorted(adapter) == sorted(whole) == FILES
        stored = load_names(adapter['model.safetensors'])
        assert stored == {n for n in load_names(whole['model.safetensors']) if 'backbone.' not in n}
        assert len(hub.history(f'user/{head}-whole')) == 2  # .gitattributes, and one push

    script = f"""
attempt('private', timm.create_model, 'hf-hub:user/{heads[0]}-whole', pretrained=True)
attempt('private, ours', timm_fisher.from_pretrained, 'user/{heads[0]}-whole')
model = create('avg')
attempt('of another', timm_fisher.push_to_hub, model, 'user/given')
attempt('token given', timm_fisher.push_to_hub, model, 'user/given', token='{WRITER}')
"""
    denied = run(hub, script, tmp_path / 'stranger', HF_TOKEN='hf_strangersecret')
    assert 'NotFound' in denied['private']
    refused = rf"LoadError: Downloading .*'user/{heads[0]}-whole' failed: no such repository"
    assert re.match(refused, denied['private, ours'])
    assert re.match("PushError: Pushing to 'user/given' failed: .*403", denied['of another'])
    assert 'Error' not in denied['token given']  # it counts, HF_TOKEN does not
    assert sorted(hub.files('user/given')) == FILES


def load_names(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])
    return set(header) - {'__metadata__'}


VERSIONS = """
metrics = {'test': {'accuracy': 0.5, 'samples': 10}, 'seed': 0}
card = {'dataset': 'Leaves'}
push = lambda model, **more: timm_fisher.push_to_hub(
    model, 'user/leaves', metrics=metrics, card=card, label_names=['ash', 'elm', 'oak'], **more
)
first = push(create())
attempt('again', lambda: push(create()) == first)
push(create('avg'), revision='v2')
head = lambda model: type(model.head).__name__
attempt('branch', lambda: head(timm.create_model('hf-hub:user/leaves@v2', pretrained=True)))
attempt('ours', lambda: head(timm_fisher.from_pretrained('user/leaves', revision='v2')))
attempt('main', lambda: head(timm.create_model('hf-hub:user/leaves', pretrained=True)))
attempt('request', push, create('gem'), create_pr=True)
attempt('labels', lambda: timm_fisher.from_pretrained('user/leaves').pretrained_cfg['label_names'])
"""
EDITED = """
metrics = {'test': {'accuracy': 0.75, 'samples': 10}, 'seed': 0}
timm_fisher.push_to_hub(create(), 'user/leaves', metrics=metrics, card={'dataset': 'Leaves'})
"""


@pytest.mark.slow
def test_versions_and_edits(hub, tmp_path):
    results = run(hub, VERSIONS, tmp_path)
    assert results['again'] == 'True'
    assert len(hub.history('user/leaves')) == 2  # .gitattributes, and one push of two
    assert results['branch'] == results['ours'] == 'Average'
    assert results['main'] == 'SparseFisher'
    assert results['request'].endswith('/discussions/1')
    assert json.loads(results['labels'].replace("'", '"')) == ['ash', 'elm', 'oak']

    before = hub.files('user/leaves')['README.md'].decode()
    assert '| accuracy | 50.00 |' in before
    edited = before.replace('tags:\n', 'language: la\ntags:\n- trees\n')
    edited = edited.replace('\n---\n', '\n---\n# Above\n', 1) + '\nMind the beech.\n'
    hub.commit('user/leaves', {'README.md': edited.encode()})
    run(hub, EDITED, tmp_path)
    text = hub.files('user/leaves')['README.md'].decode()
    assert text.endswith(f'{END}\n\nMind the beech.\n')
    assert f'\n---\n# Above\n\n{BEGIN}\n' in text
    card = ModelCard(text)
    assert '| accuracy | 75.00 |' in card.text
    assert '50.00' not in text
    assert card.data.eval_results[0].metric_value == 75.0
    assert card.data.language == 'la'
    assert card.data.tags == ['trees', 'timm', 'timm_fisher', 'sparse_fisher']
    assert hub.files('user/leaves', 'v2')['README.md'].decode().count('# Above') == 0
    commits = len(hub.history('user/leaves'))
    run(hub, EDITED, tmp_path)
    assert len(hub.history('user/leaves')) == commits


ADAPTERS = """
model = create()
timm_fisher.push_to_hub(model, 'user/adapter')
attempt('same', lambda: torch.equal(
    timm.create_model('hf-hub:user/adapter', pretrained=True).eval()(x), model(x)
))
grey = timm.create_model('hf-hub:user/adapter', pretrained=True, in_chans=1).eval()
g = x[:, :1]
attempt('grey', torch.allclose, grey(g), model(g.expand(-1, 3, -1, -1)), 1e-4, 1e-4)

timm.models.save_for_hf(timm.create_model('test_resnet', pretrained=True), 'own',
                        safe_serialization=True)
own = timm_fisher.from_pretrained('user/adapter', backbone='local-dir:own').eval()
attempt('folder', torch.equal, own(x), model(x))
timm.models.save_for_hf(timm.create_model('test_resnet'), 'other', safe_serialization=True)
attempt('other', timm_fisher.from_pretrained, 'user/adapter', backbone='local-dir:other')
taken = timm_fisher.from_pretrained('user/adapter', backbone='local-dir:other', any_backbone=True)
attempt('accepted', torch.equal, taken.eval()(x), model(x))
attempt('architecture', timm_fisher.from_pretrained, 'user/adapter', backbone='test_vit')
timm.models.save_for_hf(timm.create_model('test_vit'), 'vit', safe_serialization=True)
attempt('folder of another', timm_fisher.from_pretrained, 'user/adapter', backbone='local-dir:vit')
timm_fisher.push_to_hub(model, 'user/whole', adapter=False)
attempt('public', timm_fisher.push_to_hub, model, 'user/whole', private=True)
attempt('no adapter', timm_fisher.from_pretrained, 'user/whole', backbone='local-dir:own')

again = timm_fisher.from_pretrained('user/adapter')
timm_fisher.push_to_hub(again, 'user/again')
whole = timm_fisher.from_pretrained('user/whole')
timm_fisher.push_to_hub(whole, 'user/from-whole')
next(whole.backbone.parameters()).data.add_(1e-6)
attempt('drifted', timm_fisher.push_to_hub, whole, 'user/drifted', adapter=True)
timm_fisher.push_to_hub(whole, 'user/drifted')
again.train()(x)
timm_fisher.push_to_hub(again, 'user/statistics')

torch.save(timm.create_model('test_resnet').state_dict(), 'old.bin')
HfApi().create_repo('user/old')
for file, name in (('old.bin', 'pytorch_model.bin'), ('own/config.json', 'config.json')):
    HfApi().upload_file(path_or_fileobj=file, path_in_repo=name, repo_id='user/old')
model = timm_fisher.create_model('hf-hub:user/old', pretrained=True, num_classes=3)
attempt('no safetensors', timm_fisher.push_to_hub, model, 'user/old-adapter', adapter=True)

small = timm.create_model('test_vit3', img_size=96)
timm.models.save_for_hf(small, 'small', safe_serialization=True)
HfApi().create_repo('user/small')
HfApi().upload_folder(repo_id='user/small', folder_path='small')
model = timm_fisher.create_model('hf-hub:user/small', pretrained=True, num_classes=3).eval()
timm_fisher.push_to_hub(model, 'user/small-adapter', adapter=True)
x = torch.randn(1, 3, 96, 96)
attempt('another size', lambda: torch.equal(
    timm.create_model('hf-hub:user/small-adapter', pretrained=True).eval()(x), model(x)
))
"""


def test_adapters(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = run(hub, ADAPTERS, tmp_path)
    assert (
        results['same'] == results['grey'] == results['folder'] == results['another size'] == 'True'
    )
    assert re.match(
        r"LoadError: The weights of 'other' \(digest \w{12}\) are not those that "
        r"'user/adapter' was trained with \('timm/test_resnet.*any_backbone=True",
        results['other'],
    )
    assert results['accepted'] == 'False'
    assert re.search(
        r"LoadError: .*test_vit.*'user/adapter' is an adapter", results['architecture']
    )
    assert re.match(
        "LoadError: The weights of 'vit' are not of this model", results['folder of another']
    )
    assert re.search("LoadError: 'user/whole' holds its backbone", results['no adapter'])
    assert 'came from a repository without safetensors' in results['no safetensors']
    assert results['public'].startswith(
        "PushError: Pushing to 'user/whole' failed: it is public, not private."
    )
    assert re.match(r'ValueError: No adapter can be saved: .*no longer those', results['drifted'])

    def whole(name):
        names = load_names(hub.files(f'user/{name}')['model.safetensors'])
        return any(name.startswith('backbone.') for name in names)

    pushed = ('adapter', 'again', 'from-whole', 'drifted', 'whole', 'statistics')
    stored = {name: whole(name) for name in pushed}
    assert stored == {name: name in pushed[3:] for name in pushed}
    relation = ModelCard(hub.files('user/adapter')['README.md'].decode()).data
    assert (relation.base_model, relation.base_model_relation) == (BACKBONE, 'adapter')
    relation = ModelCard(hub.files('user/drifted')['README.md'].decode()).data
    assert (relation.base_model, relation.base_model_relation) == (BACKBONE, 'finetune')


# What goes wrong

BROKE = 'there is no connection to the Hub, or it broke. Try again'


def some_or_all(faults):
    return [faults[:3:2], pytest.param(faults, marks=pytest.mark.slow)]


PUSH_FAULTS = [  # method, path, kind, requests that meet it, what the user is told
    ('PUT', '/storage/', 403, 1, r'the token does not allow this \(403\)'),
    ('PUT', '/storage/', 'drop request', 6, BROKE),
    ('POST', '/commit/', 401, 1, 'no such repository, or it is private and HF_TOKEN has no access'),
    ('POST', '/commit/', 403, 1, r'the token does not allow this \(403\)'),
    ('POST', '/commit/', 404, 1, 'no such repository'),
    ('POST', '/commit/', 409, 1, 'changed by somebody else at the same time.*Try again'),
    ('POST', '/commit/', 429, 1, 'too many requests.*Wait, and try again'),
    ('POST', '/commit/', 500, 1, r'a fault of its own \(500\). Try again later'),
    ('POST', '/commit/', 'drop request', 1, BROKE),
    ('POST', '/commit/', 'drop answer', 1, BROKE),
]
PUSHES = """
for i in range(PUSHES):
    model = create('avg', seed=i)
    attempt(f'{i} fault', timm_fisher.push_to_hub, model, f'user/push-{i}')
    timm_fisher.push_to_hub(model, f'user/push-{i}')
"""


@pytest.mark.parametrize('faults', some_or_all(PUSH_FAULTS), ids=['some', 'all'])
def test_faults_of_a_push(hub, tmp_path, faults):
    """The published revision stays whole, one sentence says what to do, and then it works."""
    before = {'README.md': b'---\ntags: [a]\n---\nOurs.\n', 'config.json': b'{}'}
    for i, (method, path, kind, times, _) in enumerate(faults):
        hub.create(f'user/push-{i}')
        hub.commit(f'user/push-{i}', before)
        where = f'{path}user/push-{i}' if method == 'PUT' else f'push-{i}{path}'
        hub.fail(method, where, kind, times=times)
    results = run(hub, f'PUSHES = {len(faults)}' + PUSHES, tmp_path)
    for i, (_, _, kind, _, error) in enumerate(faults):
        message = results[f'{i} fault']
        assert re.match(rf"PushError: Pushing to 'user/push-{i}' failed: .*{error}", message)
        assert len(message.splitlines()) == 1
        states = [len(commit.files) for commit in hub.history(f'user/push-{i}')]
        assert states == [5, 3, 1], f'{kind}: the old files, then all of the new ones'


PULL_FAULTS = [
    ('GET', '/storage/.*safetensors', 'drop answer', 1, BROKE),
    ('GET', '/storage/.*safetensors', 'truncate', 6, BROKE),
    ('GET', '/storage/.*safetensors', 500, 1, r'a fault of its own \(500\)'),
    ('HEAD', '/model.safetensors', 'wrong size', 1, r'should be of size \d+ but has size'),
    ('HEAD', '/model.safetensors', 401, 1, 'no such repository, or it is private'),
    ('HEAD', '/model.safetensors', 403, 1, r'the token does not allow this \(403\)'),
    ('HEAD', '/model.safetensors', 404, 1, 'no such repository'),
    ('HEAD', '/model.safetensors', 429, 7, 'too many requests'),
    ('HEAD', '/model.safetensors', 500, 7, r'a fault of its own \(500\)'),
    ('HEAD', '/config.json', 500, 7, r'a fault of its own \(500\)'),
]
PULLS = """
for i in range(PULLS):
    attempt(f'{i} fault', timm_fisher.from_pretrained, f'user/pull-{i}')
    model = timm_fisher.from_pretrained(f'user/pull-{i}')
attempt('missing', timm_fisher.from_pretrained, 'user/nothing')
attempt('revision', timm_fisher.from_pretrained, 'user/pull-0', revision='v3')
attempt('no model', timm_fisher.from_pretrained, 'user/empty')
"""
LATER = """
attempt('cached', lambda: type(timm_fisher.from_pretrained('user/pull-0')).__name__)
attempt('not cached', timm_fisher.from_pretrained, 'user/other')
attempt('push', timm_fisher.push_to_hub, timm_fisher.from_pretrained('user/pull-0'), 'user/leaves')
"""


@pytest.mark.slow  # as some of those of a push, which always run
@pytest.mark.parametrize('faults', some_or_all(PULL_FAULTS)[1:], ids=['all'])
def test_faults_of_a_pull(hub, tmp_path, faults):
    model = timm_fisher.create_model('test_resnet', num_classes=3)
    timm_fisher.save_pretrained(model, tmp_path / 'saved')
    files = {path.name: path.read_bytes() for path in (tmp_path / 'saved').iterdir()}
    for i, (method, path, kind, times, _) in enumerate(faults):
        hub.create(f'user/pull-{i}')
        hub.commit(f'user/pull-{i}', files)
        where = path.replace('.*', f'user/pull-{i}/.*') if method == 'GET' else f'pull-{i}/.*{path}'
        hub.fail(method, where, kind, times=times)
    hub.create('user/empty')
    results = run(hub, f'PULLS = {len(faults)}' + PULLS, tmp_path)
    for i, (_, _, _, _, error) in enumerate(faults):
        assert re.match(rf'LoadError: Downloading .*{error}', results[f'{i} fault'])
    assert re.match('LoadError: .*no such repository', results['missing'])
    assert re.match('LoadError: .*no such revision', results['revision'])
    assert re.match('LoadError: .*lacks a file that every saved model has', results['no model'])

    offline = run(hub, LATER, tmp_path, HF_HUB_OFFLINE='1')
    hub.close()
    gone = run(hub, LATER, tmp_path)
    assert offline['cached'] == gone['cached'] == 'PooledModel'
    assert re.match('LoadError: .*cannot be reached, and the file is not in', offline['not cached'])
    assert re.match(f'LoadError: .*{BROKE}', gone['not cached'])
    assert re.match('PushError: .*the Hub is needed, but HF_HUB_OFFLINE is set', offline['push'])
    assert re.match(f'PushError: .*{BROKE}', gone['push'])


CARDS = """
timm_fisher.save_pretrained(create('avg'), 'folder', card={'dataset': 'Leaves'})  # of USER/NAME
push = lambda name: timm_fisher.push_folder('folder', f'user/{name}')
push('first')
readme = Path('folder/README.md')
readme.write_text(readme.read_text() + '\\nOf the folder.\\n')
for name in ('first', 'own', 'long', 'aliases', 'empty'):
    attempt(name, push, name)
attempt('link', lambda: [readme.unlink(), readme.symlink_to('/etc/hostname'), push('first')])
"""


def test_cards_on_the_hub(hub, tmp_path, monkeypatch):
    """Whatever somebody has put there: kept, or refused by a sentence, and nothing is pushed."""
    monkeypatch.chdir(tmp_path)
    aliases = '---\na: &a [x]\nb: [*a, *a]\n---\n'
    there = {'own': 'Ours, USER/NAME.', 'long': 'x' * 2**21, 'aliases': aliases, 'empty': ''}
    for name, text in there.items():
        hub.create(f'user/{name}')
        hub.commit(f'user/{name}', {'README.md': text.encode()})
    done = run(hub, CARDS, tmp_path)
    cards = {name: hub.files(f'user/{name}')['README.md'].decode() for name in ('first', *there)}
    for name in ('first', 'empty'):
        assert f"create_model('hf-hub:user/{name}'" in cards[name]
        assert f'\n# {name}\n' in cards[name]
        assert 'USER/NAME' not in cards[name]
        assert cards[name].endswith(f'{END}\n\nOf the folder.\n')
    assert cards['own'].endswith('\n---\nOurs, USER/NAME.')
    assert 'library_name: timm\n' in cards['own']
    for name, reason in (('long', 'more than 1048576 bytes'), ('aliases', "anchor 'a'")):
        assert re.match(
            f"PushError: Pushing to 'user/{name}' failed: the README.md on the Hub cannot be read: "
            f'.*{reason}.* Correct or delete it there.$',
            done[name],
        )
        assert cards[name] == there[name]
        assert len(hub.history(f'user/{name}')) == 2
    assert re.match(r"ValueError: 'folder/README\.md' is a symbolic link", done['link'])


def test_names():
    with pytest.raises(ValueError, match=r"'trashnet-isqrt_cov' is no released.*-isqrt-cov"):
        timm_fisher.from_pretrained('trashnet-isqrt_cov')
    with pytest.raises(ValueError, match='is no released model, no folder, and no USER/NAME'):
        timm_fisher.from_pretrained('a/b/c')
    with pytest.raises(TypeError, match="argument 'metric'"):
        timm_fisher.push_to_hub(timm_fisher.create_model('test_resnet'), 'user/x', metric={})
