"""python -m timm_fisher SCRIPT: somebody's script, with our models registered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from timm_fisher.__main__ import main

SCRIPT = """\
import sys
import timm
from neighbour import NAME
print(__name__, sys.argv[1:], timm.create_model(NAME, num_classes=3).num_classes)
"""


def call(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, '-m', 'timm_fisher', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_script(folder: Path) -> Path:
    script = folder / 'script.py'
    script.write_text(SCRIPT)
    (folder / 'neighbour.py').write_text("NAME = 'resnet18_isqrt_cov'\n")
    return script


def test_script_knows_our_models(tmp_path):
    """It has its own arguments, imports what lies beside it, and runs as a script does."""
    done = call(write_script(tmp_path), '--model', 'x')
    assert done.stdout == "__main__ ['--model', 'x'] 3\n", done.stderr


@pytest.mark.slow  # as above, but for torch's launcher
def test_torchrun(tmp_path):
    launcher = ('-m', 'torch.distributed.run', '--nproc_per_node', '1')
    done = call(write_script(tmp_path), '--model', 'x', launcher=launcher)
    assert done.stdout == "__main__ ['--model', 'x'] 3\n", done.stderr


@pytest.fixture
def run(monkeypatch):
    """`run(*arguments)` is the same in this process; what it exits with."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['timm_fisher', *map(str, arguments)])
        monkeypatch.setattr(sys, 'path', sys.path[:])
        try:
            return main()
        except SystemExit as end:
            return end.code

    return run


def test_exit_status_is_that_of_the_script(run, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('raise SystemExit(7)')
    assert run(script) == 7


def test_mistakes(run, tmp_path, capsys):
    assert run(tmp_path / 'validate.py').startswith(
        f"error: '{tmp_path}/validate.py' is not a file. timm's scripts are in its repository"
    )
    usage = 'usage: python -m timm_fisher SCRIPT [ARGS]'
    assert run() == usage
    assert run('--help') is None
    assert capsys.readouterr().out == f'{usage}\n'
