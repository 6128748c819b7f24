"""The papers' configurations as timm models, by name: `timm.create_model('resnet50_3g')`.

`timm.list_models(module='presets')` lists them. A preset takes the arguments of `PooledModel` in
place of its own; `head_kwargs` are merged, key by key, as long as the head stays the preset's:

```python
timm.create_model('resnet50_3g', num_classes=365, head_kwargs=dict(blocks=1))
```

`pretrained=True` loads the backbone's weights, head and classifier are fresh. What is saved is the
architecture `timm_fisher` with its arguments, not the preset's name.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from torch import nn

from timm_fisher.backbone import wrap_cfg
from timm_fisher.factory import timm_fisher

# "Deep Global Generalized Gaussian Networks", section 3.3: reduction to 256, no downsampling in the
# last stage (14 x 14 descriptors of 224 px), 3 blocks, 5 iterations; section 3.2.1: lambda = 1. The
# paper trains ResNet-50 and 101 from scratch; ResNet-18 is in the authors' code.
_THREE_G: dict[str, Any] = dict(
    head='3g',
    head_kwargs=dict(reduce_dim=256, blocks=3, iterations=5, shrinkage=1.0),
    last_stride=1,
    img_size=224,
)
# The same without re-weighting: section 4.2 there, and the paper named in heads/isqrt_cov.py.
_ISQRT_COV: dict[str, Any] = dict(
    head='isqrt_cov', head_kwargs=dict(reduce_dim=256, iterations=5), last_stride=1, img_size=224
)
# "Deep sparse coding Fisher vector", section 4.2, for CUB-200-2011 and MIT Indoor 67: the last
# convolution of VGG-16 (conv5_3 with its ReLU; stage -1 would be the max pool behind it) at 448 px.
_CONV5_3: dict[str, Any] = dict(backbone='vgg16', stage=-2, img_size=448)
# The same for MINC-2500. The paper does not say which weights; these are torchvision's.
_RESNET50: dict[str, Any] = dict(backbone='resnet50.tv_in1k', img_size=224)
# "Deep Fisher Kernels", section 4.1: 64 dimensions, 32 components; table 1: L2-normalised
# descriptors. Those are SIFT there, so that backbone and input are the sparse Fisher paper's.
_GMM_FISHER: dict[str, Any] = dict(
    head='gmm_fisher', head_kwargs=dict(reduce_dim=64, components=32, l2_descriptors=True)
)

PRESETS: dict[str, dict[str, Any]] = {
    'resnet18_3g': dict(backbone='resnet18', **_THREE_G),
    'resnet50_3g': dict(backbone='resnet50', **_THREE_G),
    'resnet101_3g': dict(backbone='resnet101', **_THREE_G),
    'resnet18_isqrt_cov': dict(backbone='resnet18', **_ISQRT_COV),
    'resnet50_isqrt_cov': dict(backbone='resnet50', **_ISQRT_COV),
    'resnet101_isqrt_cov': dict(backbone='resnet101', **_ISQRT_COV),
    # Section 4.2: the reduction keeps the number of channels, 100 atoms; or 128 channels, 32 atoms.
    # Two LISTA iterations. The paper does not give the weight of the penalty.
    'vgg16_sparse_fisher': dict(
        head='sparse_fisher',
        head_kwargs=dict(reduce_dim=None, code_dim=100, iterations=2),
        **_CONV5_3,
    ),
    'resnet50_sparse_fisher': dict(
        head='sparse_fisher',
        head_kwargs=dict(reduce_dim=128, code_dim=32, iterations=2),
        **_RESNET50,
    ),
    'vgg16_gmm_fisher': dict(**_GMM_FISHER, **_CONV5_3),
    'resnet50_gmm_fisher': dict(**_GMM_FISHER, **_RESNET50),
    # What table 1 of the sparse Fisher paper compares with. It is silent on NetVLAD: 64 clusters
    # are of the paper named in heads/netvlad.py, which reads conv5_3 before its ReLU.
    'vgg16_bilinear': dict(head='bilinear', head_kwargs=dict(reduce_dim=None), **_CONV5_3),
    'vgg16_netvlad': dict(
        head='netvlad', head_kwargs=dict(reduce_dim=None, clusters=64), **_CONV5_3
    ),
}


def _image_config(preset: dict[str, Any]) -> PretrainedCfg:
    """What timm knows of a preset before it is built: images as its backbone's weights want them,
    at the paper's size, and the rows and columns that its descriptors have then."""
    source: Any = timm.get_pretrained_cfg(preset['backbone'])
    size = preset['img_size']
    side = size // (16 if {'last_stride', 'stage'} & preset.keys() else 32)
    return PretrainedCfg(**wrap_cfg(source.to_dict(), (3, size, size), (side, side), 1000))


# `register_model` looks here for what timm shall know of a name.
default_cfgs = generate_default_cfgs({name: _image_config(PRESETS[name]) for name in PRESETS})


def _register(name: str, preset: dict[str, Any]) -> None:
    def entry_point(pretrained: bool = False, **arguments: Any) -> nn.Module:
        head_kwargs = arguments.get('head_kwargs')
        if arguments.get('head', preset['head']) == preset['head']:
            head_kwargs = {**preset['head_kwargs'], **(head_kwargs or {})}
        if '@' in str(arguments.get('head')):  # the heads say their stages
            arguments.setdefault('stage', -1)
        if 'output_stride' in arguments:  # the stride of the last stage, said in another way
            arguments.setdefault('last_stride', None)
        arguments = {**preset, **arguments, 'head_kwargs': head_kwargs}
        model: nn.Module = timm_fisher(pretrained, **arguments)
        return model

    # timm takes name and module of a model from its function.
    entry_point.__name__ = entry_point.__qualname__ = name
    settings = ', '.join(f'{key}={value!r}' for key, value in preset.items())
    entry_point.__doc__ = f'`PooledModel({settings})`, unless overridden.'
    globals()[name] = register_model(entry_point)


for _name, _preset in PRESETS.items():
    _register(_name, _preset)
