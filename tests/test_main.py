"""python -m timm_fisher SCRIPT: somebody's script, with our models registered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_torchrun(tmp_path):
    launcher = ('-m', 'torch.distributed.run', '--nproc_per_node', '1')
    done = call(write_script(tmp_path), '--model', 'x', launcher=launcher)
    assert done.stdout == "__main__ ['--model', 'x'] 3\n", done.stderr


def test_exit_status_is_that_of_the_script(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('raise SystemExit(7)')
    assert call(script).returncode == 7


def test_mistakes(tmp_path):
    missing = call(tmp_path / 'validate.py')
    assert missing.returncode == 1
    assert f"'{tmp_path}/validate.py' is not a file" in missing.stderr
    assert 'Traceback' not in missing.stderr
    nothing = call()
    assert nothing.returncode == 1
    assert nothing.stderr == 'usage: python -m timm_fisher SCRIPT [ARGS]\n'
