"""Heads that ask for more than the descriptors: the grid and the class token."""

from __future__ import annotations

import pytest
import timm
import torch
from small_models import create, images
from torch.utils.data import DataLoader, TensorDataset

import timm_fisher
from timm_fisher import ListStream, PoolingHead, create_head, explain
from timm_fisher.fitting.stream import ModelStream

SOURCE = """
import torch
from timm_fisher import PoolingHead

class Both(PoolingHead):
    '''The class token, and where the descriptors are brightest.'''

    def __init__(self, in_features):
        super().__init__()
        self.in_features, self.out_features = in_features, in_features + 2
        self.register_buffer('mean', torch.zeros(in_features))

    def forward(self, x, *, grid, class_token):
        rows, columns = grid
        assert rows * columns == x.shape[1]
        place = x.sum(2).argmax(1)
        places = torch.stack([place // columns, place % columns], 1).to(x.dtype)
        return torch.cat([class_token - self.mean.to(x.dtype), places], 1)

    def forward_with_loss(self, x, *, grid, class_token):
        return self(x, grid=grid, class_token=class_token), class_token.square().mean()

    def fit(self, stream):
        tokens = torch.cat([context['class_token'] for _, context in stream.inputs()])
        total, count = stream.sum(tokens.sum(0), torch.tensor(len(tokens)))
        self.mean.copy_(total / count)

    def partial_fit(self, stream):
        ((x, context),) = stream.inputs()
        self.mean.copy_(context['class_token'].mean(0))

class Optional(PoolingHead):
    '''Counts the keywords that it is given.'''

    def __init__(self, in_features):
        super().__init__()
        self.in_features, self.out_features = in_features, 3

    def forward(self, x, *, grid=None, class_token=None):
        flags = torch.tensor([grid is not None, class_token is not None], dtype=x.dtype)
        return torch.cat([flags.expand(len(x), 2), x.mean((1, 2))[:, None]], 1)

class Variadic(PoolingHead):
    '''Of before: takes what comes, and has a layer of a name that the contract knows.'''

    def __init__(self, in_features):
        super().__init__()
        self.in_features = self.out_features = in_features
        self.context = self.attention = torch.nn.Linear(in_features, in_features)

    def forward(self, x, **others):
        return self.context(x).mean(1)

class Lossy(Variadic):
    def forward(self, x, *, class_token):
        return class_token

    def forward_with_loss(self, x):
        return self.context(x).mean(1), x.square().mean()

class Masked(PoolingHead):
    def __init__(self, in_features):
        super().__init__()
        self.in_features = self.out_features = in_features

    def forward(self, x, *, mask):
        return x.mean(1)
"""


KINDS = {
    'both': 'Both', 'optional': 'Optional', 'masked': 'Masked', 'variadic': 'Variadic',
    'lossy': 'Lossy',
}  # fmt: skip


@pytest.fixture
def heads(install):
    """Installs the heads above."""
    for name, kind in KINDS.items():
        install(f'their_{name}', name, f'their_{name}:{kind}', SOURCE)


pytestmark = pytest.mark.usefixtures('heads')


def tokens(model, x):
    """Class token and descriptors of a ViT, without our code."""
    features = model.backbone.forward_features(x)
    return features[:, 0], features[:, model.backbone.num_prefix_tokens :]


def test_a_vit_gives_both():
    model, x = create('test_vit', 'both', img_size=(64, 96)), torch.randn(2, 3, 64, 96)
    class_token, descriptors = tokens(model, x)
    brightest = descriptors.sum(2).argmax(1)
    vector = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(vector[:, :-2], class_token)
    assert torch.equal(vector[:, -2] * 6 + vector[:, -1], brightest.float())
    assert model.pretrained_cfg['pool_size'] == (4, 6)
    assert torch.equal(model(x), model.classifier(vector))
    logits, loss = model.forward_with_loss(x)
    assert torch.equal(logits, model(x))
    assert torch.equal(loss, class_token.square().mean())


def test_grid_of_images_of_another_size():
    """Of the same number of tokens, too: 24 are 4 x 6 here and 2 x 12 there."""
    model = create('test_vit', 'both', backbone_kwargs={'dynamic_img_size': True})
    for size in ((64, 96), (32, 192)):
        x = torch.randn(1, 3, *size)
        _, descriptors = tokens(model, x)
        place = descriptors.sum(2).argmax().item()
        model.classifier = torch.nn.Identity()
        columns = size[1] // 16
        assert model(x)[0, -2:].tolist() == [place // columns, place % columns]
    with pytest.raises(
        ValueError, match=r'25 tokens are not those of images of \(160, 160\)\. Call'
    ):
        model.forward_head(model.forward_features(torch.randn(1, 3, 64, 96)))


def test_a_map_gives_its_grid():
    model = create('test_resnet', 'optional')
    assert model.forward_head(model.forward_features(images()), pre_logits=True)[
        0, :2
    ].tolist() == [
        1,
        0,
    ]
    model = create('test_vit', 'optional', class_token='keep')
    vector = model.forward_head(model.forward_features(images(size=160)), pre_logits=True)
    assert vector[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit'])
def test_what_a_backbone_cannot_give_is_refused_before_it_is_built(backbone, monkeypatch):
    places = []
    create_backbone = timm.create_model

    def record(name, *args, **arguments):
        if name == backbone:
            places.append(torch.get_default_device().type)
        return create_backbone(name, *args, **arguments)

    monkeypatch.setattr(timm, 'create_model', record)
    stage = -1 if backbone == 'test_resnet' else -2
    said = (
        rf"^Head 'both' needs a class token, which '{backbone}' does not give at stage {stage}\. "
        r'Take the output of a transformer that has one, such as vit_base_patch16_224, or another'
    )
    with pytest.raises(ValueError, match=said):
        timm_fisher.create_model(backbone, head='both', stage=stage)
    assert set(places) == {'meta'}


def test_no_grid_among_prefix_tokens():
    said = (
        "Head 'both' needs a grid, which 'test_vit' does not give at stage -1. Take class_token='d"
    )
    with pytest.raises(ValueError, match=said):
        create('test_vit', 'both', class_token='keep')


def test_other_keywords_are_refused():
    said = (
        "Head 'masked' of the distribution 'their_masked' asks for 'mask' in forward, which models"
    )
    with pytest.raises(TypeError, match=said):
        create_head('masked', 4)


def test_a_loss_without_the_keyword_is_refused():
    said = (
        "Head 'lossy' of the .* asks for 'class_token' in forward, but its forward_with_loss does"
    )
    with pytest.raises(TypeError, match=said):
        create_head('lossy', 4)


def test_a_head_of_before():
    model, x = create('test_vit', 'variadic', img_size=64), images()
    assert model.head.asks_for == {}
    assert explain.attention(model, x) is None  # a layer, not the method
    pooled = model.pool(model.forward_features(x))
    torch.testing.assert_close(pooled, model.head.context(tokens(model, x)[1]).mean(1))


def test_more_descriptors_than_an_image_has():
    said = (
        r"^Head 'salad' as it is set needs 65 descriptors, and an image of \(64, 64\) has 16\. "
        'Change its arguments, or take larger images'
    )
    with pytest.raises(ValueError, match=said):
        create('test_vit', 'salad', img_size=64)
    with pytest.raises(ValueError, match="Head 'salad' as it is set needs 65"):
        create('resnet50', 'avg + salad')


def test_composed_and_saved(tmp_path):
    model, x = create('test_vit', 'avg + both', num_classes=3), images(size=160)
    class_token, descriptors = tokens(model, x)
    vector = model.forward_head(model.forward_features(x), pre_logits=True)
    size = class_token.shape[1]
    place = descriptors.sum(2).argmax(1)
    second = torch.cat([class_token, torch.stack([place // 10, place % 10], 1)], 1)
    torch.testing.assert_close(vector[:, size:], torch.nn.functional.normalize(second))
    timm_fisher.save_model(model, tmp_path / 'saved')
    again = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True).eval()
    assert torch.equal(again(x), model(x))


def test_streams_carry_what_a_fit_needs():
    x = torch.randn(5, 3, 160, 160)
    model = create('test_vit', 'avg + both')
    class_token, descriptors = tokens(model, x)
    loader = DataLoader(TensorDataset(x), batch_size=2)
    timm_fisher.fit(model, loader)
    torch.testing.assert_close(model.head[1].mean, class_token.mean(0))
    features = DataLoader(TensorDataset(model.forward_features(x)[0].detach()), batch_size=2)
    model.head[1].mean.zero_()
    timm_fisher.fit(model, features, from_features=True)
    torch.testing.assert_close(model.head[1].mean, class_token.mean(0))
    (given, context), *_ = ModelStream(model, loader, index=1).inputs()
    torch.testing.assert_close(given, descriptors[:2])
    assert context['grid'] == (10, 10)
    assert [context for _, context in ModelStream(model, loader).inputs()] == [{}, {}, {}]
    ((given, context),) = ListStream([x[0]], [{'grid': (3, 1)}]).inputs()
    assert context == {'grid': (3, 1)}


def test_traced_and_exported():
    model, x = create('test_vit', 'both'), images(size=160)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    with pytest.raises(ValueError, match='does not take Both alone, which asks for grid'):
        torch.jit.script(model.head)


def test_what_a_head_asks_for():
    assert create_head('avg', 4).asks_for == {}
    assert create_head('both', 4).asks_for == {'grid': True, 'class_token': True}
    assert create_head('optional', 4).asks_for == {'grid': False, 'class_token': False}
    assert PoolingHead.asks_for == {}
