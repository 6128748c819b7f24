"""`python -m timm_fisher SCRIPT [ARGS]`: run a script, such as timm's validate.py, with the models
of this package registered. Also after `torchrun -m` and `accelerate launch -m`.

    python -m timm_fisher validate.py --model resnet50_3g --data-dir PATH
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the command line names, as Python itself would.

    Importing this module has imported `timm_fisher`, which registers the models.
    """
    usage = 'usage: python -m timm_fisher SCRIPT [ARGS]'
    if len(sys.argv) < 2:
        sys.exit(usage)
    if sys.argv[1] in ('-h', '--help'):
        print(usage)
        return
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(
            f"error: '{script}' is not a file. timm's scripts are in its repository, not in its "
            'package: https://github.com/huggingface/pytorch-image-models'
        )
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)  # where the script imports its neighbours from
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
