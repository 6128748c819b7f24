"""A pooling head that is not part of timm_fisher."""

from timm_fisher import PoolingHead


class Max(PoolingHead):
    """Mean of the `largest` largest values of each channel: `[B, N, C]` -> `[B, C]`."""

    def __init__(self, in_features, *, largest=1):
        super().__init__()
        self.in_features = self.out_features = in_features
        self.largest = largest

    def forward(self, x):
        return x.topk(min(self.largest, x.shape[1]), dim=1).values.mean(1)
