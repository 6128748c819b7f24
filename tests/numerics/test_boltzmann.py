"""Training of Boltzmann machines that are small enough to enumerate."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from references import dbm_idfk as reference
from torch import Tensor

from timm_fisher.numerics.boltzmann import Machine, train_machine


def two_bars() -> np.ndarray:
    """Chance of each state of 6 pixels: two bars of 3, mostly on or off together, where 15 % of
    the pixels are flipped."""
    v = reference.states([6])[0]
    chance = np.zeros(len(v))
    for left, right, share in ((0, 0, 0.4), (1, 1, 0.4), (0, 1, 0.15), (1, 0, 0.05)):
        flipped = np.abs(v - np.repeat([left, right], 3)).sum(1)
        chance += share * 0.15**flipped * 0.85 ** (6 - flipped)
    return chance


def known_machine() -> np.ndarray:
    """Chance of each state of 6 visible units of a DBM whose layers all depend on each other."""
    w1 = [[2.8, 3.1], [2.6, -3.6], [3.3, 1.3], [3.4, 1.3], [3.1, -1.7], [3.4, 2.6]]
    w2 = [[1.3, 1.6], [2.9, 2.9]]
    biases = [[-2.7, 0.5, -2.0, -2.1, -0.6, -2.9], [-11.0, -4.5], [-2.1, -2.4]]
    energy = reference.negative_energy(
        reference.states([6, 2, 2]), [np.array(w1), np.array(w2)], [np.array(b) for b in biases]
    )
    chance = np.exp(energy).reshape(64, -1).sum(1)
    return chance / chance.sum()


def rows_of(chance: np.ndarray, count: int = 5000) -> tuple[Tensor, np.ndarray]:
    """About `count` rows with these chances, and the share of each state among them."""
    counts = np.round(count * chance).astype(int)
    v = reference.states([int(np.log2(len(chance)))])[0]
    return torch.from_numpy(v.repeat(counts, axis=0)).float(), counts / counts.sum()


def flat(machine: Machine) -> np.ndarray:
    return torch.cat([p.double().flatten() for p in (*machine.weights, *machine.biases)]).numpy()


@pytest.mark.parametrize(
    ('chance', 'hidden', 'epochs', 'nats'),
    [(two_bars(), [3], 40, 0.015), (known_machine(), [2, 2], 25, 0.03)],
    ids=['RBM', 'DBM'],
)
def test_training_ends_near_the_maximum_of_the_likelihood(chance, hidden, epochs, nats):
    """`nats` is per image: eight seeds end within 0.0065 (RBM) and 0.022 (DBM). The gradient of the
    likelihood is the moments of the data minus those of the model, at most 0.017 there."""
    v, share = rows_of(chance)
    every = reference.statistics(reference.states([6, *hidden]))
    trained = flat(train_machine(v, hidden, epochs, learning_rate=0.05, seed=0))
    value, gradient = reference.log_likelihood_and_gradient(trained, share, every)
    best = reference.best_log_likelihood(share, every)
    assert best - nats < value < best + 1e-6
    np.testing.assert_allclose(gradient, 0, atol=0.02)


def split(vector: np.ndarray, sizes: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights and biases, or their moments, of one flat vector."""
    shapes = [*pairwise(sizes), *((size,) for size in sizes)]
    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    parts = [p.reshape(s) for p, s in zip(np.split(vector, ends), shapes, strict=True)]
    return parts[: len(sizes) - 1], parts[len(sizes) - 1 :]


def test_a_step_is_the_centred_gradient_of_the_bound():
    """At a rate that is next to zero the machine stays where it is, and what all steps add up to
    is their mean. Here both hidden layers matter to each other, and the chains mix slowly."""
    sizes, epochs, rate = [5, 3, 2], 20, 1e-9
    rng = np.random.default_rng(0)
    weights = [2.4 * rng.normal(size=(5, 3)), 3.0 * rng.normal(size=(3, 2))]
    biases = [0.5 * rng.normal(size=size) for size in sizes]
    for j, weight in enumerate(weights):  # units that are neither always on nor always off
        biases[j] -= weight.sum(1) / 2
        biases[j + 1] -= weight.sum(0) / 2
    v = torch.from_numpy(reference.states([5])[0].repeat(rng.integers(1, 300, 32), axis=0))

    machine = Machine(sizes, v, torch.Generator().manual_seed(0))
    machine.weights = [torch.from_numpy(weight.copy()) for weight in weights]
    machine.biases = [torch.from_numpy(bias.copy()) for bias in biases]
    before = flat(machine)
    machine.train(v, epochs, rate)
    steps = epochs * (len(v) // 100)
    speed = total = 0.0
    for step in range(steps):
        speed = 0.9 * speed + 1
        total += rate * (1 - step / steps) * speed
    measured = split((flat(machine) - before) / total, sizes)

    state = {f'weights.{j}': weight for j, weight in enumerate(weights)}
    state |= {f'biases.{j}': bias for j, bias in enumerate(biases[1:])}
    rows = [[row, *reference.posteriors(state, row, steps=100)] for row in np.unique(v, axis=0)]
    counts = np.unique(v, axis=0, return_counts=True)[1]
    layers = [np.stack(layer) for layer in zip(*rows, strict=True)]
    data, centres = split(counts / len(v) @ reference.statistics(layers), sizes)
    every = reference.statistics(reference.states(sizes))
    chance = np.exp(every @ before)
    model, means = split(chance / chance.sum() @ every, sizes)
    slopes = [centre - mean for centre, mean in zip(centres, means, strict=True)]
    expected = [slope.copy() for slope in slopes]
    for j, measured_slope in enumerate(measured[0]):
        slope = data[j] - model[j]
        slope -= np.outer(centres[j], slopes[j + 1]) + np.outer(slopes[j], centres[j + 1])
        np.testing.assert_allclose(measured_slope, slope, atol=0.005)
        expected[j] -= slope @ centres[j + 1]
        expected[j + 1] -= centres[j] @ slope
    for measured_slope, slope in zip(measured[1], expected, strict=True):
        np.testing.assert_allclose(measured_slope, slope, atol=0.015)


def test_each_layer_starts_alone_with_doubled_input(monkeypatch):
    """An RBM whose input from the missing side is doubled: its chains, run for ever, have the
    moments of its data."""
    trained = []
    train = Machine.train

    def train_alone(machine: Machine, v: Tensor, epochs: int, learning_rate: float) -> None:
        trained.append(machine)
        if len(machine.weights) == 1:
            train(machine, v, epochs, learning_rate)

    monkeypatch.setattr(Machine, 'train', train_alone)
    v, share = rows_of(known_machine())
    train_machine(v, [2, 2], epochs=20, learning_rate=0.05, seed=0)
    below = reference.states([6])[0]
    for machine, up, down in zip(trained[:2], (2, 1), (1, 2), strict=True):
        (weight,), (bias, bias_above) = split(flat(machine), list(machine.weights[0].shape))
        above = reference.logistic(up * below @ weight + bias_above)
        data = share @ reference.statistics([below, above])

        states, hidden = (reference.states([size])[0] for size in weight.shape)
        on = reference.logistic(up * states @ weight + bias_above)[:, None]
        upward = np.where(hidden == 1, on, 1 - on).prod(2)  # chance of each state above
        on = reference.logistic(down * hidden @ weight.T + bias)[:, None]
        downward = np.where(states == 1, on, 1 - on).prod(2)
        chance = np.linalg.matrix_power(upward @ downward, 4096)[0][:, None] * upward
        pairs = [states.repeat(len(hidden), 0), np.tile(hidden, (len(states), 1))]
        np.testing.assert_allclose(chance.ravel() @ reference.statistics(pairs), data, atol=0.04)
        below = above


def test_layers_are_joined_alike_whichever_state_is_called_1(monkeypatch):
    """At the centres the middle layer gets from both sides what it got alone from one. With its
    bias left as it was, some seeds ended 0.9 nats below the maximum where most units are on."""
    trained = []
    monkeypatch.setattr(Machine, 'train', lambda machine, *arguments: trained.append(machine))
    randn = torch.randn  # weights that matter, as training is left out
    monkeypatch.setattr(torch, 'randn', lambda *size, **options: 100 * randn(*size, **options))
    train_machine(rows_of(known_machine())[0], [2, 2], epochs=1, learning_rate=0.05, seed=0)
    lower, _, both = trained
    visible, _, above = both.centres
    alone = 2 * visible @ lower.weights[0] + lower.biases[1]
    joined = visible @ both.weights[0] + both.weights[1] @ above + both.biases[1]
    torch.testing.assert_close(joined, alone)
