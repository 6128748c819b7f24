"""Small models that tests of model, backbone and factory share."""

import torch

import timm_fisher

BACKBONES = ['test_resnet', 'test_efficientnet', 'test_convnext', 'test_vit']


def create(backbone='test_resnet', head='avg', **arguments):
    torch.manual_seed(0)
    arguments = {'num_classes': 5} | arguments
    return timm_fisher.create_model(backbone, head=head, **arguments).eval()


def backbone_of(head):
    """A small one that gives what a head needs."""
    several = not isinstance(head, str) or head not in timm_fisher.list_heads()
    needs_token = not several and any(timm_fisher.get_head(head).asks_for.values())
    return 'test_vit' if needs_token else 'test_resnet'


def images(channels=3, size=64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def names(model):
    return set(dict(model.named_parameters()))
