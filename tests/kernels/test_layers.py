"""That the frozen layers of a base compute the same, and use the kernel where they should and nowhere else."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models import resnet
from torch import nn

from sdtune import kernels
from sdtune.bases import load
from sdtune.kernels import layers
from sdtune.kernels.cpu import numba_threads, winograd


@pytest.fixture
def calls(monkeypatch) -> list:
    """A list that grows by one with each convolution that uses the kernel."""
    made, faster = [], winograd.convolution
    monkeypatch.setattr(winograd, "convolution", lambda *args: made.append(args) or faster(*args))
    return made


def convolution() -> nn.Module:
    """A frozen convolution, optimized."""
    torch.manual_seed(0)
    return kernels.optimize(nn.Conv2d(32, 40, 3, padding=1)).requires_grad_(False)


def given(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 32, 24, 24, generator=torch.Generator().manual_seed(seed))


def test_it_gives_what_the_plain_layer_gives_gradient_included(calls):
    quick = convolution()
    assert type(quick) is layers.Convolution
    found = []
    for one in (quick, kernels.restore(copy.deepcopy(quick))):
        x = given().requires_grad_()
        result = one(x)
        found.append([result.detach(), *torch.autograd.grad(result.square().sum(), x)])
    assert len(calls) == 1
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max()) for a, b in zip(*found))


def test_trained_weights_get_their_gradients(calls):
    for name in ("weight", "bias"):
        trained = convolution()
        getattr(trained, name).requires_grad_()
        trained(given()).sum().backward()
        assert getattr(trained, name).grad.any()
    assert not calls


def test_other_precisions_and_layouts_are_left_as_they_are(calls):
    assert convolution().double()(given().double()).dtype == torch.float64
    assert convolution().bfloat16()(given().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution()(given()).dtype == torch.bfloat16
    channels_last = given().contiguous(memory_format=torch.channels_last)
    assert torch.allclose(convolution()(channels_last), kernels.restore(convolution())(given()), atol=1e-5)
    assert convolution().to("meta")(given().to("meta")).device.type == "meta"
    assert not calls


def test_convolutions_of_no_whole_tiles_are_left_as_they_are(calls):
    assert convolution()(given()[:, :, :22]).shape == (2, 40, 22, 24)
    assert convolution()(given()[0]).shape == (40, 24, 24)
    assert not calls


def test_without_pytorch_s_threads_everything_is_left_as_it_is(calls, monkeypatch):
    monkeypatch.setattr(numba_threads, "_openmp_found", False)
    assert torch.equal(convolution()(given()), kernels.restore(convolution())(given()))
    assert not calls


def test_other_convolutions_stay_what_they_are():
    for settings in (dict(kernel_size=1), dict(kernel_size=3), dict(kernel_size=3, padding=1, stride=2)):
        assert type(kernels.optimize(nn.Conv2d(32, 32, **settings))) is nn.Conv2d


@pytest.mark.parametrize("setting", [dict(padding_mode="circular"), dict(dilation=(2, 2), padding=(2, 2))], ids=str)
def test_settings_that_change_after_loading_count(calls, setting):
    changed = convolution()
    calls.clear()
    for layer in (changed, plain := kernels.restore(convolution())):
        for name, value in setting.items():
            setattr(layer, name, value)
    assert torch.equal(changed(given()), plain(given()))
    assert not calls


@pytest.mark.parametrize("settings, usual", [
    (dict(), True), (dict(out_channels=64), True), (dict(temb_channels=None), True), (dict(dropout=0.5), True),
    (dict(non_linearity="relu"), True), (dict(time_embedding_norm="scale_shift"), False), (dict(up=True), False),
    (dict(output_scale_factor=2.0), False), (dict(down=True), False), (dict(skip_time_act=True), False),
], ids=str)  # fmt: skip
def test_a_block_of_any_settings_gives_what_diffusers_gives_bit_for_bit(settings, usual, monkeypatch):
    block = resnet.ResnetBlock2D(in_channels=32, **dict(temb_channels=24) | settings).requires_grad_(False)
    monkeypatch.setattr(layers, "FASTER_LAYERS", {resnet.ResnetBlock2D: layers.ResnetBlock2D})  # not the layers within
    quick = kernels.optimize(copy.deepcopy(block))
    assert type(quick) is (layers.ResnetBlock2D if usual else resnet.ResnetBlock2D)
    temb, found = None if block.time_emb_proj is None else torch.randn(2, 24), []
    for one in (block, quick):
        torch.manual_seed(0)
        x = given().requires_grad_()
        result = one(x, temb)
        found.append([result.detach(), *torch.autograd.grad(result.square().sum(), x)])
    assert all(map(torch.equal, *found))


def test_a_recorded_layer_still_reads_its_input():
    recorded = torch.jit.trace(convolution(), given())
    assert torch.allclose(recorded(given(1)), convolution()(given(1)), atol=1e-5)


def test_a_base_draws_as_diffusers_draws_it_and_is_saved_as_it_was(calls, tmp_path):
    ours, theirs = load.load_base("tiny-sd"), StableDiffusionPipeline.from_pretrained(load.TINY_SD)
    theirs.set_progress_bar_config(disable=True)
    settings = dict(prompt="a red house", num_inference_steps=2, output_type="np")
    drawn = [p(**settings, generator=torch.Generator().manual_seed(0)).images for p in (theirs, ours)]
    assert calls and abs(drawn[0] - drawn[1]).max() < 1e-3
    for name in ("unet", "vae"):
        own, other = (getattr(pipe, name) for pipe in (ours, theirs))
        assert layers.Convolution in {type(module) for module in own.modules()}
        copy.deepcopy(own).save_pretrained(tmp_path / name)
        again = type(other).from_pretrained(tmp_path / name)
        assert all(map(torch.equal, again.state_dict().values(), other.state_dict().values()))
