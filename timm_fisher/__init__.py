"""Pooling heads for timm: replace the global pool of any timm model by a named, pluggable head.

Importing this package registers the architecture `timm_fisher` with timm, the papers'
configurations by name, such as `resnet50_3g`, and the backbone `pixels`.
"""

from timm_fisher import explain, pixels, presets  # noqa: F401  (the last two register models)
from timm_fisher.errors import LoadError, PushError
from timm_fisher.factory import create_model
from timm_fisher.fitting.fit import fit
from timm_fisher.fitting.stream import DescriptorStream, ListStream
from timm_fisher.head import PoolingHead
from timm_fisher.hub.load import from_pretrained, list_pretrained
from timm_fisher.hub.push import push_folder, push_to_hub
from timm_fisher.hub.save import save_model, save_pretrained
from timm_fisher.model import PooledModel
from timm_fisher.registry import create_head, get_head, list_heads
from timm_fisher.vectors import embed

__all__ = [
    'DescriptorStream',
    'ListStream',
    'LoadError',
    'PooledModel',
    'PoolingHead',
    'PushError',
    'create_head',
    'create_model',
    'embed',
    'fit',
    'from_pretrained',
    'get_head',
    'list_heads',
    'list_pretrained',
    'push_folder',
    'push_to_hub',
    'save_model',
    'save_pretrained',
]
