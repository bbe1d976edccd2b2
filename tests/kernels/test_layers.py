"""That a base's frozen layers are the same layers, and take the quicker way where they should and nowhere else."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models import resnet
from torch import nn

from sdtune import kernels
from sdtune.bases import load
from sdtune.kernels import layers
from sdtune.kernels.cpu import linear, numba_threads, winograd

KINDS = {
    layers.Convolution: lambda: nn.Conv2d(32, 40, 3, padding=1),
    layers.Linear: lambda: nn.Linear(24, 40),
}  # for `given`


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request, monkeypatch):
    monkeypatch.setattr(layers, "on_amd_cpu", lambda: True)
    return request.param


@pytest.fixture(params=["AVX2", "AVX512"])
def vectors(request, monkeypatch):
    """The vectors that PyTorch finds, which decide who multiplies gradients; what is chosen works with either."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)


@pytest.fixture
def calls(monkeypatch) -> list:
    """A list that grows by one with each layer that takes the quicker way."""
    made = []

    def note(place, name: str) -> None:
        quicker = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args: made.append(quicker) or quicker(*args))

    note(winograd, "convolution")
    note(linear.FrozenLinear, "apply")
    note(linear.ConvolutionAsProduct, "apply")
    return made


def layer(kind) -> nn.Module:
    torch.manual_seed(0)
    return kernels.optimize(KINDS[kind]()).requires_grad_(False)


def given(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 32, 24, 24, generator=torch.Generator().manual_seed(seed))


def test_it_gives_what_the_plain_layer_gives_gradient_included(kind, calls):
    quick = layer(kind)
    assert type(quick) is kind
    found = []
    for one in (quick, kernels.restore(copy.deepcopy(quick))):
        x = given().requires_grad_()
        result = one(x)
        found.append([result.detach(), *torch.autograd.grad(result.square().sum(), x)])
    assert len(calls) == 1
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max()) for a, b in zip(*found))


@pytest.mark.parametrize("shape", [(64, 24), (2, 300, 24), (3, 7, 5, 24)])
def test_a_linear_layer_takes_any_number_of_rows(shape, calls, vectors, monkeypatch):
    monkeypatch.setattr(layers, "on_amd_cpu", lambda: True)
    quick, x, aim, found = (
        layer(layers.Linear),
        torch.randn(shape, requires_grad=True),
        torch.randn(*shape[:-1], 40),
        [],
    )
    for one in (quick, kernels.restore(copy.deepcopy(quick))):
        found.append(torch.autograd.grad(one(x), x, aim)[0])
    assert len(calls) == 1 and found[0].shape == shape
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5 * found[1].abs().max())


@pytest.mark.parametrize(
    "batch, height, width, bias", [(1, 4, 16, True), (2, 8, 4, False), (3, 3, 5, True), (1, 1, 1, True)]
)
def test_few_pixels_and_many_weights_are_one_product(batch, height, width, bias, calls, vectors, monkeypatch):
    monkeypatch.setattr(layers, "on_amd_cpu", lambda: True)
    monkeypatch.setattr(layers.Convolution, "MIN_WEIGHTS", 1000)
    quick = kernels.optimize(nn.Conv2d(40, 30, 3, padding=1, bias=bias)).requires_grad_(False)
    x = torch.randn(batch, 40, height, width, requires_grad=True)
    aim, found = torch.randn(batch, 30, height, width), []
    for one in (quick, kernels.restore(copy.deepcopy(quick))):
        result = one(x)
        assert result.is_contiguous()
        found.append([result.detach(), *torch.autograd.grad(result, x, aim)])
    assert len(calls) == 1
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max()) for a, b in zip(*found))


def test_trained_weights_get_their_gradients(kind, calls):
    for name in ("weight", "bias"):
        trained = layer(kind)
        getattr(trained, name).requires_grad_()
        trained(given()).sum().backward()
        assert getattr(trained, name).grad.any()
    assert not calls


def test_other_precisions_and_layouts_are_left_as_they_are(kind, calls):
    assert layer(kind).double()(given().double()).dtype == torch.float64
    assert layer(kind).bfloat16()(given().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(kind)(given()).dtype == torch.bfloat16
    channels_last = given().contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer(kind)(channels_last), kernels.restore(layer(kind))(given()), atol=1e-5)
    assert layer(kind).to("meta")(given().to("meta")).device.type == "meta"
    assert not calls


def test_convolutions_that_are_no_whole_tiles_and_few_rows_are_left_as_they_are(calls, monkeypatch):
    monkeypatch.setattr(layers, "on_amd_cpu", lambda: True)
    assert layer(layers.Convolution)(given()[:, :, :22]).shape == (2, 40, 22, 24)
    assert layer(layers.Convolution)(given()[0]).shape == (40, 24, 24)
    assert layer(layers.Linear)(given()[0, 0, :2]).shape == (2, 40)
    assert not calls


def test_without_pytorch_s_threads_and_off_amd_everything_is_left_as_it_is(kind, calls, monkeypatch):
    monkeypatch.setattr(numba_threads, "_openmp_found", False)
    monkeypatch.setattr(layers, "on_amd_cpu", lambda: False)
    assert torch.equal(layer(kind)(given()), kernels.restore(layer(kind))(given()))
    assert not calls


def test_other_convolutions_stay_what_they_are():
    for settings in (dict(kernel_size=1), dict(kernel_size=3), dict(kernel_size=3, padding=1, stride=2)):
        assert type(kernels.optimize(nn.Conv2d(32, 32, **settings))) is nn.Conv2d


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


def test_a_recorded_layer_still_reads_its_input(kind):
    recorded = torch.jit.trace(layer(kind), given())
    assert torch.allclose(recorded(given(1)), layer(kind)(given(1)), atol=1e-5)


def test_a_base_draws_as_diffusers_draws_it_and_is_saved_as_it_was(calls, tmp_path):
    ours, theirs = load.load_base("tiny-sd"), StableDiffusionPipeline.from_pretrained(load.TINY_SD)
    theirs.set_progress_bar_config(disable=True)
    settings = dict(prompt="a red house", num_inference_steps=2, output_type="np")
    drawn = [p(**settings, generator=torch.Generator().manual_seed(0)).images for p in (theirs, ours)]
    assert calls and abs(drawn[0] - drawn[1]).max() < 1e-3
    for name in ("unet", "vae"):
        own, other = (getattr(pipe, name) for pipe in (ours, theirs))
        quickened = {layers.Convolution, layers.Linear} & {type(module) for module in own.modules()}
        assert len(quickened) == (2 if name == "unet" else 1)
        copy.deepcopy(own).save_pretrained(tmp_path / name)
        again = type(other).from_pretrained(tmp_path / name)
        assert all(map(torch.equal, again.state_dict().values(), other.state_dict().values()))
