"""timm_fisher.explain: maps that are known exactly, what an overlay shows, and what is refused."""

from __future__ import annotations

import builtins
import itertools

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_fisher
from timm_fisher import explain

NAMES = ['ash', 'beech', 'elm', 'fir', 'oak']


def create(backbone='test_resnet', head='avg', **arguments):
    torch.manual_seed(0)
    arguments = {'num_classes': 5, 'img_size': 64, **arguments}
    model = timm_fisher.create_model(backbone, head=head, **arguments).eval()
    if model.num_classes:
        nn.init.normal_(model.classifier.weight)  # classes that differ
        nn.init.normal_(model.classifier.bias)
    return model


# Images and names


def test_names_of_classes():
    model = create()
    assert explain.class_names(model) == list('01234')
    model.pretrained_cfg['label_names'] = NAMES
    assert explain.class_names(model) == NAMES
    model.pretrained_cfg['label_names'] = NAMES[:4]
    with pytest.raises(ValueError, match='has 5 classes, but 4 names'):
        explain.class_names(model)


def test_model_without_classes():
    model = create(num_classes=0)
    with pytest.raises(ValueError, match='num_classes=0: it gives embeddings'):
        explain.class_names(model)
    with pytest.raises(ValueError, match='num_classes=0: it gives embeddings'):
        explain.explain(model, torch.zeros(1, 3, 64, 64))


# What the parts contribute


@pytest.mark.parametrize('token', ['drop', 'keep', 'append'])
@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit'])
def test_contributions_are_exact_for_average_and_linear(backbone, token):
    """<w, x_i> / N, on the grid of an image that is no square."""
    token = 'drop' if backbone == 'test_resnet' else token
    model = create(backbone, img_size=(64, 96), class_token=token)
    x = torch.randn(2, 3, 64, 96)
    logits, (shares,) = explain.contributions(model, x)
    torch.testing.assert_close(logits, model(x))

    features, winners = model.forward_features(x), logits.argmax(1)
    weight = model.classifier.weight[winners][:, : model.num_features]
    if backbone == 'test_resnet':
        grid, expected = (2, 3), torch.einsum('bchw,bc->bhw', features, weight) / 6
    else:
        grid, count = (4, 6), 25 if token == 'keep' else 24
        expected = torch.einsum('bnc,bc->bn', features[:, 1:], weight).view(2, 4, 6) / count
    assert explain.grids(model, [features], (64, 96)) == [grid]
    torch.testing.assert_close(shares, expected)
    if token == 'drop':
        total = logits.max(1).values - model.classifier.bias[winners]
        torch.testing.assert_close(shares.sum((1, 2)), total)


def test_contributions_of_several_stages():
    """How much the logit changes with the length of each descriptor."""
    heads = [dict(name='avg', stage=-2), dict(name='sparse_fisher', reduce_dim=8, code_dim=4)]
    model = create(head=heads).double().requires_grad_(False)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    grids = [(4, 6), (2, 3)]
    logits, maps = explain.contributions(model, x)
    winner, features, step = logits.argmax(), model.forward_features(x), 1e-6
    assert explain.grids(model, features, (64, 96)) == grids
    for stage, (rows, columns) in enumerate(grids):
        expected = torch.empty(rows, columns, dtype=torch.float64)
        for row, column in itertools.product(range(rows), range(columns)):
            ends = []
            for sign in (1, -1):
                changed = [tensor.clone() for tensor in features]
                changed[stage][:, :, row, column] *= 1 + sign * step
                ends.append(model.forward_head(changed)[0, winner])
            expected[row, column] = (ends[0] - ends[1]) / (2 * step)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(maps[stage][0], expected, rtol=1e-4, atol=1e-7)


def test_heat_of_stages_adds_up():
    heads = [dict(name='avg', stage=-2), dict(name='gem')]
    model, x = create(head=heads), torch.randn(2, 3, 64, 96)
    logits, heat = explain.explain(model, x)
    expected, maps = explain.contributions(model, x)
    assert torch.equal(logits, expected)
    assert heat.shape == (2, 64, 96)
    total = sum(stage.sum((1, 2)) for stage in maps)
    torch.testing.assert_close(heat.mean((1, 2)), total)


def test_backbone_runs_once_and_evaluates():
    """Of a model that comes from training, under whatever the caller does about gradients."""
    model, x, calls = create(drop_rate=0.9).train(), torch.randn(2, 3, 64, 64), []
    model.backbone.register_forward_pre_hook(lambda *_: calls.append('whole'))
    model.backbone.conv1.register_forward_pre_hook(lambda *_: calls.append('stem'))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits, _ = explain.explain(model, x)
    assert calls == ['stem']
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(logits, model.eval()(x))


def test_tokens_without_known_places():
    model = create('test_vit')
    model.backbone.feature_info[-1]['reduction'] = 8
    with pytest.raises(ValueError, match='places of the 16 tokens'):
        explain.explain(model, torch.zeros(1, 3, 64, 64))


def test_pixels_have_no_parts():
    model = create('pixels', img_size=8)
    with pytest.raises(ValueError, match='pools one descriptor of the whole image'):
        explain.explain(model, torch.zeros(1, 1, 8, 8))


# What is drawn


def test_overlay_shows_the_place(tmp_path):
    """What speaks against the class is not shown."""
    model = create()
    heat = -torch.ones(60, 90)
    heat[5:20, 60:80] = 1
    data = timm.data.resolve_model_data_config(model)
    image = (0.5 - torch.tensor(data['mean'])) / torch.tensor(data['std'])
    image = image[:, None, None].expand(3, 60, 90)
    torch.testing.assert_close(explain.picture(model, image), torch.full((60, 90, 3), 0.5))
    figure = explain.overlay(model, image, heat, title='a $ and $')
    figure.savefig(tmp_path / 'overlay.png', dpi=120)
    pixels = np.asarray(Image.open(tmp_path / 'overlay.png').convert('RGB')).astype(int)
    coloured = np.argwhere(np.ptp(pixels, axis=2) > 30)
    grey = (abs(pixels - 127) <= 1).all(2)  # the image alone, in the left half
    (top, bottom), (left, right) = (
        np.flatnonzero(grey.sum(axis) > 100)[[0, -1]] for axis in (1, 0)
    )
    scale = (right - left) / 90
    assert (bottom - top) / scale == pytest.approx(60, abs=1)
    covered = pixels.shape[1] - 1 - right  # the right half mirrors the margins
    place = (np.array([coloured.min(0), coloured.max(0)]) - (top, covered)) / scale
    assert np.allclose(place, [(5, 60), (20, 80)], atol=1.5)


def test_picture_of_a_grey_model():
    """Mean and deviation are the averages over the colours, as in timm."""
    model = create(in_chans=1)
    torch.testing.assert_close(
        explain.picture(model, torch.zeros(1, 4, 6)), torch.full((4, 6), 0.5)
    )


def test_overlay_without_matplotlib(monkeypatch):
    plain = builtins.__import__

    def without(name, *arguments):
        if name.startswith('matplotlib'):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return plain(name, *arguments)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "timm_fisher\[recipes\]"'):
        explain.overlay(create(), torch.zeros(3, 4, 4), torch.zeros(4, 4))


# Attention


@pytest.mark.parametrize('token', ['drop', 'keep'])
@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit'])
def test_attention_of_a_head_that_has_it(backbone, token):
    token = 'drop' if backbone == 'test_resnet' else token
    head = [{'name': 'avg'}, {'name': 'ep', 'queries': 4}]
    model = create(backbone, head, img_size=(64, 96), class_token=token)
    x = torch.randn(2, 3, 64, 96)
    ep, features = model.head[1], model.descriptors.features(model.backbone, x)
    descriptors = model.descriptors(features)[0]
    rows, columns = model.pretrained_cfg['pool_size']
    weights = ep.attention(descriptors).mean(1)[:, -rows * columns :].reshape(2, 1, rows, columns)
    weights = nn.functional.interpolate(weights, (64, 96), mode='bilinear')[:, 0]
    seen = explain.attention(model, x)
    torch.testing.assert_close(seen, weights / weights.amax((1, 2), keepdim=True))
    assert torch.equal(seen.amax((1, 2)), torch.ones(2))
    logits, heat = explain.explain(model, x)
    figure = explain.overlay(model, x[0], heat[0], weights=seen[0], title='ash')
    assert [axis.get_title() for axis in figure.axes] == ['', 'for the class', 'attention']
    assert len(figure.axes[2].images) == 2
    assert logits.shape == (2, 5)


def test_no_attention():
    model = create()
    model.backbone = None  # is not run
    assert explain.attention(model, torch.randn(2, 3, 64, 64)) is None
