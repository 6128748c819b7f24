"""Whatever stands in config.json, loading gives a model or a `LoadError`, soon and in little
memory, and reads nothing but the saved model."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_models import HEADS, LOADERS

import timm_fisher
from timm_fisher import LoadError
from timm_fisher.hub import config as hub_config
from timm_fisher.hub import load as hub_load

GIGABYTE = 10**9


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def no_network(*_, **__):
        raise OSError('the network was touched')

    for place in ('timm_fisher.hub.weights', 'timm.models._hub'):
        monkeypatch.setattr(f'{place}.hf_hub_download', no_network)
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', no_network)
    monkeypatch.setattr('timm.models._builder.download_cached_file', no_network)


def peak():
    """Most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


WORDS = sorted(
    {
        *('architecture num_classes num_features model_args pretrained_cfg label_names').split(),
        *('label_descriptions labels url file source state_dict hf_hub_id custom_load').split(),
        *(
            'backbone head head_kwargs backbone_kwargs stage class_token last_stride in_chans'
        ).split(),
        *('img_size drop_rate drop_path_rate backbone_weights sha256 name normalize seed').split(),
        *('code_dim hidden components blocks iterations reduce_dim rank input_size mean').split(),
        *('fixed_input_size first_conv classifier label_offset crop_pct output_stride').split(),
        *('layers channels stem_width norm_layer act_layer block aa_layer drop_block_rate').split(),
        *('embed_dim depth num_heads window_size patch_size dynamic_img_size pos_embed').split(),
        *('avg gem bilinear netvlad sparse_fisher 3g gsnmf dbm_idfk append keep tf').split(),
        *('test_resnet test_vit test_vit3 test_efficientnet test_byobnet test_mambaout').split(),
        *('local-dir:.. hf-hub:evil/x os:system ../x /etc/passwd timm_fisher relu').split(),
    }
)
IMAGE_WORDS = [
    *('input_size test_input_size min_input_size fixed_input_size mean std crop_pct').split(),
    *('test_crop_pct interpolation crop_mode license num_classes first_conv classifier').split(),
    *('url file source state_dict hf_hub_id custom_load label_offset pool_size').split(),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.sampled_from([10**k for k in range(2, 20)])
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
KEYS = st.sampled_from(WORDS) | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
# What is often refused only late, or not at all.
MILD = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats(-1, 2)
    | st.sampled_from(WORDS)
    | st.lists(st.integers(1, 70), max_size=4)
)
BACKBONES = [name for name in WORDS if name.startswith('test_')]


def often(valid):
    """What is allowed, three times in four."""
    return st.integers(0, 3).flatmap(lambda k: valid if k else MILD)


ARGUMENTS = st.fixed_dictionaries(
    {
        'backbone': st.sampled_from(BACKBONES),
        'head': often(st.sampled_from(['avg', 'avg + gem@-2', 'netvlad', *HEADS])),
    },
    optional={
        'head_kwargs': often(st.dictionaries(KEYS, MILD, max_size=1)),
        'backbone_kwargs': often(st.dictionaries(KEYS, MILD, max_size=1)),
        'num_classes': often(st.integers(0, 9)),
        'in_chans': often(st.integers(1, 4)),
        'img_size': often(st.integers(32, 96)),
        'drop_rate': often(st.floats(0, 1)),
        'drop_path_rate': often(st.floats(0, 1)),
        'stage': often(st.integers(-4, -1)),
        'class_token': often(st.sampled_from(['drop', 'keep', 'append'])),
        'last_stride': often(st.just(1)),
        'backbone_weights': often(st.just({'hf_hub_id': 'evil/x', 'sha256': '0'})),
    },
)
# Of our architecture, with a backbone: these come past timm, and often past the first checks.
OURS = st.fixed_dictionaries(
    {
        'architecture': st.just('timm_fisher'),
        'model_args': often(ARGUMENTS) | st.dictionaries(KEYS, JSON, max_size=5),
        'pretrained_cfg': st.just({})
        | st.dictionaries(st.sampled_from(IMAGE_WORDS), MILD | JSON, max_size=3),
    },
    optional={'label_names': JSON, 'label_descriptions': JSON},
)
CONFIGS = often(OURS) | JSON
CHANGES = st.lists(
    st.tuples(
        st.integers(0),
        st.sampled_from(['replace', 'delete', 'insert', 'nudge', 'nudge', 'nudge']),
        KEYS,
        MILD | JSON,
    ),
    min_size=1,
    max_size=4,
)
OFTEN = settings(
    deadline=20_000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(value):
    """Every container in a JSON value with each of its keys."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield value, key
            yield from places(inner)


def nudge(value):
    """A value like this one, which is often taken."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 1.1
    return value[:-1] if isinstance(value, list) else value


def mutate(config, changes):
    """Changed copy of a config, whose architecture stays."""
    config = copy.deepcopy(config)
    for number, change, name, value in changes:
        choices = list(places(config))
        if not choices:
            break
        container, key = choices[number % len(choices)]
        value = copy.deepcopy(value)  # one value may stand at two places
        if change == 'delete':
            del container[key]
        elif change == 'replace':
            container[key] = value
        elif change == 'nudge':
            container[key] = nudge(container[key])
        elif isinstance(container, dict):
            container[name] = value
        else:
            container.insert(key, value)
    return {**config, 'architecture': 'timm_fisher'}


@pytest.fixture(scope='module')
def watch():
    """Files outside of the model and of what is installed, connections, and commands."""
    found, allowed = [], []
    installed = [sys.prefix, sys.base_prefix, os.path.dirname(timm_fisher.__path__[0]), '/dev/']

    def hook(event, arguments):
        if not allowed:
            return
        if event == 'open' and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(tuple(map(os.path.realpath, [*installed, *allowed]))):
                found.append((event, path))
        elif event in ('socket.connect', 'subprocess.Popen', 'os.system', 'pickle.find_class'):
            found.append((event, *arguments))

    sys.addaudithook(hook)  # for ever: it is idle once nothing is allowed

    def during(folder):
        found.clear()
        allowed[:] = [str(folder)] if folder else []
        return found

    yield during
    allowed.clear()


def load_or_refuse(folder, watch):
    """Load in three ways. What timm raises before it calls us is its own."""
    for name, load in LOADERS.items():
        found = watch(folder)
        before = peak()
        try:
            load(folder)
        except LoadError:
            pass
        except Exception as error:
            trace, functions = error.__traceback__, []
            while trace is not None:
                functions.append(trace.tb_frame.f_code.co_name)
                trace = trace.tb_next
            if name == 'from_pretrained' or 'timm_fisher' in functions:
                raise
        finally:
            grown = peak() - before
            seen = list(found)
            watch(None)
        assert not seen
        assert grown < GIGABYTE


@pytest.fixture
def entered(monkeypatch):
    """How often each step of loading was entered."""
    counts = Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(hub_config, '_check_heads')
    count(hub_config, '_check_images')
    count(hub_load, '_build')
    return counts


def fuzz(examples):
    """Tests of random configurations, with this many examples. Most of them, loaded in three ways,
    come as far as to our checks."""
    few = settings(OFTEN, max_examples=examples)

    def test_random(originals, tmp_path, watch, entered):
        @few
        @given(config=CONFIGS)
        def load_random(config):
            shutil.copytree(originals / 'sparse_fisher', tmp_path / 'a', dirs_exist_ok=True)
            (tmp_path / 'a' / 'config.json').write_text(json.dumps(config))
            load_or_refuse(tmp_path / 'a', watch)

        load_random()
        assert entered['_check_heads'] > examples / 4
        assert entered['_check_images'] > examples / 8

    @pytest.mark.parametrize('head', HEADS)
    def test_mutated(originals, tmp_path, watch, entered, head):
        @settings(few, max_examples=examples // 8)
        @given(changes=CHANGES)
        def load_mutated(changes):
            shutil.copytree(originals / head, tmp_path / head, dirs_exist_ok=True)
            config = json.loads((originals / head / 'config.json').read_text())
            (tmp_path / head / 'config.json').write_text(json.dumps(mutate(config, changes)))
            load_or_refuse(tmp_path / head, watch)

        load_mutated()
        assert entered['_check_images'] > examples // 8
        assert entered['_build'] > examples // 16

    return test_random, test_mutated


test_random_config, test_mutated_config = fuzz(40)
test_many_random_configs, test_many_mutated_configs = map(pytest.mark.slow, fuzz(2000))
