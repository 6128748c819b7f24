"""Heads by name: plug-ins, built-in heads, and what goes wrong with them."""

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import timm_fisher
from timm_fisher.registry import GROUP, check_output

TESTS = Path(__file__).parent
PYPROJECT = tomllib.loads((TESTS.parent / 'pyproject.toml').read_text())
BUILT_IN = PYPROJECT['project']['entry-points'][GROUP]

USE_PLUGIN = """
import json, sys
import timm, timm_fisher

heads = timm_fisher.list_heads()
imported = [name for name in sys.modules if name.startswith(('timm_fisher.heads', 'plugin_'))]

import torch
model = timm_fisher.create_model('test_resnet', head='plugin_max', largest=2, num_classes=3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
before = {name: value.clone() for name, value in model.named_parameters()}
torch.nn.functional.cross_entropy(model(x), y).backward()
optimizer.step()
moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]

timm_fisher.save_model(model, sys.argv[1])
loaded = timm.create_model('local-dir:' + sys.argv[1], pretrained=True)
print(json.dumps({
    'heads': heads,
    'imported': imported,
    'moved': moved,
    'loaded': [type(loaded.head).__module__, loaded.head.largest],
    'equal': torch.equal(loaded.eval()(x), model.eval()(x)),
}))
"""


@pytest.fixture(scope='session')
def plugin(tmp_path_factory):
    """What a fresh process sees that has the package in tests/plugin installed by pip."""
    folder = tmp_path_factory.mktemp('plugin')
    shutil.copytree(TESTS / 'plugin', folder / 'source')  # pip builds inside the source folder
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    offline = ['--no-index', '--no-deps', '--no-build-isolation']
    run([*pip, *offline, '--target', folder / 'site', folder / 'source'], os.environ)
    paths = [str(folder / 'site'), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    out = run([sys.executable, '-c', USE_PLUGIN, folder / 'saved'], environment)
    return json.loads(out.splitlines()[-1])


def run(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_listing_finds_the_plugin_and_imports_no_head(plugin):
    assert set(plugin['heads']) == {'plugin_max', *BUILT_IN}
    assert plugin['heads'] == sorted(plugin['heads'])
    assert plugin['imported'] == []


def test_plugin_trains_and_comes_back_from_a_saved_model(plugin):
    assert {'backbone.conv1.0.weight', 'classifier.weight'} <= set(plugin['moved'])
    assert plugin['loaded'] == ['plugin_max', 2]
    assert plugin['equal']


def test_two_distributions_with_one_name(install):
    for distribution in ('maker_a', 'maker_b'):
        install(distribution, 'pool', f'{distribution}_pool:Pool', 'raise ImportError')
    assert timm_fisher.list_heads().count('pool') == 1
    with pytest.raises(ValueError, match=r"Head 'pool' .* 'maker_a' and 'maker_b'"):
        timm_fisher.get_head('pool')


def test_a_plugin_cannot_take_the_name_of_a_built_in_head(install):
    install('maker', 'avg', 'maker_avg:Average')
    with pytest.raises(ValueError, match=r"'maker' and 'timm.fisher'"):
        timm_fisher.get_head('avg')


@pytest.mark.parametrize(
    ('source', 'cause'),
    [
        ('import no_such_module', "ModuleNotFoundError: No module named 'no_such_module'"),
        ('1 / 0', 'ZeroDivisionError'),
        ('class Pole: pass', "AttributeError.*'Pool'"),
    ],
)
def test_a_broken_plugin_hurts_only_who_asks_for_it(install, source, cause):
    install('maker', 'broken', 'maker_broken:Pool', source)
    assert 'broken' in timm_fisher.list_heads()
    assert timm_fisher.create_model('test_resnet', head='avg', num_classes=2).num_classes == 2
    with pytest.raises(ImportError, match=f"'broken' of the distribution 'maker'.*{cause}"):
        timm_fisher.create_model('test_resnet', head='broken')


@pytest.mark.parametrize(
    'source', ['import torch\nclass Pool(torch.nn.Module): ...', 'def Pool(in_features): ...']
)
def test_an_entry_point_must_be_a_pooling_head(install, source):
    install('maker', 'odd', 'maker_odd:Pool', source)
    with pytest.raises(TypeError, match=r"'maker' .*not a subclass of timm_fisher\.PoolingHead"):
        timm_fisher.get_head('odd')


def test_unknown_head():
    with pytest.raises(ValueError, match=r"'sparse_fischer'\. Did you mean 'sparse_fisher'"):
        timm_fisher.get_head('sparse_fischer')
    with pytest.raises(ValueError, match=r'Installed: .*avg.*sparse_fisher'):
        timm_fisher.get_head('zzz')


def test_head_that_is_no_name():
    with pytest.raises(TypeError, match=r"by its name, one of \[.*'avg'.*not by \[\{"):
        timm_fisher.get_head([{'name': 'avg'}])


def test_a_config_cannot_name_a_module():
    with pytest.raises(ValueError, match='Unknown head'):
        timm_fisher.get_head('timm_fisher.heads.avg:Average')


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (
            {'cod_dim': 3},
            r"Head 'sparse_fisher' has no argument 'cod_dim'.*mean 'code_dim'",
        ),
        ({'in_features': 3}, "Head 'sparse_fisher' has no argument 'in_features'"),
        ({'name': 'x'}, "Head 'sparse_fisher' has no argument 'name'"),
    ],
)
def test_unknown_argument(arguments, error):
    with pytest.raises(TypeError, match=error):
        timm_fisher.create_head('sparse_fisher', 8, **arguments)


def test_missing_argument(install):
    source = """
        from timm_fisher import PoolingHead
        class Pool(PoolingHead):
            def __init__(self, in_features, *, width): ...
        """
    install('maker', 'wide', 'maker_wide:Pool', source)
    with pytest.raises(TypeError, match="Head 'wide' needs the argument 'width'"):
        timm_fisher.create_head('wide', 8)


POOL = """
    import torch
    from timm_fisher import PoolingHead
    class Pool(PoolingHead):
        def __init__(self, in_features):
            super().__init__()
            self.in_features, self.out_features = in_features, 2
            {init}
        def forward(self, x):
            return {forward}
    """


@pytest.mark.parametrize(
    ('init', 'error', 'message'),
    [
        ("raise ValueError('too wide')", ValueError, r'cannot be built: too wide$'),
        ("raise UnicodeError('too wide')", ValueError, r'cannot be built: too wide$'),
        ("in_features + 'x'", TypeError, 'cannot be built: unsupported operand'),
        ('1 / 0', RuntimeError, 'cannot be built: ZeroDivisionError: division by zero'),
        ('del self.out_features', ValueError, 'must set .* sets 8 and None'),
        ('self.out_features = 2.0', ValueError, r'must set .* sets 8 and 2\.0'),
        ('self.out_features = 0', ValueError, 'must set .* sets 8 and 0'),
        ('self.in_features = 7', ValueError, 'must set in_features to 8 .* sets 7 and 2'),
    ],
)
def test_a_head_that_cannot_be_built_is_named(install, init, error, message):
    install('maker', 'odd', 'maker_odd:Pool', POOL.format(init=init, forward='x'))
    with pytest.raises(error, match=f"^Head 'odd' of the distribution 'maker' {message}"):
        timm_fisher.create_head('odd', 8)


@pytest.mark.parametrize(
    ('forward', 'error', 'message'),
    [
        ('(x.mean(1)[:, :2], None)', TypeError, r'returns a tuple, not a tensor \[2, 2\] of desc'),
        ('x.mean(1)', ValueError, r'returns a tensor \[2, 8\], not a tensor \[2, 2\]'),
        ('x[..., :2]', ValueError, r'returns a tensor \[2, 100, 2\], not'),
        ('x.mean((0, 1))[None, :2]', ValueError, r'returns a tensor \[1, 2\], not'),
        # What does not run on the meta device.
        ('x.mean(1)[:, : 3 + int(x.sum() < 0)]', ValueError, r'returns a tensor \[2, 3\], not'),
    ],
)
def test_a_head_that_returns_something_else_is_named(install, forward, error, message):
    install('maker', 'odd', 'maker_odd:Pool', POOL.format(init='torch.rand(1)', forward=forward))
    state = torch.get_rng_state()
    with pytest.raises(error, match=f"^Head 'odd' of the distribution 'maker' {message}"):
        check_output('odd', 8, {})
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(error, match="'odd' of the distribution 'maker' returns a"):
        timm_fisher.create_model('test_resnet', 'odd')


@pytest.mark.parametrize('name', BUILT_IN)
def test_built_in_heads_return_what_they_say(name):
    with torch.device('meta'):
        head = timm_fisher.create_head(name, 32)
        x = torch.empty(3, max(5, head.least_descriptors), 32)
        asked = inspect.signature(head.forward).parameters
        context = {'class_token': x[:, 0]} if 'class_token' in asked else {}
        assert head(x, **context).shape == (3, head.out_features)
    check_output(name, 32, {})


def test_the_look_at_an_output_takes_no_memory():
    """A saved config may ask for descriptors of any length, of the backbone `pixels`."""
    check_output('avg', 2**40, {})


@pytest.mark.parametrize('in_features', [0, -3, 2.0, '8', True, None])
def test_in_features_is_a_size(in_features):
    with pytest.raises(ValueError, match=f'in_features .* not {in_features!r}'):
        timm_fisher.create_head('avg', in_features)


def test_without_an_installation(monkeypatch):
    monkeypatch.setattr(sys, 'path', [])
    assert timm_fisher.list_heads() == []
    with pytest.raises(ValueError, match=r'timm_fisher is not installed\. Run `pip install'):
        timm_fisher.get_head('avg')


def test_installed_heads_are_those_of_pyproject():
    """Tests over `list_heads()` would pass over a head that was added after the installation."""
    missing = set(BUILT_IN) - set(timm_fisher.list_heads())
    assert not missing, f'{missing} not installed: run `pip install --no-deps -e .` again'


def test_every_file_of_a_head_is_registered():
    package = TESTS.parent / 'timm_fisher' / 'heads'
    files = {path.stem for path in package.glob('*.py')} - {'__init__'}
    assert files == {value.partition(':')[0].rpartition('.')[2] for value in BUILT_IN.values()}


@pytest.mark.parametrize('name', BUILT_IN)
def test_a_built_in_head_is_complete(name):
    """The checklist: one file, one line in pyproject.toml, one reference, a section of the
    catalogue, a plain signature."""
    module, _, class_name = BUILT_IN[name].partition(':')
    package, _, file = module.rpartition('.')
    assert package == 'timm_fisher.heads'
    head = getattr(importlib.import_module(module), class_name)
    assert head.__module__ == module, 'a head lives in the file that its entry point names'
    assert (TESTS / 'references' / f'{file}.py').is_file(), 'no float64 reference'
    catalogue = (TESTS.parent / 'timm_fisher' / 'heads' / 'README.md').read_text()
    assert f'| [`{name}`](#{name}) |' in catalogue, 'no row in the table of heads/README.md'
    assert f'\n## `{name}`\n' in catalogue, 'no section in heads/README.md'

    first, *others = inspect.signature(head).parameters.values()
    assert first.name == 'in_features'
    assert first.default is inspect.Parameter.empty
    for parameter in others:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter
        assert parameter.default is not inspect.Parameter.empty, parameter
        default = parameter.default
        default = list(default) if isinstance(default, tuple) else default  # a list, if it is saved
        assert json.loads(json.dumps(default)) == default, parameter
