"""recipes/papers/deep_fisher_svm.py: the SVM, the gradient, Algorithm 1, and what a run leaves."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from conftest import ENVIRONMENT, TINY, command_line, load_script, write_images
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader

import timm_fisher
from timm_fisher import ListStream
from timm_fisher.heads.gmm_fisher import GMMFisher, Mixture
from timm_fisher.numerics.linalg import power_l2

SMALL = {'reduce_dim': 6, 'components': 4, 'iterations': 3, 'C': 100.0}
SMALL |= {key: value for key, value in TINY.items() if key != 'img_size'} | {'img_size': 32}


@pytest.fixture(scope='module')
def script(recipes):
    return load_script('papers/deep_fisher_svm')


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """`run(mode='multi', ...)` runs the script in this process; returns the output folder."""
    from accelerate.state import AcceleratorState, GradientState

    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def start(**options):
        options = {'output': tmp_path / 'run', 'cache_dir': tmp_path / 'cache', **SMALL, **options}
        monkeypatch.setattr(sys, 'argv', ['deep_fisher_svm.py', *command_line(options)])
        reset()
        script.main()
        return options['output']

    yield start
    reset()


def synthetic(images: int, seed: int, number: int = 20, d: int = 5):
    """Descriptors `[images, number, d]` of three classes that differ in spread; signs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    spread = 1 + 0.25 * torch.nn.functional.one_hot(labels, d)[:, None]
    y = spread * torch.randn(images, number, d, generator=generator)
    return y, torch.where(labels[:, None] == torch.arange(3), 1.0, -1.0).double()


@pytest.fixture
def problem(script):
    """A kernel after EM, and data."""

    def make(dtype=torch.float32, bias=False):
        found = {name: synthetic(90, i) for i, name in enumerate(('train', 'val', 'test'))}
        head = GMMFisher(5, reduce_dim=None, components=4, l2_descriptors=False)
        head.fit(ListStream([found['train'][0]]))
        y = {name: head.reduce(x).detach().to(dtype) for name, (x, _) in found.items()}
        signs = {name: each for name, (_, each) in found.items()}
        return script.FisherKernel(head.to(dtype), bias=bias), script.Data(y, signs, list('abc'))

    return make


def random_svms(kernel, data, bias=False):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(kernel.out_features + bias, 3, generator=generator).double()


# The SVM


@pytest.mark.parametrize('images', [30, 200])  # fewer and more than features
def test_svm_minimises_equation_4(script, images):
    generator = torch.Generator().manual_seed(0)
    phi = torch.nn.functional.normalize(torch.randn(images, 60, generator=generator).double())
    signs = torch.where(torch.rand(images, 2, generator=generator) < 0.3, 1.0, -1.0).double()
    costs = [7.0, 300.0]

    def equation_4(w):
        hinge = (1 - signs * (phi @ w)).clamp_min(0).square()
        return 0.5 * w.square().sum(0) + torch.tensor(costs) / images * hinge.sum(0)

    w = script.solve_svms(phi, signs, costs).requires_grad_()
    at_solution = equation_4(w)
    (gradient,) = torch.autograd.grad(at_solution.sum(), w)
    assert (gradient.norm(dim=0) < 1e-4 * w.norm(dim=0)).all()

    other = torch.zeros(60, 2, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([other], max_iter=500, tolerance_grad=1e-10, tolerance_change=0,
                              line_search_fn='strong_wolfe')  # fmt: skip

    def closure():
        lbfgs.zero_grad()
        equation_4(other).sum().backward()
        return equation_4(other).sum()

    lbfgs.step(closure)
    torch.testing.assert_close(at_solution, equation_4(other), rtol=1e-6, atol=0)


def test_costs_are_chosen_on_validation(script, problem, monkeypatch):
    monkeypatch.setattr(script, 'C_GRID', (1.0, 100.0, 1000.0))
    kernel, data = problem()
    config = script.DeepFisher(mode='single')
    costs = script.choose_costs(kernel, data, config)
    train, val = kernel.phi(data.y['train']), kernel.phi(data.y['val'])
    for c, chosen in enumerate(costs):
        found = {}
        for cost in script.C_GRID:
            w = script.solve_svms(train, data.signs['train'][:, [c]], [cost])
            decided = (val.double() @ w)[:, 0]
            found[cost] = average_precision_score(data.signs['val'][:, c] > 0, decided)
        assert found[chosen] == max(found.values())
    config.mode = 'multi'
    assert len(set(script.choose_costs(kernel, data, config))) == 1
    config.C = 5.0
    assert script.choose_costs(kernel, data, config) == [5.0] * 3


# The gradient


def loss_of(kernel, y, w, signs, mixture):
    """Written out with the head's own parameters, float64."""
    values = dict(kernel.named_parameters()) | mixture._asdict()
    phi = power_l2(torch.func.functional_call(kernel, values, y))
    if kernel.bias:
        phi = torch.cat([phi, torch.ones(len(phi), 1).to(phi)], 1)
    return (1 - signs * (phi @ w)).clamp_min(0).square().sum()


@pytest.mark.parametrize('bias', [False, True])
def test_gradient_equals_autograd_and_finite_differences(script, problem, monkeypatch, bias):
    monkeypatch.setattr(script, 'BATCH', 32)  # several batches, the last one smaller
    kernel, data = problem(torch.float64, bias)
    y, signs, w = data.y['train'], data.signs['train'], random_svms(kernel, data, bias)
    found = kernel.gradient(y, kernel.psi(y), w, signs)
    at = Mixture(*(each.requires_grad_() for each in kernel.get()))
    expected = torch.autograd.grad(loss_of(kernel, y, w, signs, at), at)
    for name, a, b in zip(Mixture._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    assert not any(parameter.requires_grad for parameter in kernel.parameters())

    for i, name in enumerate(Mixture._fields):
        direction = torch.randn_like(found[i])
        values = []
        for eta in (1e-8, -1e-8):  # the square root is steep at zero
            moved = at._replace(**{name: at[i].detach() + eta * direction})
            values.append(loss_of(kernel, y, w, signs, moved).item())
        slope = (values[0] - values[1]) / 2e-8
        assert slope == pytest.approx((found[i] * direction).sum().item(), rel=1e-4)


def test_gradient_of_a_sample_is_right_on_average(problem):
    """Over four samples that share out the descriptors it is exact."""
    kernel, data = problem(torch.float64)
    y, signs, w = data.y['train'], data.signs['train'], random_svms(kernel, data)
    whole = kernel.gradient(y, kernel.psi(y), w, signs)
    samples = torch.rand(y.shape[:2]).argsort(1).chunk(4, 1)
    parts = [kernel.gradient(y, kernel.psi(y), w, signs, sample) for sample in samples]
    for i, expected in enumerate(whole):
        torch.testing.assert_close(sum(part[i] for part in parts) / 4, expected)


def test_gradient_of_all_tasks_is_the_sum(problem):
    kernel, data = problem(torch.float64)
    y, signs, w = data.y['train'], data.signs['train'], random_svms(kernel, data)
    together = kernel.gradient(y, kernel.psi(y), w, signs)
    alone = [kernel.gradient(y, kernel.psi(y), w[:, [c]], signs[:, [c]]) for c in range(3)]
    for i, expected in enumerate(together):
        torch.testing.assert_close(sum(each[i] for each in alone), expected)


# Algorithm 1


@pytest.mark.parametrize(
    ('task', 'bias', 'fraction'),
    [([0], False, 0.5), ([1], True, 1.0), ([0, 1, 2], False, 1.0), ([0, 1, 2], True, 0.5)],
)
def test_objective_falls(script, problem, task, bias, fraction):
    kernel, data = problem(bias=bias)
    config = script.DeepFisher(iterations=5, descriptor_fraction=fraction, tolerance=0.0)
    before, rows = kernel.get(), []
    found = script.learn(kernel, data, task, 100.0, config, 'all', rows.append)

    assert [row['iteration'] for row in rows] == list(range(found.iterations + 1))
    assert found.iterations == 5
    trace = [value for row in rows for value in (row['objective'], row.get('objective_after_step'))]
    assert all(later < earlier for earlier, later in pairwise(trace[:-1]))
    assert trace[-2] < 0.95 * trace[0]

    # It is eq. 6, and the mixtures are those of the rows.
    for mixture, row in ((before, rows[0]), (found.last, rows[-1]),
                         (found.best, rows[found.best_iteration])):  # fmt: skip
        kernel.set(mixture)
        phi = kernel.phi(data.y['train']).double()
        w = script.solve_svms(phi, data.signs['train'][:, task], [100.0] * len(task))
        hinge = (1 - data.signs['train'][:, task] * (phi @ w)).clamp_min(0)
        value = 0.5 * w.square().sum() + 100 / 90 * hinge.square().sum()
        assert row['objective'] == pytest.approx(value.item(), rel=1e-6)
    assert rows[found.best_iteration]['val_ap'] == max(row['val_ap'] for row in rows)
    assert found.last.log_weights.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_learning_stops_when_little_changes(script, problem):
    kernel, data = problem()
    config = script.DeepFisher(iterations=50, tolerance=0.02)
    rows = []
    found = script.learn(kernel, data, [0, 1, 2], 100.0, config, 'all', rows.append)
    assert 0 < found.iterations < 50
    falls = [1 - later['objective'] / earlier['objective'] for earlier, later in pairwise(rows)]
    assert falls[-1] < 0.025
    assert min(falls[:-1]) > 0.015


def test_line_search_refuses_to_climb(script, problem):
    kernel, data = problem()
    y, signs = data.y['train'], data.signs['train']
    psi, old = kernel.psi(y), kernel.get()
    w = script.solve_svms(kernel.finish(psi), signs, [100.0] * 3)

    def loss():
        return script.squared_hinge(kernel.phi(y), w, signs).sum().item()

    before = loss()
    uphill = Mixture(*(-each for each in kernel.gradient(y, psi, w, signs)))
    assert script.line_search(kernel, uphill, loss, before, 10.0) == (0.0, before)
    torch.testing.assert_close(kernel.get(), old)
    step, after = script.line_search(kernel, kernel.gradient(y, psi, w, signs), loss, before, 1e-9)
    assert step > 1e-9
    assert after == loss() < before


def test_a_rise_is_an_error(script, problem, monkeypatch):
    kernel, data = problem()
    solve = script.solve_svms
    scales = iter([1.0, 2.0])
    monkeypatch.setattr(script, 'solve_svms', lambda *a: next(scales) * solve(*a))
    with pytest.raises(FloatingPointError, match=r'rose from .* in iteration 1'):
        script.learn(kernel, data, [0], 100.0, script.DeepFisher(), 'a', lambda row: None)


# A whole run


def decisions(folder, images, split):
    """As a stranger would compute them, who has the folder and timm."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    dataset = timm.data.create_dataset('', images, split=split, transform=transform)
    with torch.no_grad():
        found = [(model(x), y) for x, y in DataLoader(dataset, batch_size=17)]
    values, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return values.numpy(), labels.numpy(), model


def check_tables(folder, metrics):
    lines = (folder / 'tables.md').read_text().splitlines()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line[:1] == '|']
    assert len(rows) == 2 + 3 + 2
    assert len(rows[0]) == 10
    for name, *cells in rows[2:]:
        for i, group in enumerate(('val', 'test', 'transfer')):
            values = []
            for kind in ('base', 'deep'):
                found = metrics[group][kind]
                key = {'average': 'mean_average_precision'}.get(name, 'accuracy')
                values.append(100 * found['average_precision'].get(name, found[key]))
            base, deep = values
            expected = [f'{base:.1f}', f'{deep:.1f}', f'{deep - base:+.1f}']
            assert cells[3 * i : 3 * i + 3] == expected


@pytest.mark.parametrize('mode', [pytest.param('single', marks=pytest.mark.slow), 'multi'])
def test_run_leaves_everything(script, run, images, mode, monkeypatch):
    if mode == 'single':  # Matplotlib takes long; once is enough.
        monkeypatch.setattr(script, 'plot', lambda log, path: path.write_bytes(b''))
    folder = run(mode=mode, data_dir=images, bias=mode == 'single')
    metrics = json.loads((folder / 'metrics.json').read_text())
    check_tables(folder, metrics)
    assert metrics['images'] == {'train': 120, 'val': 33, 'test': 51}
    assert set(metrics['C'].values()) == {100.0}
    classes = ['blue', 'green', 'red']

    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    tasks = ['all'] if mode == 'multi' else classes
    assert list(dict.fromkeys(row['task'] for row in rows)) == tasks
    for task in tasks:
        trace = [row['objective'] for row in rows if row['task'] == task]
        assert len(trace) == 4
        assert trace == sorted(trace, reverse=True)

    # The saved models give the figures of table (b).
    names = ['model'] if mode == 'multi' else [f'model-{name}' for name in classes]
    assert {each.name for each in folder.iterdir()} == {
        'base', *names, 'config.yaml', 'log.jsonl', 'metrics.json', 'objective.png', 'tables.md',
    }  # fmt: skip
    for kind, folders in (('base', ['base']), ('deep', names)):
        found = [decisions(folder / each, images, 'test') for each in folders]
        scores, labels = np.concatenate([each[0] for each in found], 1), found[0][1]
        expected = metrics['transfer'][kind]
        assert np.mean(scores.argmax(1) == labels) == expected['accuracy']
        for c, name in enumerate(classes):
            precision = average_precision_score(labels == c, scores[:, c])
            assert precision == pytest.approx(expected['average_precision'][name], abs=1e-9)
        label_names = [name for *_, model in found for name in model.pretrained_cfg['label_names']]
        assert label_names == classes
        assert all((model.classifier.bias != 0).any() == (mode == 'single') for *_, model in found)

    config = script.parse_config([f'--config={folder / "config.yaml"}'])
    assert config.mode == mode
    assert config.iterations == 3
    with pytest.raises(ValueError, match='holds a finished run'):
        run(mode=mode, data_dir=images)


@pytest.mark.slow
def test_run_through_the_launcher(launch, images, tmp_path):
    options = {**SMALL, 'data_dir': images, 'output': tmp_path / 'run', 'cache_dir': tmp_path / 'c'}
    process = launch('recipes/papers/deep_fisher_svm.py', **options)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert (tmp_path / 'run' / 'tables.md').read_text() in text
    check_tables(tmp_path / 'run', json.loads((tmp_path / 'run' / 'metrics.json').read_text()))
    process = launch(
        'recipes/papers/deep_fisher_svm.py', processes=2, **options | {'output': tmp_path / 'two'}
    )
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 'runs in one process, not in 2' in text


@pytest.mark.parametrize('l2_descriptors', [False, True])
def test_saved_model_gives_the_decision_values(script, tmp_path, l2_descriptors):
    arguments = dict(reduce_dim=5, components=3, l2_descriptors=l2_descriptors)
    model = timm_fisher.create_model(
        'test_resnet', 'gmm_fisher', num_classes=7, stage=-2, img_size=32, **arguments
    ).eval()
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        x = model.descriptors(model.forward_features(images))
        model.head.fit(ListStream([x]))
        y = model.head.reduce(script.unit_length(x) if l2_descriptors else x)
    kernel = script.FisherKernel(model.head, bias=True)
    with torch.no_grad():
        torch.testing.assert_close(kernel.phi(y)[:, :-1], model.head(x), atol=1e-4, rtol=1e-4)
    kernel.set(Mixture(*(each + 0.1 * torch.rand_like(each) for each in kernel.get())))
    svms = torch.randn(31, 2).double()
    data_config = timm.data.resolve_input_data_config(model, {})
    script.save(model, kernel.get(), svms, tmp_path, ['one', 'two'], data_config)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    expected = kernel.phi(y).double() @ svms
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ({'mode': 'both'}, "'single'.*'multi'"),
        ({'iterations': 0}, 'iterations is 0; give 1 or more'),
        ({'descriptor_fraction': 0.0}, 'descriptor_fraction is 0.0; give more than 0'),
        ({'C': -1.0}, 'C is -1.0; give more than 0'),
        ({'code_dim': 5}, 'code_dim'),
    ],
)
def test_wrong_options(run, capsys, option, message):
    with pytest.raises(SystemExit):
        run(**option)
    assert re.search(message, capsys.readouterr().err)


def test_splits_must_hold_every_class(run, tmp_path):
    folder = write_images(tmp_path / 'few', train=4, val=2, test=2)
    for path in (folder / 'val' / 'red').iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"split 'val' has no images of \['red'\]"):
        run(data_dir=folder)
    for path in (folder / 'val').glob('*/*.png'):
        path.unlink()
    with pytest.raises(ValueError, match="split 'val'"):
        run(data_dir=folder)
