"""A pytest plug-in that runs timm's own tests over models of this package.

timm's tests are not part of this repository: they are in the sdist of the installed version on
PyPI. The outcome is in .github/timm_tests.md.

    pip download --no-binary :all: --no-deps timm==1.0.31 && tar xf timm-1.0.31.tar.gz
    PYTHONPATH=tests python -m pytest -p timm_adaptation -o addopts= \
        timm-1.0.31/tests/test_models.py -k "forward or backward or default_cfgs or contract"
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import timm
from timm.models import PretrainedCfg, _registry, generate_default_cfgs, register_model

from timm_fisher import PooledModel
from timm_fisher.backbone import wrap_cfg
from timm_fisher.factory import timm_fisher
from timm_fisher.presets import PRESETS

PAIRS = {
    'resnet18': ('3g', {'reduce_dim': 32}),
    'resnet50': ('sparse_fisher', {'reduce_dim': 32, 'code_dim': 8}),
    'tf_efficientnet_lite0': ('isqrt_cov', {'reduce_dim': 32}),
    'convnext_atto': ('gmm_fisher', {'reduce_dim': 16, 'components': 4}),
    'swin_tiny_patch4_window7_224': ('netvlad', {'reduce_dim': 32, 'clusters': 4}),
    'vit_tiny_patch16_224': ('bilinear', {'reduce_dim': 32}),
    'mobilenetv3_small_050': ('gem', {}),
    'vgg11': ('avg', {}),
    'densenet121': ('gsnmf', {}),
    'beit_base_patch16_224': ('3g', {'reduce_dim': 32}),
    'regnety_002': ('sparse_fisher', {'reduce_dim': 32, 'code_dim': 8}),
    'ghostnet_050': ('dbm_idfk', {'hidden': [16, 8]}),
    'mambaout_femto': ('gem', {}),
    'test_vit': ('gmm_fisher', {'reduce_dim': 16, 'components': 4}),
}
NOT_OURS = {
    'test_model_default_cfgs_non_std': 'asks for num_features as the width of the pooled vector',
    'test_model_forward_torchscript_with_features_fx': 'is about one model of timm, regnetx_002',
}
BACKBONES = {f'{backbone}_x_{head}': backbone for backbone, (head, _) in PAIRS.items()}


def _register() -> None:
    module = ModuleType('pairs')
    sys.modules['pairs'] = module
    module.default_cfgs = {}
    for name, backbone in BACKBONES.items():
        head, head_kwargs = PAIRS[backbone]

        def create(
            pretrained: bool = False,
            backbone: str = backbone,
            head: str = head,
            head_kwargs: Any = head_kwargs,
            **arguments: Any,
        ) -> Any:
            return timm_fisher(
                pretrained, backbone=backbone, head=head, head_kwargs=head_kwargs, **arguments
            )

        create.__name__ = create.__qualname__ = name
        create.__module__ = 'pairs'
        cfg = timm.get_pretrained_cfg(backbone).to_dict()
        cfg = wrap_cfg(cfg, cfg['input_size'], cfg.get('pool_size'), cfg['num_classes'])
        module.default_cfgs |= generate_default_cfgs({name: PretrainedCfg(**cfg)})
        register_model(create)


def _patterns(value: Any) -> list[str]:
    return [value] if isinstance(value, str) and value else [part for part in value if part]


def _list_models(
    filter: Any = '', module: Any = '', exclude_filters: Any = '', **_: Any
) -> list[str]:
    """The pairs whose backbone timm would list, and this package's presets with all models."""

    def fits(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    wanted, modules = _patterns(filter), _patterns(module)
    names = [
        name
        for name, backbone in BACKBONES.items()
        if (not wanted or fits(backbone, wanted))
        and not fits(backbone, _patterns(exclude_filters))
        and (not modules or fits(_registry._model_to_module[backbone], modules))
    ]
    return names if wanted or modules else [*names, *PRESETS]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spare what global_pool='' is asked of, and mark what is no fault of a model."""
    for item in items:
        # Models of timm whose pool cannot be taken out alone are on this list.
        item.module.EARLY_POOL_MODELS = (*item.module.EARLY_POOL_MODELS, PooledModel)
        if reason := NOT_OURS.get(item.originalname):
            item.add_marker(pytest.mark.xfail(reason=reason))


_register()
timm.list_models = _list_models
timm.list_pretrained = lambda *_, **__: []
