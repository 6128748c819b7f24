"""The one command line: mistakes are a sentence and a status, not a traceback."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field

import pytest
from limits import within

from timm_fisher.errors import ArgumentError, LoadError, PushError
from timm_fisher.training.command_line import parse, run
from timm_fisher.training.config import Config


@dataclass
class Settings:
    """Do something.

    Args:
        names: what to do it with.
        data_dir: where.
        count: how often.
    """

    names: list[str] = field(default_factory=list)
    data_dir: str = ''
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f'count is {self.count}; give 1 or more.')


def test_dashes_and_underscores_are_the_same():
    for option in ('--data-dir', '--data_dir'):
        assert parse(Settings, arguments=[option, 'a-b']) == Settings(data_dir='a-b')
        assert parse(Settings, arguments=[f'{option}=a-b']) == Settings(data_dir='a-b')


def test_positional():
    arguments = ['x', 'y', '--count', '2']
    assert parse(Settings, positional='names', arguments=arguments) == Settings(['x', 'y'], count=2)
    assert parse(Settings, positional='names', arguments=[]) == Settings()


def test_value_that_the_settings_refuse(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Settings, arguments=['--count', '0'])
    assert stopped.value.code == 2
    assert 'count is 0; give 1 or more.' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('error', 'status', 'text'),
    [
        (ValueError('a value'), 2, 'error: a value'),
        (OSError('no file'), 2, 'error: no file'),
        (LoadError('not this'), 2, 'error: not this'),
        (PushError('not there'), 2, 'error: not there'),
        (ArgumentError('no such argument'), 2, 'error: no such argument'),
        (ChildProcessError('the run failed'), 2, 'error: the run failed'),
        (FloatingPointError('diverged'), 2, 'error: diverged'),
        (ModuleNotFoundError('install it'), 2, 'error: install it'),
        (KeyboardInterrupt(), 130, 'Interrupted.'),
        (KeyboardInterrupt('stopped'), 130, 'stopped'),
    ],
    ids=repr,
)
def test_error_is_a_sentence(capsys, error, status, text):
    def fail(settings):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(fail, Settings, arguments=[])
    assert stopped.value.code == status
    assert capsys.readouterr().err == f'{text}\n'


@pytest.fixture
def handlers():
    """What the command sets, as this process ends with it, is set back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_is_a_sentence(capsys, handlers, number):
    """Of a recipe that does nothing about it."""

    def end(settings):
        os.kill(os.getpid(), number)
        time.sleep(60)

    with within(30), pytest.raises(SystemExit) as stopped:
        run(end, Settings, arguments=[])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == 'Interrupted.\n'


def test_mistake_of_ours_is_a_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda settings: 1 // 0, Settings, arguments=[])


def test_stage_with_a_hyphen(tmp_path):
    """Hyphens of an option's own name alone stand for underscores."""
    file = tmp_path / 'config.yaml'
    file.write_text('stages: {fine-tune: {train: all, lr: 0.1}}')
    config = parse(Config, arguments=['--config', str(file), '--stages.fine-tune.lr', '0.5'])
    assert list(config.stages) == ['fine-tune']
    assert config.stages['fine-tune'].lr == 0.5


@pytest.mark.parametrize('option', ['--backbone_kwargs.a.b=1', '--backbone_kwargs.a.b 1'])
def test_name_that_reaches_into_a_dict_of_a_dict(tmp_path, capsys, option):
    """It would drop what else the inner dict holds."""
    file = tmp_path / 'config.yaml'
    file.write_text('backbone_kwargs: {a: {b: 2, c: 3}}')
    with pytest.raises(SystemExit):
        parse(Config, arguments=['--config', str(file), *option.split()])
    assert "give all of --backbone_kwargs.a '{...}'" in capsys.readouterr().err
    whole = ['--backbone_kwargs.a', '{b: 1, c: 3}']
    config = parse(Config, arguments=['--config', str(file), *whole])
    assert config.backbone_kwargs == {'a': {'b': 1, 'c': 3}}


@pytest.mark.parametrize('option', ['--stages.finetun.lr=0.1', '--stages.finetun.lr 0.1'])
def test_stage_that_is_not_there(tmp_path, capsys, option):
    """A mistyped name adds no stage; a stage as a whole may be added."""
    file = tmp_path / 'config.yaml'
    file.write_text('stages: {warm: {}, finetune: {lr: 0.5}}')
    arguments = ['--backbone_kwargs.a', '1', *option.split(), '--seed', '1']
    with pytest.raises(SystemExit):
        parse(Config, arguments=['--config', str(file), *arguments])
    message = "stages has no 'finetun', only ['warm', 'finetune']. Did you mean 'finetune'?"
    assert message in capsys.readouterr().err
    whole = ['--stages.finetun', '{"epochs": 3}', *arguments]
    config = parse(Config, arguments=['--config', str(file), *whole])
    assert list(config.stages) == ['warm', 'finetune', 'finetun']
    assert (config.stages['finetun'].epochs, config.stages['finetun'].lr) == (3, 0.1)
