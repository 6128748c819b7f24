"""What the READMEs show: their code runs, and what they point to exists."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

import timm_fisher
from timm_fisher.training import __main__, command_line
from timm_fisher.training.command_line import parse
from timm_fisher.training.config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
PAGES = [
    page.relative_to(ROOT)
    for pattern in (
        'README.md', 'recipes/**/*.md', 'hub_cards/README.md', 'timm_fisher/heads/README.md',
        '.github/CONTRIBUTING.md', '.github/CHANGELOG.md',
    )
    for page in sorted(ROOT.glob(pattern))
]  # fmt: skip
CARDS = [path.relative_to(ROOT) for path in sorted(ROOT.glob('hub_cards/*/README.md'))]
CONFIGURATIONS = [path.relative_to(ROOT) for path in sorted(ROOT.glob('recipes/configs/*.yaml'))]
NOT_TESTED = '<!-- not tested: '  # above a block, followed by the reason
# Where a snippet would download a backbone: a tiny one with random weights.
STAND_INS = {
    "'resnet50'": "'test_resnet'",
    'pretrained=True,': 'pretrained=False,',
    'reduce_dim=96': 'reduce_dim=16',
}


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a page, without those that it says are not tested."""
    fenced = re.findall(rf'^([^\n]*)\n```{language}\n(.*?)^```$', text, re.M | re.S)
    return [code for above, code in fenced if not above.startswith(NOT_TESTED)]


def commands(page: Path) -> list[list[str]]:
    """Words of each command of a page that runs a recipe, in blocks, tables and sentences."""
    text = (ROOT / page).read_text().replace('\\\n', ' ')
    lines = [line for block in blocks(text, 'bash') for line in block.splitlines()]
    lines += re.findall(r'`([^`\n]+)`', text)
    parts = [part for line in lines for part in line.split('&&')]
    launches = [part for part in parts if re.match(r'\s*(python|accelerate) .*recipes/', part)]
    return [shlex.split(launch, comments=True) for launch in launches]


def test_readme_is_short_and_has_both_commands():
    assert len(README.splitlines()) <= 200
    for name in ('main', 'test'):
        block = re.findall(rf'^<!-- {name} command -->\n```bash\n(.+)\n```$', README, re.M)
        assert len(block) == 1
        assert block[0].startswith('pip install -e ')
    for picture in (ROOT / '.github/pictures').iterdir():
        assert picture.stat().st_size < 200_000
        assert any(picture.name in (ROOT / page).read_text() for page in PAGES)


def test_snippets(tmp_path, monkeypatch):
    """Those of the README, one after the other, as somebody would type them in."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    trained = timm_fisher.create_model(  # what the main command leaves
        'test_resnet', head='sparse_fisher', stage=-2, code_dim=4, num_classes=10
    )
    folder = Path('runs/quickstart/run/model')
    timm_fisher.save_pretrained(trained, folder, label_names=list('0123456789'))
    Path('recipes').symlink_to(ROOT / 'recipes')

    images = torch.randn(8, 3, 64, 64)
    names = [f'class {i}' for i in range(67)]
    loader = DataLoader(TensorDataset(images, torch.arange(8)), batch_size=4)
    typed = dict(images=images, names=names, loader=loader)
    snippets = blocks(README, 'python')
    assert len(snippets) >= 6
    for snippet in snippets:
        for shown, instead in STAND_INS.items() if "'resnet50'" in snippet else ():
            snippet = snippet.replace(shown, instead)
        exec(compile(snippet, 'README.md', 'exec'), typed)

    assert typed['vector'].shape == (8, typed['features'].shape[1] * 64)
    assert typed['model'].num_classes == 67
    head = typed['MaxAndMean']
    assert head(5)(images.flatten(2).mT[..., [0, 1, 2, 0, 1]]).shape == (8, 10)


def test_head_of_the_readme_is_a_plug_in(tmp_path, monkeypatch):
    """Its class and its entry point, installed as a package is, with what every head must keep."""
    code = next(block for block in blocks(README, 'python') if block.startswith('# my_heads.py'))
    (tmp_path / 'my_heads.py').write_text(code)
    group = tomllib.loads(blocks(README, 'toml')[0])['project']['entry-points']
    (tmp_path / 'my_heads-1.dist-info').mkdir()
    (tmp_path / 'my_heads-1.dist-info/METADATA').write_text('Name: my_heads\nVersion: 1\n')
    lines = [f'[{name}]\n' for name in group]
    lines += [f'{key} = {value}\n' for names in group.values() for key, value in names.items()]
    (tmp_path / 'my_heads-1.dist-info/entry_points.txt').write_text(''.join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'my_heads', raising=False)
    assert 'max_and_mean' in timm_fisher.list_heads()
    model = timm_fisher.create_model('test_resnet', head='max_and_mean', scale=2.0, num_classes=3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    timm_fisher.save_pretrained(model, tmp_path / 'saved')
    assert timm_fisher.from_pretrained(str(tmp_path / 'saved')).head.scale == 2.0
    model = timm_fisher.create_model('test_vit', head='token_and_mean', num_classes=3)
    assert model(torch.randn(2, 3, 160, 160)).shape == (2, 3)
    with pytest.raises(ValueError, match="'token_and_mean' needs a class token, which 't"):
        timm_fisher.create_model('test_resnet', head='token_and_mean')


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links(page):
    text = (ROOT / page).read_text()
    links = re.findall(r'\]\(([^()\s]+)\)', text)
    for link in links:
        if link.startswith(('https://', 'http://')):
            continue
        file, _, anchor = link.partition('#')
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f'{page}: {link}'
        if anchor:
            headings = re.findall(r'^#+ (.+)$', target.read_text(), re.M)
            slugs = [re.sub(r'[^\w -]', '', each.lower()).replace(' ', '-') for each in headings]
            assert anchor in slugs, f'{page}: {link}'


@pytest.mark.parametrize('page', [*PAGES[:-1], *CARDS, *CONFIGURATIONS], ids=str)
def test_paths(page):
    """Recipes, configurations and other files that a page names by their path from the top; not
    the changelog, which names what was there, too."""
    folders = 'recipes|tests|hub_cards|timm_fisher|\\.github|\\.ci'
    paths = re.findall(rf'(?<![\w/.])(?:{folders})/[\w./-]*\w/?', (ROOT / page).read_text())
    missing = [path for path in paths if 'NAME' not in path and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_commands(page, monkeypatch):
    """The settings of each command are taken by its script, which then does not run."""
    read = []
    monkeypatch.setattr(command_line, 'run', lambda _, *args, **kw: read.append(parse(*args, **kw)))
    monkeypatch.setattr(__main__, 'run', command_line.run)
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        script = next(word for word in words if word.startswith('recipes/'))
        doors = (
            r'^from .+\.(command_line import run|__main__ import main)$|^    command_line\.run\('
        )
        assert re.search(doors, Path(script).read_text(), re.M), f'{script} would run'
        meant = {'NAME': 'trashnet-3g' if 'release' in script else 'avg', 'PATH': '.'}
        arguments = [meant.get(word, word) for word in words[words.index(script) + 1 :]]
        monkeypatch.setattr(sys, 'argv', [script, *arguments])
        read.clear()
        runpy.run_path(script, run_name='__main__')
        assert len(read) == 1, script


def test_every_recipe_and_configuration_is_listed():
    text = (ROOT / 'recipes/README.md').read_text()
    scripts = [path.relative_to(ROOT) for path in ROOT.glob('recipes/**/*.py')]
    assert scripts
    assert CONFIGURATIONS
    files = [path.relative_to('recipes').as_posix() for path in [*scripts, *CONFIGURATIONS]]
    assert not [file for file in files if f']({file})' not in text]


def test_configurations_of_the_pages_are_options_of_training():
    pages = [(ROOT / page).read_text() for page in PAGES]
    snippets = [block for text in pages for block in blocks(text, 'yaml')]
    assert snippets
    for snippet in snippets:
        options = yaml.safe_load(snippet)
        config = parse(Config, arguments=[f'--{k}={v}' for k, v in options.items()])
        assert config.head == options['head']


def test_every_head_has_a_section_in_the_catalogue():
    text = (ROOT / 'timm_fisher/heads/README.md').read_text()
    headings = re.findall(r'^#+ .*$', text, re.M)
    for name in PROJECT['entry-points']['timm_fisher.heads']:
        assert any(f'`{name}`' in heading for heading in headings), name


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / '.github/CITATION.cff').read_text())
    assert citation['cff-version'] == '1.2.0'
    assert citation['version'] == PROJECT['version']
    assert citation['license'] == PROJECT['license']
    assert citation['title'] == PROJECT['name']


@pytest.mark.parametrize('page', ['README.md', 'timm_fisher/heads/README.md'])
def test_claims_point_to_results(page):
    """A sentence that ranks heads links to the table that it is from, in its paragraph or item."""
    text = re.sub(r'```.*?```|^\|.*?$', '', (ROOT / page).read_text(), flags=re.S | re.M)
    claims = [
        part
        for part in re.split(r'\n\s*\n|\n(?=- )', text)
        if re.search(
            r'\b(ahead of|beats?|gains?|wins?|loses?|the best|better (by|than)|best of)\b'
            r'|\b(weakest|worse)\b|\b(below|above|behind) `',
            part,
        )
    ]
    assert claims
    for claim in claims:
        assert re.search(r'\]\([^)]*recipes/[^)]*\)', claim), claim
