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
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        print('usage: python -m timm_fisher SCRIPT [ARGS]', file=sys.stderr)
        sys.exit(2)
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"error: '{script}' is no file. Give the path of a script.", file=sys.stderr)
        sys.exit(2)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)  # where the script imports its neighbours from
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
