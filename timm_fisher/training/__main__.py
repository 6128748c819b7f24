"""Train a pooling head on a timm backbone, in stages: `accelerate launch -m timm_fisher.training`."""

from timm_fisher.training.run import main

if __name__ == '__main__':
    main()
