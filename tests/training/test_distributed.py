"""Two processes compute what one does."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import distributed_checks
import pytest
import torch
from conftest import TINY
from PIL import Image
from run_checks import (
    TWO_STAGES,
    UNSUPERVISED,
    check_run,
    check_same_runs,
    cross_entropy_by_plain_timm,
    finish,
    read_log,
    read_metrics,
    unsupervised_loss_by_plain_timm,
)


def test_run_on_two_processes(launch, images, tmp_path):
    """51 test images, 26 of them on one rank: each is counted once, with rank 0's batch norms."""
    stages = {'first': {**UNSUPERVISED, 'epochs': 1}, **TWO_STAGES}
    options = {**TINY, 'data_dir': images, 'stages': stages, 'head': 'sparse_fisher'}
    options |= {'output': tmp_path / 'run', 'cache_dir': tmp_path / 'cache'}
    finish(launch('-m timm_fisher.training', processes=2, **options))
    check_run(tmp_path / 'run', images, head='sparse_fisher', stages=stages, processes=2)
    loss = cross_entropy_by_plain_timm(tmp_path / 'run/last', images, 'val')
    assert read_log(tmp_path / 'run')[-1]['val_loss'] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_signal_to_one_rank_ends_both(launch, few_images, tmp_path):
    """They stop at the same step, and resume exactly."""
    stages = {'long': {'train': 'head', 'epochs': 30, 'lr': 0.001}}
    options = {**TINY, 'data_dir': few_images, 'stages': stages, 'test_split': None, 'cache': False}
    expected, run = tmp_path / 'expected', tmp_path / 'run'
    finish(launch(processes=2, output=expected, **options))
    process = launch(processes=2, output=run, **options)
    while not (run / 'log.jsonl').exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    ranks = [pid for pid in processes() if parent(Path(f'/proc/{pid}')) == process.pid]
    os.kill(max(ranks), signal.SIGTERM)  # the second one
    text, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert f"The run in '{run}' was stopped by a signal. With --resume true it continues" in text
    finish(launch(processes=2, output=run, resume=True, **options))
    check_same_runs(run, expected)


def processes():
    return [int(path.name) for path in Path('/proc').glob('[0-9]*')]


def parent(process):
    """Of one in /proc; None if it has ended."""
    try:
        return int((process / 'stat').read_text().rpartition(')')[2].split()[1])
    except OSError:
        return None


@pytest.mark.slow
def test_unsupervised_run_on_two_processes(launch, images, tmp_path):
    """Through the network, too, where DDP finds parameters that the loss does not reach."""
    stages = {'first': {**UNSUPERVISED, 'train': 'all'}}
    options = {**TINY, 'data_dir': images, 'stages': stages, 'head': 'sparse_fisher'}
    finish(launch(processes=2, output=tmp_path / 'run', **options))
    expected = unsupervised_loss_by_plain_timm(tmp_path / 'run/model', images, 'test')
    metrics = read_metrics(tmp_path / 'run')
    assert metrics['test']['unsupervised_loss'] == pytest.approx(expected, rel=1e-5)
    assert metrics['test']['samples'] == 51
    assert metrics['processes'] == 2
    with Image.open(tmp_path / 'run/curve.png') as curve:
        curve.load()


@pytest.mark.slow
def test_two_nodes(launch, few_images, tmp_path):
    """Two launchers that meet on the loopback train what one trains with two processes. If one is
    killed, the other ends with a sentence, and both resume exactly."""
    stages = {'long': {'train': 'head', 'epochs': 40, 'lr': 0.001}}
    options = {**TINY, 'data_dir': few_images, 'stages': stages, 'test_split': None, 'cache': False}
    options |= {'head': 'gmm_fisher', 'head_kwargs': {'reduce_dim': 8, 'components': 4}}
    expected, run = tmp_path / 'expected', tmp_path / 'run'
    finish(launch(processes=2, output=expected, **options))

    def start(**more):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        return [launch(node=(rank, port), output=run, **options, **more) for rank in range(2)]

    nodes = start()
    while not (run / 'log.jsonl').exists():
        assert nodes[0].poll() is None, nodes[0].communicate()
        time.sleep(0.02)
    of_node = {nodes[1].pid}  # the launcher, and its worker, which has a session of its own
    of_node |= {pid for pid in processes() if parent(Path(f'/proc/{pid}')) == nodes[1].pid}
    for pid in of_node:
        os.kill(pid, signal.SIGKILL)
    text, _ = nodes[0].communicate(timeout=120)
    assert nodes[0].returncode != 0
    assert 'Another process of this run has ended' in text
    assert 'With --resume true it continues' in text
    for node in start(resume=True):
        finish(node)
    check_same_runs(run, expected)


@pytest.fixture(scope='module')
def ranks(launch, tmp_path_factory):
    """What distributed_checks.py computes on each of two ranks."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp('ranks')
    finish(launch('tests/distributed_checks.py', processes=2, output=output))
    results = [torch.load(output / f'rank{rank}.pt') for rank in range(2)]
    assert [result['world_size'] for result in results] == [2, 2]
    return results


@pytest.mark.parametrize('head', distributed_checks.HEADS)
def test_fit_on_two_ranks_equals_the_fit_on_one(ranks, head):
    expected = distributed_checks.fitted(head)
    for rank in ranks:
        torch.testing.assert_close(rank['fit'][head], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('head', distributed_checks.FITTED)
def test_fit_to_shards_on_two_ranks_is_that_to_the_folder(ranks, head):
    """To the bit, as on one rank (tests/fitting/test_fit.py)."""
    for rank in ranks:
        found = rank['fit to a stream'][head]
        torch.testing.assert_close(found, ranks[0]['fit'][head], atol=0, rtol=0)


def test_fit_where_one_rank_has_all_images(ranks):
    expected = distributed_checks.fitted_by_one_rank()
    for rank in ranks:
        torch.testing.assert_close(rank['fit of one rank'], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('head', distributed_checks.HEADS)
def test_gradients_on_two_ranks_equal_those_on_one(ranks, head):
    expected = distributed_checks.gradients(
        distributed_checks.WithLoss(distributed_checks.create(head))
    )
    assert 'classifier.weight' in expected
    assert any(name.startswith('backbone.') for name in expected)
    for rank in ranks:
        torch.testing.assert_close(rank['gradients'][head], expected, atol=1e-5, rtol=1e-5)


def test_own_update_on_two_ranks_equals_that_on_the_whole_batch(ranks):
    expected = distributed_checks.updated()
    for rank in ranks:
        torch.testing.assert_close(rank['updated'], expected, atol=1e-6, rtol=1e-6)
    alone = distributed_checks.updated(0, 2)  # of half of the images, without the other rank
    assert (alone['basis'] - expected['basis']).abs().max() > 0.01


def test_metric_learning_on_two_ranks_equals_that_on_the_whole_batch(ranks):
    """Pairs of images on different ranks count, and the weights of a loss are trained alike."""
    torch.manual_seed(0)
    expected = distributed_checks.metric_gradients(distributed_checks.metric_learning())
    assert 'loss.proxies' in expected
    for rank in ranks:
        torch.testing.assert_close(rank['metric_gradients'], expected, atol=1e-5, rtol=1e-4)
    half = distributed_checks.metric_gradients(distributed_checks.metric_learning(), 0, 2)
    assert (half['loss.proxies'] - expected['loss.proxies']).abs().max() > 1e-3
