"""Small models that tests of model, backbone and factory share."""

import torch

import timm_fisher

BACKBONES = ['test_resnet', 'test_efficientnet', 'test_convnext', 'test_vit']


def create(backbone='test_resnet', head='avg', **arguments):
    torch.manual_seed(0)
    arguments = {'num_classes': 5} | arguments
    return timm_fisher.create_model(backbone, head=head, **arguments).eval()


def images(channels=3, size=64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def names(model):
    return set(dict(model.named_parameters()))
