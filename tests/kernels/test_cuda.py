"""What holds on a GPU, where work is captured in CUDA graphs and pictures lie in channels_last; skipped elsewhere.

Run it with: pytest -n 0 tests/kernels/test_cuda.py
"""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import ANIME
from diffusers.models import activations
from PIL import Image
from torch import nn

import sdtune
from sdtune import kernels
from sdtune.adapters import api, tuner_file
from sdtune.adapters.operations import ADAPTER_PATHS
from sdtune.inference import compare, grids
from sdtune.kernels import layers
from sdtune.kernels.cuda import graphs
from sdtune.training import errors, trainer
from sdtune.tuners import base, config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
if torch.cuda.is_available():
    from sdtune.kernels.cuda import attention as cuda_attention
    from sdtune.kernels.cuda import layers as cuda_layers


def run(tmp_path, name: str, tuner=None, **changes) -> tuple[list[float], torch.Tensor]:
    """The losses of a short run in fp16, and its weights."""
    values = dict(
        data=str(ANIME), output=str(tmp_path / name), steps=6, batch_size=2, gradient_accumulation_steps=2,
        preview_steps=1, preview_every=0, preview_prompts=["a cat face"], learning_rate=1e-4, mixed_precision="fp16",
    )  # fmt: skip
    result = sdtune.fit(trainer.TrainConfig(**values | changes), tuner)
    tensors = tuner_file.load(result.tuner).tensors
    return result.losses, torch.cat([tensors[k].float().flatten() for k in sorted(tensors)])


def alike(a, b, within: float) -> bool:
    return ((a - b).norm() / b.norm()).item() < within


@pytest.mark.parametrize("kind", ["res_attn", "lora", "res_prompt", "full"])
def test_a_recorded_step_learns_what_a_step_launched_piece_by_piece_does(tmp_path, monkeypatch, kind):
    tuner = sdtune.TunerConfig(kind=kind) if kind != "lora" else sdtune.TunerConfig(kind=kind, ops=["attn1", "attn2"])
    recorded = []
    record = graphs._OneGraph._capture
    monkeypatch.setattr(graphs._OneGraph, "_capture", lambda self: recorded.append(1) or record(self))
    losses, weights = run(tmp_path, "recorded", tuner)
    assert recorded and all(map(math.isfinite, losses))
    monkeypatch.setattr(graphs, "CudaGraphed", lambda function: function)
    monkeypatch.setattr(graphs, "graphed_unet", lambda unet: nullcontext())
    plain_losses, plain_weights = run(tmp_path, "plain", tuner)
    assert losses == pytest.approx(plain_losses, rel=5e-3)
    assert alike(
        weights, plain_weights, 0.1
    )  # sums on a GPU have no order, and Adam starts with the signs of gradients


@pytest.mark.parametrize("changes", [dict(gradient_checkpointing=True), dict(mixed_precision="bf16"), dict(flip=True),
                                     dict(mixed_precision="no")], ids=str)  # fmt: skip
def test_other_ways_to_train_are_recorded_too(tmp_path, changes, recwarn):
    losses, weights = run(tmp_path, "run", **changes)
    assert all(map(math.isfinite, losses)) and torch.isfinite(weights).all()
    assert not [w for w in recwarn if "no CUDA graph could be captured" in str(w.message)]


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    losses, weights = run(tmp_path, "straight", steps=6, checkpoint_every=3)
    run(tmp_path, "broken", steps=3)
    resumed, resumed_weights = run(tmp_path, "broken", steps=6, resume=True)
    assert resumed == pytest.approx(losses, rel=5e-3) and alike(resumed_weights, weights, 0.1)


def test_a_loss_that_is_not_finite_keeps_the_weights_from_before(tmp_path):
    with pytest.raises(errors.TrainError, match="finite"):
        run(tmp_path, "run", learning_rate=1e30, steps=8)
    file = tuner_file.load(tmp_path / "run/last-good.safetensors")
    assert all(torch.isfinite(t).all() for t in file.tensors.values())


def test_what_cannot_be_recorded_is_done_piece_by_piece_after_a_warning():
    replayed = graphs.CudaGraphed(lambda x: x * x.sum().item())
    one, two = (torch.full((3,), float(n), device="cuda") for n in (1, 2))
    assert replayed(x=one).tolist() == [3, 3, 3]
    with pytest.warns(UserWarning, match="no CUDA graph could be captured"):
        assert replayed(x=two).tolist() == [12, 12, 12]
    assert replayed(x=one).tolist() == [3, 3, 3]


def test_a_replay_reads_what_it_is_given_and_its_results_stay():
    replayed = graphs.CudaGraphed(lambda x, y: x * 2 + y)
    given = [torch.tensor([float(n)], device="cuda") for n in range(5)]
    results = [replayed(x=x, y=y) for x, y in zip(given, reversed(given))]
    assert [r.item() for r in results] == [4, 5, 6, 7, 8]


def test_each_combination_of_shapes_is_recorded_once_and_all_give_their_own_results(monkeypatch):
    recorded, record = [], graphs._OneGraph._capture
    monkeypatch.setattr(graphs._OneGraph, "_capture", lambda self: recorded.append(1) or record(self))
    replayed = graphs.CudaGraphed(lambda x, y: (x.sum() + y).cumsum(0))
    given = [torch.full((size,), float(n), device="cuda") for n in range(4) for size in (2, 3, 5)]
    results = [replayed(x=x, y=x) for x in given]
    assert len(recorded) == 3
    for x, result in zip(given, results):
        assert torch.equal(result, (x.sum() + x).cumsum(0))


def test_a_run_on_several_shapes_learns_what_it_learns_without_graphs(tmp_path, monkeypatch):
    for i, size in enumerate([(256, 256), (192, 288), (192, 288), (288, 192)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    settings = dict(data=str(tmp_path), steps=12)
    losses, weights = run(tmp_path, "recorded", **settings)
    monkeypatch.setattr(graphs, "CudaGraphed", lambda function: function)
    plain_losses, plain_weights = run(tmp_path, "plain", **settings)
    assert losses == pytest.approx(plain_losses, rel=5e-3) and alike(weights, plain_weights, 0.1)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def loaded(request, files):
    pipe = sdtune.load_base("tiny-sd", request.param).to("cuda")
    sdtune.load_tuner(pipe, files / "one.safetensors", "tuner")
    sdtune.load_tuner(pipe, files / "lora", "lora")
    return pipe


def test_recorded_passes_draw_what_passes_launched_piece_by_piece_do(loaded, monkeypatch, recwarn):
    mixes = [{}, {"tuner": 1.0}, {"lora": 0.5}, {"tuner": 0.5, "lora": 1.0}]
    cells = [compare.Cell("a cat face", seed, mix) for seed, mix in enumerate(mixes)]
    together = compare.draw_cells(loaded, cells, steps=6)
    singly = [compare.draw_cells(loaded, [cell], steps=6)[0] for cell in cells]
    monkeypatch.setattr(graphs, "graphed_unet", lambda unet: nullcontext())
    plain = compare.draw_cells(loaded, cells, steps=6)
    rounding = 2 if loaded.unet.dtype == torch.float16 else 20  # a batch of one is rounded otherwise
    for a, b, c in zip(together, plain, singly):
        assert grids.mean_difference(a, b) < 1 and grids.mean_difference(c, b) < rounding
    assert grids.mean_difference(together[0], together[1]) > 2
    assert not [w for w in recwarn if "no CUDA graph could be captured" in str(w.message)]


def test_a_tuned_pipeline_of_the_user_draws_as_before_after_it_was_recorded(loaded, files):
    def drawn(pipe):
        return pipe("a cat face", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]

    exact = sdtune.load_base("tiny-sd").to("cuda")
    sdtune.load_tuner(exact, files / "one.safetensors", "tuner")
    sdtune.load_tuner(exact, files / "lora", "lora")
    exact, before = drawn(exact), drawn(loaded)
    compare.draw_cells(loaded, [compare.Cell("a dog")], steps=3)
    after = drawn(loaded)
    assert "forward" not in vars(loaded.unet)
    if loaded.unet.dtype == torch.float16:
        assert grids.mean_difference(before, after) < 2
    else:  # in the other layout it is rounded otherwise, and in bfloat16 that alone can be seen
        assert grids.mean_difference(after, exact) < 2 * grids.mean_difference(before, exact)


def test_an_offloaded_pipeline_draws_piece_by_piece(files):
    pipe = sdtune.load_base("tiny-sd", torch.float16)
    pipe.enable_model_cpu_offload()
    sdtune.load_tuner(pipe, files / "one.safetensors", "tuner")
    assert len(compare.draw_cells(pipe, [compare.Cell("a cat face", 0, {"tuner": 1.0})], steps=3)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 320, 64, 64), (2, 960, 20, 12), (4, 64, 7, 9), (1, 2560, 8, 8)], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_the_norm_of_pictures_in_channels_last_is_pytorchs_gradient_included(shape, dtype, silu):
    torch.manual_seed(0)
    norm = kernels.optimize(nn.GroupNorm(32, shape[1])).requires_grad_(False).to("cuda", dtype)
    assert type(norm) is layers.GroupNorm
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, gradient = (torch.randn(shape, device="cuda") * 3 + 5 for _ in range(2))
    x, gradient = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    assert norm._quicker(x)
    exact, own = x.double().requires_grad_(), x.requires_grad_()
    then = F.silu if silu else torch.clone
    wanted = then(F.group_norm(exact, 32, norm.weight.double(), norm.bias.double(), norm.eps))
    found = norm._compute(own, silu=True) if silu else norm(own)
    assert found.is_contiguous(memory_format=torch.channels_last)
    found.backward(gradient), wanted.backward(gradient.double())
    usual = x.detach().clone().requires_grad_()
    plain = then(F.group_norm(usual, 32, norm.weight, norm.bias, norm.eps))
    plain.backward(gradient)
    for mine, theirs, true in ((found, plain, wanted), (own.grad, usual.grad, exact.grad)):
        error, usual_error = ((t.double() - true).norm().item() for t in (mine, theirs))
        assert error <= 1.5 * usual_error


def error(found, exact) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, rows, columns, heads, rank", [
    (1, 4096, None, 4, 4), (2, 1024, None, 4, 4), (3, 100, None, 2, 8), (1, 64, None, 1, 16), (2, 300, 77, 4, 4),
    (1, 4096, 4097, 1, 1),
])  # fmt: skip
def test_the_narrow_attention_is_the_exact_one_but_for_rounding_gradient_included(
    batch, rows, columns, heads, rank, dtype
):
    torch.manual_seed(0)
    sizes = [(rows, 3)] if columns is None else [(rows, 1), (columns, 2)]
    given = [torch.randn(batch, n, parts, heads, rank, device="cuda").to(dtype).requires_grad_() for n, parts in sizes]
    exact = [x.detach().double().requires_grad_() for x in given]
    gradient = torch.randn(batch, rows, heads, rank, device="cuda").to(dtype)
    found = cuda_attention.attention(0.7, *given)
    q, k, v = (part.transpose(1, 2) for x in exact for part in x.unbind(2))
    wanted = (q @ k.mT * 0.7).softmax(-1).matmul(v).transpose(1, 2)
    found.backward(gradient), wanted.backward(gradient.double())
    unit = torch.finfo(dtype).eps
    assert error(found, wanted) < unit
    for own, true in zip(given, exact):
        assert error(own.grad, true.grad) < 2 * unit


@pytest.mark.parametrize("rows, columns", [(64, None), (16, None), (100, 40), (64, 77), (4096, None)])
@pytest.mark.parametrize("score", [-200, -30, 30])
def test_rows_whose_scores_are_all_far_below_or_above_zero_have_a_gradient(rows, columns, score):
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(1, n, 2, 4, device="cuda").half() for n in (rows, *[columns or rows] * 2, rows))
    q[..., 0], k[..., 0] = abs(score) ** 0.5, abs(score) ** 0.5 * (1 if score > 0 else -1)
    given = [torch.stack([q, k, v], 2)] if columns is None else [q[:, :, None], torch.stack([k, v], 2)]
    exact = [x.double().requires_grad_() for x in given]
    given = [x.requires_grad_() for x in given]
    cuda_attention.attention(1.0, *given).backward(gradient)
    q, k, v = (part.transpose(1, 2) for x in exact for part in x.unbind(2))
    (q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).backward(gradient.double())
    for own, true in zip(given, exact):
        assert error(own.grad, true.grad) < 0.01


@pytest.mark.parametrize("kind", ["res_attn", "res_attn_text"])
def test_a_tuner_on_a_gpu_gives_what_it_gives_on_a_cpu(kind):
    torch.manual_seed(0)
    widths = base.Widths(dim=64, inner_dim=64, context_dim=48, text_dim=48)
    tuner = config.build_tuner(config.TunerConfig(kind=kind), "attn2", widths)
    nn.init.normal_(tuner.o.weight)
    x, text = torch.randn(2, 200, 64), torch.randn(2, 77, 48)
    wanted = tuner(x, base.Context(text=text))
    found = tuner.to("cuda", torch.float16)(x.cuda().half(), base.Context(text=text.cuda().half()))
    assert error(found.cpu(), wanted.double()) < 0.005


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1000, 640), (3, 7, 48)], ids=str)
def test_geglu_is_diffusers_gradient_included(shape, dtype):
    torch.manual_seed(0)
    plain = activations.GEGLU(32, shape[-1] // 2).requires_grad_(False).to("cuda", dtype)
    quick = kernels.optimize(nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(quick) is layers.GEGLU
    plain.proj = quick.proj = nn.Identity()
    x, gradient = (torch.randn(size, device="cuda").to(dtype) for size in (shape, (*shape[:-1], shape[-1] // 2)))
    found = {}
    for name, layer, own in (("quick", quick, x.clone()), ("plain", plain, x.clone()), ("exact", plain, x.double())):
        result = layer(own.requires_grad_())
        result.backward(gradient.to(result.dtype))
        found[name] = result, own.grad
    for mine, theirs, true in zip(*found.values()):
        assert error(mine, true) <= 1.2 * error(theirs, true)


def test_a_step_copies_no_picture_into_another_order_for_a_norm_nor_keeps_it_for_a_silu(monkeypatch):
    unet = kernels.to_channels_last(
        sdtune.load_base("tiny-sd", torch.float16).unet.requires_grad_(False).eval().to("cuda"), ADAPTER_PATHS
    )
    sdtune.add_tuner(unet)
    monkeypatch.setattr(F, "group_norm", lambda *args: pytest.fail("a picture lies in another order"))
    monkeypatch.setattr(nn.SiLU, "forward", lambda silu, x: F.silu(x) if x.dim() == 2 else pytest.fail("not in one"))
    unet.conv_act = nn.Mish()  # the only one that is no part of a block
    gradients = []
    backward = cuda_layers._GroupNorm.backward
    monkeypatch.setattr(cuda_layers._GroupNorm, "backward", lambda ctx, g: gradients.append(g) or backward(ctx, g))
    x = torch.randn(2, 4, 16, 16, device="cuda", dtype=torch.float16)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, device="cuda", dtype=torch.float16)
    unet(x, 500, text).sample.square().mean().backward()
    assert gradients and all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients)


def test_weights_of_adapters_keep_their_memory_which_the_trainer_holds():
    unet = sdtune.load_base("tiny-sd", torch.float16).unet.to("cuda")
    sdtune.add_tuner(unet, sdtune.TunerConfig("res_attn_conv"), "a")
    before = {k: p.data_ptr() for k, p in api.tuner_parameters(unet, "a").items()}
    kernels.to_channels_last(unet, ADAPTER_PATHS)
    assert {k: p.data_ptr() for k, p in api.tuner_parameters(unet, "a").items()} == before


def test_a_base_laid_out_for_the_gpu_gives_what_it_gave(files):
    unet = sdtune.load_base("tiny-sd", torch.float16).unet.to("cuda")
    plain = kernels.restore(copy.deepcopy(unet))
    x = torch.randn(2, 4, 16, 16, device="cuda", dtype=torch.float16)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        laid_out = kernels.to_channels_last(unet.requires_grad_(False), ADAPTER_PATHS)
        found, wanted = (m(x, 500, text).sample for m in (laid_out, plain))
    assert alike(found, wanted, 0.01)
