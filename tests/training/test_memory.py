"""With `MemorySavingHooks` a forward pass saves fewer activations, and the gradients are the same bit for bit."""

import weakref
from contextlib import nullcontext

import pytest
import torch

import sdtune
from sdtune.adapters import api
from sdtune.kernels.cpu import winograd
from sdtune.training import memory
from sdtune.training.memory import MemorySavingHooks


@pytest.fixture(autouse=True)
def hooks_for_tensors_of_any_size(monkeypatch):
    monkeypatch.setattr(memory, "MIN_BYTES", 0)


def unet_with_tuner(pipe, kind: str) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    """The small base's UNet in training, and the parameters of a tuner that already does something."""
    torch.manual_seed(0)
    unet = pipe.unet.requires_grad_(False).train()
    api.add_tuner(unet, sdtune.TunerConfig(kind=kind), "tuner")
    parameters = list(api.tuner_parameters(unet, "tuner").values())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05)
    return unet, parameters


def loss(unet, within) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, unet.config.in_channels, 16, 16, generator=random)
    states = torch.randn(2, 77, unet.config.cross_attention_dim, generator=random)
    with within:
        found = unet(noisy.to(unet.dtype), torch.tensor([100, 700]), states.to(unet.dtype)).sample
        return found.float().square().mean()


@pytest.mark.parametrize("kind", ["res_attn", "res_adapter", "res_prefix", "lora", "dora"])
@pytest.mark.parametrize("how", ["fp32", "bf16", "checkpointing", "as on a GPU"])
def test_gradients_are_the_same_bit_for_bit(pipe, kind, how, monkeypatch):
    monkeypatch.setattr(memory, "_is_cuda", lambda x: how == "as on a GPU")
    unet, parameters = unet_with_tuner(pipe, kind)
    if how == "bf16":
        unet.to(torch.bfloat16)
    if how == "checkpointing":
        unet.enable_gradient_checkpointing()
    plain = torch.autograd.grad(loss(unet, nullcontext()), parameters)
    within = MemorySavingHooks(unet)
    for _ in range(2):  # the hooks can be entered several times
        found = torch.autograd.grad(loss(unet, within), parameters)
        assert all(map(torch.equal, found, plain)) and all(gradient.any() for gradient in plain)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_activations_that_can_be_recomputed_are_not_saved(pipe, monkeypatch, on_gpu):
    monkeypatch.setattr(memory, "_is_cuda", lambda x: on_gpu)
    monkeypatch.setattr(winograd, "MIN_TILES", 10**9)  # our own convolution saves no input either
    unet, _ = unet_with_tuner(pipe, "res_attn")
    resnet, attentions = unet.up_blocks[-2].resnets[-1], unet.up_blocks[-2].attentions[-1]
    block, seen = attentions.transformer_blocks[0], {}

    def remember(name: str, x: torch.Tensor) -> torch.Tensor:
        seen[name] = weakref.ref(x.untyped_storage())
        return x

    inputs = {"norm": resnet.norm1, "activation": resnet.nonlinearity, "convolution": resnet.conv2,
             "tuner": block.attn1.res_tuner.tuners["tuner"].qkv}  # fmt: skip
    for name, module in inputs.items():
        module.register_forward_pre_hook(lambda module, args, name=name: (remember(name, args[0]), None)[1])
    block.ff.net[0].proj.register_forward_hook(lambda module, args, result: (remember("product", result), None)[1])
    gelu = block.ff.net[0].gelu
    block.ff.net[0].gelu = lambda gate: remember("gelu's result", gelu(gate))

    def saved_for_backward(within) -> list[str]:
        result = loss(unet, within)
        found = sorted(name for name, alive in seen.items() if alive())
        result.backward()
        return found

    assert saved_for_backward(nullcontext()) == sorted(seen) and len(seen) == 6
    assert saved_for_backward(MemorySavingHooks(unet)) == (["norm"] if on_gpu else ["norm", "product"])
