"""That switching off a kernel for a measurement switches it off."""

import torch

from sdtune import kernels
from sdtune.benchmark.kernel_switches import KERNELS, switched_off


def test_with_all_kernels_switched_off_a_unet_computes_what_pytorch_computes(pipe, monkeypatch):
    monkeypatch.setenv("SDTUNE_KERNELS", "on")
    unet = kernels.optimize(pipe.unet.requires_grad_(False))
    sample, text = torch.randn(1, 4, 32, 32), torch.randn(1, 77, unet.config.cross_attention_dim)
    with switched_off(KERNELS):
        without = unet(sample, 10, text).sample
    assert torch.equal(without, kernels.restore(unet)(sample, 10, text).sample)
    fast = kernels.optimize(unet)(sample, 10, text).sample
    assert not torch.equal(fast, without) and torch.allclose(fast, without, atol=1e-3)
