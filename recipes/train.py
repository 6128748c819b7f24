"""Train a pooling head on a timm backbone, in stages.

    accelerate launch recipes/train.py --config recipes/configs/trashnet.yaml \
        --head sparse_fisher --data-dir PATH

`accelerate launch -m timm_fisher.training` does the same, without a checkout of the repository.
"""

from timm_fisher.training.__main__ import main

if __name__ == '__main__':
    main()
