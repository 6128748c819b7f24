"""recipes/demo.py: what its functions give and refuse, and the page in a real browser."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script
from hostile_files import NO_IMAGES, make_black_nan
from limits import within
from PIL import Image
from torch import nn

import timm_fisher
from timm_fisher.retrieval import update_index

NAMES = ['ash', 'beech', 'elm', 'fir', '<b>oak</b>']
SIZE = 64


@pytest.fixture(scope='module')
def demo():
    return load_script('demo')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Saved models `gem` and `ep`, of which the second has attention, and `gallery/CLASS/`."""
    folder = tmp_path_factory.mktemp('demo')
    save(folder / 'gem', head='gem')
    save(folder / 'ep', head='ep', seed=1)
    for i in range(5):
        photo(folder / f'gallery/{"birch" if i % 2 else "cedar"}/{i}.png', seed=i)
    (folder / 'gallery/notes.txt').write_text('no image')
    return folder


def save(folder, *, backbone='test_resnet', head='avg', seed=0, num_classes=5, img_size=SIZE):
    torch.manual_seed(seed)
    model = timm_fisher.create_model(
        backbone, head=head, num_classes=num_classes, img_size=img_size
    ).eval()
    if num_classes:
        nn.init.normal_(model.classifier.weight)  # classes that differ
        nn.init.normal_(model.classifier.bias)
    timm_fisher.save_pretrained(model, folder, label_names=NAMES if num_classes else None)
    return str(folder)


def photo(path, *, seed=0, size=(90, 70)):
    pixels = np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def by_hand(folder, path):
    """Probability of each class by its name."""
    model = timm_fisher.from_pretrained(folder).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = Image.open(path).convert('L' if model.in_chans == 1 else 'RGB')
    with torch.no_grad():
        probabilities = model(transform(image)[None]).softmax(1)[0].tolist()
    return dict(zip(NAMES, probabilities, strict=True))


# The functions, which need no Gradio


def test_probabilities_and_picture(demo, place):
    """The model with attention has one panel more."""
    path = place / 'gallery/cedar/0.png'
    pictures = {}
    for name in ('gem', 'ep'):
        folder = str(place / name)
        probabilities, pictures[name], reason = demo.classify(folder, path)
        assert probabilities == pytest.approx(by_hand(folder, path), abs=1e-5)
        assert reason == ''
    assert pictures['ep'].width == pytest.approx(1.5 * pictures['gem'].width, abs=2)
    assert np.ptp(np.asarray(pictures['gem'].convert('L'))) > 100


def test_no_picture_of_pixels(demo, tmp_path):
    folder = save(tmp_path / 'model', backbone='pixels', img_size=8)
    path = photo(tmp_path / 'photo.png', size=(8, 8))
    probabilities, picture, reason = demo.classify(folder, path)
    assert probabilities == pytest.approx(by_hand(folder, path), abs=1e-5)
    assert picture is None
    assert (
        reason == f"No picture by '{folder}': this model pools one descriptor of the whole image."
    )


def test_embeddings_are_no_classes(demo, tmp_path):
    folder = save(tmp_path / 'model', num_classes=0)
    with pytest.raises(ValueError, match='num_classes=0: it gives embeddings'):
        demo.classify(folder, photo(tmp_path / 'photo.png'))


@pytest.mark.parametrize('kind', NO_IMAGES)
def test_files_that_are_no_photographs(demo, place, tmp_path, kind):
    """The sentence names the file, and no folder of the server."""
    write, reason = NO_IMAGES[kind]
    write(tmp_path / 'b.png')
    with within(20), pytest.raises(ValueError, match=reason) as refused:
        demo.classify(str(place / 'gem'), tmp_path / 'b.png')
    assert str(refused.value).startswith("'b.png' cannot be read as an image: ")
    assert str(tmp_path) not in str(refused.value)


def test_cut_off_file(demo, place, tmp_path):
    path = photo(tmp_path / 'cut.png')
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^'cut.png' cannot be read as an image: "):
        demo.classify(str(place / 'gem'), path)


def test_most_pixels(demo, place, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'MOST_PIXELS', 2_000_000)
    model = demo.load(str(place / 'gem'))
    assert demo.read(photo(tmp_path / 'a.png', size=(2000, 1000)), model).size == (2000, 1000)
    path = photo(tmp_path / 'b.png', size=(2001, 1000))
    with pytest.raises(ValueError, match=r'it has 2001 x 1000 pixels; at most 2 million are'):
        demo.read(path, model)


def test_output_that_is_nan(demo, place, tmp_path, monkeypatch):
    make_black_nan(monkeypatch)
    Image.new('RGB', (50, 50)).save(tmp_path / 'black.png')
    with pytest.raises(ValueError, match='for this photograph is NaN or infinite'):
        demo.classify(str(place / 'gem'), tmp_path / 'black.png')


def test_search_finds_the_photograph_itself(demo, place, tmp_path):
    """First; all others follow."""
    gallery, name = demo.Gallery(place / 'gallery', tmp_path), str(place / 'gem')
    for path in gallery.images:
        similar = gallery.search(name, path)
        assert similar[0] == (str(path), f'{path.parent.name}, 1.00')
        assert sorted(file for file, _ in similar) == list(map(str, gallery.images))
        similarities = [float(caption.split()[-1]) for _, caption in similar]
        assert similarities == sorted(similarities, reverse=True)


def test_index_is_kept(demo, place, tmp_path, monkeypatch):
    """For each model; one made elsewhere is searched as it is, and an image that cannot be read is
    left out."""
    shutil.copytree(place / 'gallery', tmp_path / 'gallery')
    (tmp_path / 'gallery/cedar/broken.png').write_bytes(b'text')
    query = tmp_path / 'gallery/cedar/0.png'
    monkeypatch.chdir(place)
    index, _ = update_index(tmp_path / 'index/%25%2Fgem', tmp_path / 'gallery', demo.load('./gem'))
    found = {}
    for name in ('./gem', './ep'):
        found[name] = demo.Gallery(tmp_path / 'gallery', tmp_path / 'index').search(name, query)
        assert len(found[name]) == len(index.files) == 5
    assert sorted(path.name for path in (tmp_path / 'index').iterdir()) == ['%25%2Fep', '%25%2Fgem']
    embedded = []
    monkeypatch.setattr('timm_fisher.retrieval.index.embed_prepared', lambda *a: embedded.append(a))
    gallery = demo.Gallery(tmp_path / 'gallery', tmp_path / 'index')
    assert gallery.search('./gem', query) == found['./gem']
    assert not embedded


def test_a_gallery_without_images(demo, tmp_path):
    with pytest.raises(ValueError, match='is no folder, or holds no image'):
        demo.Gallery(tmp_path, tmp_path)


def test_alert(demo):
    assert re.findall('<p [^>]*>(.*?)</p>', demo.alert('<b>', '', 'c', '<b>')) == ['&lt;b&gt;', 'c']


@pytest.mark.parametrize(
    ('models', 'error'),
    [
        ([], 'give one or more'),
        (['trashnet-3g', 'trashnet-3g'], 'all different'),
        (['trashnet-3h'], "'trashnet-3h' is no released model, .* 'trashnet-3g'"),
    ],
)
def test_models_that_are_refused(demo, models, error):
    with pytest.raises(ValueError, match=error):
        demo.Settings(models=models)


def test_default_models_are_the_released_ones(demo):
    assert sorted(demo.Settings().models) == sorted(timm_fisher.list_pretrained())


def test_without_gradio(demo, place, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ValueError, match=r'pip install "timm_fisher\[demo\]"'):
        demo.build(demo.Settings(models=[str(place / 'gem')], gallery=place / 'gallery'))


def test_build(demo, place):
    """Also of one model; nothing is reported to Gradio's makers, and nothing is written here."""
    pytest.importorskip('gradio', reason='needs Gradio: pip install -e ".[demo]"')
    before = sorted((ROOT / 'recipes').iterdir())
    page = demo.build(demo.Settings(models=[str(place / 'gem')], gallery=place / 'gallery'))
    assert page.analytics_enabled is False
    assert {path.name for path in (ROOT / 'recipes').iterdir()} == {path.name for path in before}


# The page


@pytest.fixture(scope='module')
def address(place):
    """Where the command serves the page."""
    pytest.importorskip('gradio', reason='needs Gradio: pip install -e ".[demo]"')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    models = f'[{place / "gem"}, {place / "ep"}]'
    process = subprocess.Popen(
        [
            sys.executable, ROOT / 'recipes/demo.py', f'--port={port}', f'--models={models}',
            f'--gallery={place / "gallery"}',
        ],
        cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    url = f'http://127.0.0.1:{port}'
    try:
        for _ in range(120):
            time.sleep(1)
            assert process.poll() is None, process.stderr.read()
            try:
                urllib.request.urlopen(url, timeout=9).close()
                break
            except urllib.error.URLError:
                continue
        yield url
    finally:
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert 'Traceback' not in stderr, stderr


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip(
        'playwright.sync_api', reason='needs a driver of browsers: pip install playwright'
    )
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('needs a browser: apt-get install chromium')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def visit(address, browser):
    """`visit()` opens the page in a tab of its own. At the end no tab may have reported an error,
    or asked another computer for anything."""
    errors, elsewhere, tabs = [], [], []

    def report(message):
        if message.type == 'error':
            errors.append(message.text)

    def requested(request):
        if not request.url.startswith((address, 'data:', 'blob:')):
            elsewhere.append(request.url)

    def open_tab():
        tab = browser.new_page(viewport={'width': 1280, 'height': 900})
        tabs.append(tab)
        tab.set_default_timeout(60_000)
        tab.on('console', report)
        tab.on('pageerror', lambda error: errors.append(str(error)))
        tab.on('request', requested)
        tab.goto(address)
        tab.get_by_text('Drop a photograph').wait_for()
        return tab

    yield open_tab
    for tab in tabs:
        tab.close()
    assert not errors
    assert not elsewhere


def upload(tab, path):
    """Into the visible tab of the page."""
    panel = tab.get_by_role('tabpanel').filter(visible=True)
    clear = panel.get_by_label('Remove Image')
    if clear.count():
        clear.click()
    panel.locator('input[type=file]').first.set_input_files(path)
    return panel


def expect_answer(panel, side, folder, path):
    """The probabilities are those of a model, and the picture is there."""
    expected = by_hand(folder, path)
    best = max(expected, key=expected.get)
    label = panel.locator('.block', has_text=f'Probabilities, {side}').last
    label.get_by_text(f'{expected[best]:.0%}', exact=True).first.wait_for()
    assert label.locator('h2').inner_text() == best
    picture = panel.locator('.block', has_text=f'What spoke for the first class, {side}').last
    picture.locator('img').wait_for()
    assert loaded_width(picture.locator('img')) > 200


def loaded_width(image):
    """Natural width, which is 0 of a picture that does not load."""
    return image.evaluate('image => image.decode().then(() => image.naturalWidth)')


@pytest.mark.slow
def test_page_classifies(visit, place, tmp_path):
    tab = visit()
    path = photo(tmp_path / 'photo.png', seed=7)
    panel = upload(tab, path)
    expect_answer(panel, 'left', str(place / 'gem'), path)
    expect_answer(panel, 'right', str(place / 'ep'), path)
    assert panel.get_by_role('alert').count() == 0

    panel.get_by_label('Model, left').click()
    tab.get_by_role('option', name=str(place / 'ep')).click()
    expect_answer(panel, 'left', str(place / 'ep'), path)

    panel.locator('.gallery-item').first.click()  # an example
    expect_answer(panel, 'right', str(place / 'ep'), place / 'gallery/birch/1.png')


@pytest.mark.slow
def test_page_searches(visit, place):
    tab = visit()
    tab.get_by_role('tab', name='Search').click()
    panel = upload(tab, place / 'gallery/cedar/2.png')
    found = panel.locator('.thumbnail-item img')
    found.first.wait_for()
    assert panel.locator('.caption-label').first.inner_text() == 'cedar, 1.00'
    assert found.first.get_attribute('src').endswith('/2.png')
    assert found.count() == 5
    for i in range(5):
        assert loaded_width(found.nth(i)) == 90


@pytest.mark.slow
def test_page_says_what_is_wrong(visit, place, tmp_path):
    """And shows no answer of the photograph before; the next photograph has its answer again."""
    tab = visit()
    path = photo(tmp_path / 'photo.png')
    upload(tab, path)
    panel = tab.get_by_role('tabpanel').filter(visible=True)
    expect_answer(panel, 'left', str(place / 'gem'), path)
    sentences = {
        'text.jpg': (b'text', 'cannot identify image file'),
        'cut.png': (path.read_bytes()[:2000], ''),
        'bomb.png': (b'P6 20000 20000 255\n', 'decompression bomb'),
    }
    for name, (content, reason) in sentences.items():
        (tmp_path / name).write_bytes(content)
        upload(tab, tmp_path / name)
        panel.get_by_text(f"'{name}' cannot be read as an image").wait_for()
        assert panel.get_by_role('alert').count() == 1
        assert reason in panel.get_by_role('alert').inner_text()
        assert panel.locator('h2').count() == 0
    upload(tab, path)
    expect_answer(panel, 'left', str(place / 'gem'), path)
    assert panel.get_by_role('alert').count() == 0

    tab.get_by_role('tab', name='Search').click()
    panel = upload(tab, tmp_path / 'text.jpg')
    panel.get_by_text("'text.jpg' cannot be read as an image").wait_for()


@pytest.mark.slow
def test_page_in_two_tabs(visit, place, tmp_path):
    """Each has the answer for its own photograph."""
    tabs = [visit(), visit()]
    paths = [photo(tmp_path / f'{i}.png', seed=20 + i) for i in range(2)]
    panels = [upload(tab, path) for tab, path in zip(tabs, paths, strict=True)]
    for panel, path in zip(panels, paths, strict=True):
        expect_answer(panel, 'left', str(place / 'gem'), path)
        expect_answer(panel, 'right', str(place / 'ep'), path)


@pytest.mark.slow
def test_files_that_are_not_served(address, place):
    """The models and the sources lie outside the gallery."""
    served = place / 'gallery/cedar/0.png'
    with urllib.request.urlopen(f'{address}/gradio_api/file={served}') as answer:
        assert answer.read() == served.read_bytes()
    outside = [
        ROOT / 'pyproject.toml', place / 'gem/config.json', '/etc/passwd',
        place / 'gallery/../gem/config.json',
    ]  # fmt: skip
    for path in outside:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f'{address}/gradio_api/file={path}')
        assert refused.value.code in (403, 404)


@pytest.mark.slow
def test_uploads_are_bounded(address):
    def upload_bytes(count):
        body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body += bytes(count) + b'\r\n--b--\r\n'
        kind = {'Content-Type': 'multipart/form-data; boundary=b'}
        return urllib.request.Request(f'{address}/gradio_api/upload', body, kind)

    urllib.request.urlopen(upload_bytes(19_000_000)).close()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(upload_bytes(22_000_000))
    assert refused.value.code == 413
