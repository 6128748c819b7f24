"""README.md of a saved model: what a save replaces, and what belongs to its user."""

import warnings

import pytest
import yaml
from limits import within

from timm_fisher.hub.readme import BEGIN, END, REPOSITORY, generate, read, rename, update

DATA = {'base_model': 'a/old', 'library_name': 'timm', 'license': 'mit', 'tags': ['timm', 'avg']}
INDEX = [{'name': 'leaves', 'results': [{'value': 51.2, 'split': 'test'}]}]
OLD = generate(DATA | {'model-index': INDEX}, '# old\n\n## Results\n\n50')
NEW = generate(
    DATA | {'base_model': 'a/new', 'tags': ['timm', 'gem'], 'datasets': ['a/b']}, '# new'
)


def merge(new, old):
    """The updated text, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        text = update(new, old, 'the card')
    return text, ' '.join(str(warning.message) for warning in caught)


def metadata(text):
    return yaml.safe_load(text.split('---')[1])


USERS = [  # what somebody may have made of OLD
    OLD,
    OLD.replace('---\n\n', '---\n\n# Mine, above\n\n') + '\n## Below\n\nmine\n',
    OLD + '\n \n',
    OLD.replace('license: mit', 'license: cc-by-4.0  # ours\nlanguage: no\nco2: 1e3\nday: 010'),
    OLD.replace('tags:\n- timm\n- avg\n', 'tags: [timm, "avg", trees]\n# kept\n'),
    OLD.replace(f'\n{BEGIN}', f'Above.\r\n\r\n{BEGIN}') + 'Below.\r\n',
    '\n\n' + OLD.replace('\n---\n', '\r\n--- \r\n'),
]
OTHERS = [  # without generated part
    '',
    ' \n',
    '---\nlicense: apache-2.0\n---\n',
    '---\n---\n',
    '---\n# nothing but a comment\n---',
    'no metadata',
    'no metadata\r\nbut CRLF',
    '---\r\ntags:\r\n- x\r\nnested:\r\n  a: [1, 2]\r\n---\r\nText\r\n',
    '---\nday: 2026-01-02\ntext: |\n  # no comment\n  a\n---\n## Use\nmine\n\n---\n\nend',
    OLD.replace(END, ''),
    OLD.replace(BEGIN, ''),
    f'{END} turned round {BEGIN}',
]


@pytest.mark.parametrize('old', USERS + OTHERS)
def test_updating_again_changes_nothing(old):
    once = merge(NEW, old)[0]
    assert merge(NEW, once)[0] == once
    assert merge(NEW, NEW)[0] == NEW


@pytest.mark.parametrize('old', USERS)
def test_only_the_generated_part_and_fields_of_the_model_change(old):
    assert merge(OLD, old)[0] == old, 'the same model'
    text, warned = merge(NEW, old)
    assert not warned
    before, after = old.split('---')[2].split(BEGIN)[0].lstrip(), old.split(END)[1]
    assert text.split('---')[2].split(BEGIN)[0].lstrip() == before
    assert text.split(BEGIN)[1] == NEW.split(BEGIN)[1].split(END)[0] + END + after
    now, then = metadata(text), metadata(old)
    assert now['base_model'] == 'a/new'
    assert 'model-index' not in now
    assert now['datasets'] == ['a/b']
    for key in then.keys() - {'base_model', 'model-index', 'tags', 'language', 'day'}:
        assert now[key] == then[key]
    if 'language' in then:  # as YAML 1.2 and its writer mean them, not YAML 1.1
        assert (now['language'], now['day']) == ('no', '010')


def test_tags_of_both():
    """'avg' was the head of the old model; what reads as another type in YAML stays a text."""
    old = OLD.replace('- avg\n', '- avg\n- trees\n- 010\n- no\n')
    assert metadata(merge(NEW, old)[0])['tags'] == ['timm', 'trees', '010', 'no', 'gem']


@pytest.mark.parametrize('old', OTHERS[:5])
def test_an_empty_one_is_filled(old):
    text, warned = merge(NEW, old)
    licence = 'apache-2.0' if 'apache' in old else 'mit'
    changed = {'base_model': 'a/new', 'datasets': ['a/b'], 'tags': ['timm', 'gem']}
    assert metadata(text) == {**DATA, **changed, 'license': licence}
    assert '# new' in text
    assert not warned


@pytest.mark.parametrize('old', OTHERS[5:])
def test_text_of_somebody_stays_alone(old):
    text, warned = merge(NEW, old)
    assert text.endswith(old.split('---')[-1].lstrip() if old.startswith('---') else old)
    assert '# new' not in text
    assert metadata(text)['base_model'] == 'a/new'
    assert warned.startswith('the card keeps the text that somebody wrote there')


def test_own_text_of_a_folder():
    """It is taken where there is none, and left out, with a warning, where there is."""
    mine = NEW + '\nmine\n'
    assert merge(mine, OLD) == (merge(NEW, OLD)[0] + '\nmine\n', '')
    text, warned = merge(mine, OLD + '\nof others\n')
    assert text == merge(NEW, OLD)[0] + '\nof others\n'
    assert 'what is new in the other is left out' in warned
    assert merge(mine, mine) == (mine, '')
    text, warned = merge('All of it mine.', OLD)
    assert text.endswith('---\nAll of it mine.')
    assert 'old' not in text
    assert not warned
    assert merge('All of it mine.', text) == (text, '')
    assert 'left out' in merge('Other text.', text)[1]
    assert merge('Text.', '') == merge('Text.', 'Text.') == ('Text.', '')


def test_marks_in_the_text_of_a_card():
    for mark in (BEGIN, END):
        with pytest.raises(ValueError, match='must not hold the comments that mark'):
            generate(DATA, f'# x\n\n{mark}')


def test_another_name():
    def card(repo_id):
        name = repo_id.split('/')[1]
        index = [{'name': name, 'results': []}]
        text = (
            f"{REPOSITORY.format(repo_id)}\n# {name}\n\n'hf-hub:{repo_id}' `hf-hub:{repo_id}` a/bc"
        )
        return generate(DATA | {'model-index': index}, text)

    own = '\nmine: hf-hub:a/b, a/b\n'
    for old in ('a/b', 'USER/NAME'):
        assert rename(card(old) + own, 'some/123') == card('some/123') + own
    assert rename(card('a/b'), 'a/b') == card('a/b')
    for text in ('# of a/b', '', OLD):
        assert rename(text, 'some/other') == text


# What is refused, or must not take long


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'---\na: [\n---\n', 'no plain YAML'),
        (b'---\ntags: trees\n---\n', 'tags is not a list'),
        (b'---\njust text\n---\n', 'are not fields'),
        (b'---\na: &x 1\nb: *x\n---\n', r"use the anchor 'x', which is refused"),
        (b'---\na: !!timestamp x\n---\n', r"use the tag '.*timestamp', which is refused"),
        (b'---\na: "\x1b[31m"\n---\n', 'no plain YAML'),
        (b'---\na: 1\n' + b'[' * 5000 + b'\n---\n', 'no plain YAML'),
        (b'---\na: ' + b'[' * 5000 + b'\n---\n', 'no plain YAML'),
        (b'---\na: ' + b'9' * 60_000 + b'\n---\n', 'Exceeds the limit'),
        (b'---\n' + b'# comment\n' * 7000 + b'---\n', 'more than 65536 characters'),
        (b'\xe9t\xe9', "can't decode"),
        (b'x' * (2**20 + 1), 'more than 1048576 bytes'),
    ],
    ids=range(12),
)
def test_what_cannot_be_read(tmp_path, content, message):
    (tmp_path / 'README.md').write_bytes(content)
    with within(10), pytest.raises(ValueError, match=rf'^the card cannot be read: .*{message}'):
        read(tmp_path / 'README.md', 'the card')


@pytest.mark.parametrize(
    'text',
    [
        '---\n' + 'a: {' * 200 + '\n---\n',
        '---\n' + ''.join(f'k{i}: v\n' for i in range(6000)) + '---\n',
        '---\na: ' + '1:' * 30_000 + '1\n---\n',
        '---\na: ' + '-' * 60_000 + '\n---\n',
        '---\n' + '\n' * 60_000 + '---\n',
        '<!-- made by timm_fisher: ' + 'a:' * 500_000,
        BEGIN * 13_000,
        (BEGIN + END) * 6000,
        '---\n' * 250_000,
        '---\n' + '---' + ' ' * 2**19 + 'x\n---' + ' ' * 2**18,
        '\n' * 2**20,
        '\r\n' * 2**19,
        '#' * 2**20,
        '<!--' * 2**18,
    ],
    ids=range(14),
)
def test_hostile_text_takes_no_time(text):
    with within(20), warnings.catch_warnings(action='ignore'):
        try:
            assert len(update(NEW, text, 'the card')) < 2**21
        except ValueError as error:
            assert 'metadata' in str(error)  # noqa: PT017
