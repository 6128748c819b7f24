"""A model on a CPU: the same numbers, and memory that is not faulted in anew for every tensor."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import timm_fisher
from timm_fisher import device
from timm_fisher.device import to_device

PAGES = """
import resource, torch
from timm_fisher.device import to_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)  # 64 MiB: 16384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
to_device(torch.nn.Identity(), 'cpu')
faults()  # the first tensor of this size
print(before, faults())
"""


def uses_glibc():
    return sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'gnu_get_libc_version')


@pytest.mark.skipif(not uses_glibc(), reason='other C libraries are left as they are')
def test_freed_memory_is_used_again():
    text = subprocess.run([sys.executable, '-c', PAGES], check=True, capture_output=True, text=True)
    before, after = map(int, text.stdout.split())
    assert before > 8 * 100  # however large the pages are
    assert after < before / 20


@pytest.mark.parametrize('accepts', [1, 0])
def test_older_glibc(monkeypatch, accepts):
    """One that refuses a large threshold maps no memory for single tensors at all."""
    calls = {}

    class Library:
        def mallopt(self, name, value):
            calls[name] = value
            return accepts

    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: Library())
    device._keep_freed_memory.__wrapped__()
    assert calls == {-3: 2**31 - 1, -1: -1} | ({} if accepts else {-4: 0})


@pytest.mark.parametrize('platform', ['linux', 'darwin', 'win32'])
def test_without_mallopt(monkeypatch, capfd, platform):
    """Such as musl's, where the library has no such function: nothing, without a word."""
    monkeypatch.setattr(sys, 'platform', platform)
    library = object() if platform == 'linux' else None  # which must not be loaded elsewhere
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: library or pytest.fail('loaded'))
    device._keep_freed_memory.__wrapped__()
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_efficientnet', 'test_vit'])
@pytest.mark.parametrize('head', ['avg', 'sparse_fisher'])
def test_same_numbers(backbone, head):
    torch.manual_seed(0)
    model = timm_fisher.create_model(backbone, head, num_classes=5).eval()
    x = torch.randn(3, *timm.data.resolve_model_data_config(model)['input_size'])
    with torch.no_grad():
        expected = model(x)
    assert to_device(model, 'cpu') is model
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_only_convolutions_change():
    """A parameter of five dimensions knows no channels_last."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3))
    to_device(model, torch.device('cpu'))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous()


def test_other_devices_get_the_memory_format_alone(monkeypatch):
    monkeypatch.setattr(device, '_keep_freed_memory', lambda: pytest.fail('not for a CPU'))
    model = to_device(nn.Conv2d(3, 4, 3), 'meta')
    assert model.weight.is_meta
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
