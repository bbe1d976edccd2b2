"""What hanging tuners on a UNet promises: the base stays as it was, and the residual is added where it should be."""

import copy
import pickle

import accelerate
import pytest
import torch
from conftest import picture, stir
from diffusers import UNet2DConditionModel
from diffusers.hooks import group_offloading
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig
from unets import batch, inputs, predict

import sdtune
from sdtune.adapters import active_adapters, api, hook, inject, per_sample
from sdtune.tuners.config import KINDS, TUNER_OPS

ALL = ["attn1", "attn2", "ff"]


def blocks(unet):
    return {path: m for path, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)}


@pytest.mark.parametrize("ops", [["attn1"], ["attn2"], ["ff"], ["block"], ALL, [*ALL, "block"]])
def test_a_fresh_tuner_leaves_the_output_bit_identical_and_every_tensor_where_it_was(unet, ops):
    before, tensors = predict(unet), dict(unet.state_dict(keep_vars=True))
    buffers, grads = dict(unet.named_buffers()), {k: p.requires_grad for k, p in unet.named_parameters()}
    sdtune.add_tuner(unet, sdtune.TunerConfig(ops=ops), "new")
    after = unet.state_dict(keep_vars=True)
    assert torch.equal(predict(unet), before)
    assert all(after[k] is t for k, t in tensors.items()) and dict(unet.named_buffers()).keys() == buffers.keys()
    assert all(".res_tuner.tuners.new." in k for k in after.keys() - tensors.keys())
    assert all(p.requires_grad == grads.get(k, True) for k, p in unet.named_parameters())
    stir(unet, "new", 0)
    assert not torch.equal(predict(unet), before)


@pytest.mark.parametrize("ops", [["attn1"], ["ff", "attn2"], ["block"]])
def test_a_tuner_hangs_on_the_operations_that_were_named_in_every_block_and_nowhere_else(unet, ops):
    sdtune.add_tuner(unet, sdtune.TunerConfig(ops=ops), "new")
    expected = {path if op == "block" else f"{path}.{op}" for path in blocks(unet) for op in ops}
    found = {key.rsplit(".", 2)[0] for key in inject.adapter_parameters(unet, "new")}
    assert found == expected and len(blocks(unet)) == 7


@pytest.mark.parametrize("op", [*ALL, "block"])
def test_what_is_added_is_the_tuners_result_at_the_operations_own_input(unet, op):
    sdtune.add_tuner(unet, sdtune.TunerConfig(ops=[op]), "new")
    stir(unet, "new", 0)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    module = block if op == "block" else getattr(block, op)
    seen = []
    module.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    predict(unet)
    (args, kwargs) = seen.pop()
    with torch.no_grad():
        with active_adapters.adapters_disabled(unet):
            plain = module(*args, **kwargs)
        by_hand = plain + module.res_tuner.tuners["new"](args[0])
        assert torch.equal(module(*args, **kwargs), by_hand) and not torch.equal(plain, by_hand)
        assert torch.equal(module(**{"hidden_states": args[0], **kwargs}), by_hand)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_tuner_takes_the_dtype_of_the_unet_and_follows_to(unet, dtype):
    torch.manual_seed(0)
    unet.to(dtype)
    sdtune.add_tuner(unet, adapter_name="new")
    stir(unet, "new", 0)
    assert {p.dtype for p in unet.parameters()} == {dtype}
    result = predict(unet)
    assert result.dtype == dtype and result.isfinite().all()
    unet.to(torch.float32)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    torch.testing.assert_close(predict(unet), result.float(), atol=0.1, rtol=0.1)


def test_a_tuner_in_fp32_beside_a_base_in_bf16_computes_in_fp32_with_and_without_autocast(unet):
    torch.manual_seed(0)
    sdtune.add_tuner(unet, adapter_name="new")
    stir(unet, "new", 0)
    full = predict(unet)
    unet.to(torch.bfloat16)
    for p in inject.adapter_parameters(unet, "new").values():
        p.data = p.data.float()
    result = predict(unet)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), full, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(predict(unet).float(), full, atol=0.1, rtol=0.1)


def in_training(unet, name):
    """The parameters of a tuner, alone trainable now, and what gives their gradients."""
    parameters = inject.adapter_parameters(unet, name)
    unet.requires_grad_(False).train()
    for p in parameters.values():
        p.requires_grad_(True)
    return parameters, lambda: torch.autograd.grad(unet(*inputs()).sample.square().sum(), list(parameters.values()))


def test_gradients_are_the_same_with_gradient_checkpointing(unet):
    sdtune.add_tuner(unet, sdtune.TunerConfig(ops=[*ALL, "block"]), adapter_name="new")
    stir(unet, "new", 0)
    parameters, gradients = in_training(unet, "new")
    plain = gradients()
    unet.enable_gradient_checkpointing()
    for key, a, b in zip(parameters, plain, gradients()):
        assert torch.equal(a, b) and a.any(), key


def test_a_fresh_or_loaded_tuner_is_trainable_and_those_beside_it_are_not(unet, files):
    unet.requires_grad_(False)
    sdtune.add_tuner(unet, adapter_name="old")
    for name in ("fresh", "loaded"):
        if name == "fresh":
            sdtune.add_tuner(unet, adapter_name=name)
        else:
            sdtune.load_tuner(unet, files / "one.safetensors", name)
        trainable = {id(p) for p in unet.parameters() if p.requires_grad}
        assert trainable == {id(p) for p in inject.adapter_parameters(unet, name).values()}


def test_a_copy_is_independent_of_what_was_copied_also_through_pickle(unet):
    sdtune.add_tuner(unet, adapter_name="new")
    stir(unet, "new", 0)
    before = predict(unet)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(predict(twin), before)
        stir(twin, "new", 1)
        twin.set_adapters("new", 0.5)
        assert not torch.equal(predict(twin), before) and torch.equal(predict(unet), before)
        twin.load_lora_adapter({}, prefix=None)  # the copy's own
        with pytest.raises(ValueError, match="cannot be fused"):
            twin.fuse_lora()
        sdtune.unload_tuner(twin, "new")
        assert hook.tuner_names(unet) == ["new"] and torch.equal(predict(unet), before)


def test_tuners_that_were_switched_off_for_a_while_are_as_before_also_after_an_error(unet):
    plain = predict(unet)
    sdtune.add_tuner(unet, adapter_name="new")
    stir(unet, "new", 0)
    full = predict(unet)
    with pytest.raises(KeyError), active_adapters.adapters_disabled(unet):
        assert torch.equal(predict(unet), plain)
        raise KeyError
    assert torch.equal(predict(unet), full)


def test_after_the_last_tuner_is_unloaded_the_unet_is_as_if_there_had_never_been_any(unet, base):
    sdtune.add_tuner(unet, adapter_name="a")
    sdtune.add_tuner(unet, sdtune.TunerConfig(ops=["attn1", "block"]), "b")
    sdtune.unload_tuner(unet, "a")
    stir(unet, "b", 0)
    assert not torch.equal(predict(unet), predict(base.unet))
    assert not hasattr(blocks(unet).popitem()[1].ff, "res_tuner")
    sdtune.unload_tuner(unet, "b")
    assert [n for n, _ in unet.named_modules()] == [n for n, _ in base.unet.named_modules()]
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in unet.modules())
    assert unet.__dict__.keys() - {"_hf_peft_config_loaded"} == base.unet.__dict__.keys()
    assert torch.equal(predict(unet), predict(base.unet))


@pytest.mark.parametrize("name", ["", "a.b", 5, None, "keys", "training", "forward", "old"])
def test_a_name_that_cannot_be_one_is_refused_and_nothing_changes(unet, name):
    sdtune.add_tuner(unet, adapter_name="old")
    keys = list(unet.state_dict())
    with pytest.raises(ValueError, match=f"adapter_name (is )?{name!r}"):
        sdtune.add_tuner(unet, adapter_name=name)
    assert list(unet.state_dict()) == keys and list(unet.peft_config) == ["old"]


def test_a_model_without_the_operations_is_refused_and_nothing_changes(unet):
    blocks(unet).popitem()[1].attn2 = None
    keys = list(unet.state_dict())
    with pytest.raises(ValueError, match=r"lacks the operations mid_block.*\.attn2"):
        sdtune.add_tuner(unet)
    assert list(unet.state_dict()) == keys and not hasattr(unet, "peft_config")
    bare = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, mid_block_type=None,
        down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no BasicTransformerBlock"):
        sdtune.add_tuner(bare)


@pytest.mark.parametrize("kind", ["res_attn_layer", "res_attn_conv", "full"])
def test_layerwise_casting_rounds_a_tuner_beside_single_layers_and_computes_it_whole(unet, kind):
    sdtune.add_tuner(unet, sdtune.TunerConfig(kind), "new")
    shake(unet, "new", size=0.02)
    whole = copy.deepcopy(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for module, stored in zip(whole.modules(), unet.modules()):  # rounded where diffusers stores them so
        for p, kept in zip(module.parameters(recurse=False), stored.parameters(recurse=False)):
            p.data = p.data.to(kept.dtype).to(torch.float32)
    for _ in range(2):
        assert torch.float8_e4m3fn in {p.dtype for p in inject.adapter_parameters(unet, "new").values()}
        assert torch.allclose(predict(unet), predict(whole), atol=1e-4)


def test_layerwise_casting_stores_a_tuner_in_fp8_or_leaves_one_that_comes_later_whole(unet, files):
    """As diffusers promises for a LoRA: weights stored in fp8, computed in the compute dtype, without fp8 inputs."""
    early, late = unet, copy.deepcopy(unet)
    sdtune.load_tuner(early, files / "one.safetensors", "one")
    early.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {p.dtype for p in inject.adapter_parameters(early, "one").values()} == {torch.float8_e4m3fn}
    late.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = predict(late)
    sdtune.load_tuner(late, files / "one.safetensors", "one")
    assert {p.dtype for p in inject.adapter_parameters(late, "one").values()} == {torch.float32}
    whole = predict(late)
    for p in inject.adapter_parameters(late, "one").values():
        p.data = p.data.to(torch.float8_e4m3fn).float()
    assert torch.equal(predict(late), predict(early)) and not torch.equal(whole, plain)


def test_a_unet_whose_weights_are_offloaded_is_refused_where_the_pipeline_would_do(unet, files):
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    keys = list(unet.state_dict())
    with pytest.raises(ValueError, match="pass the pipeline"):
        sdtune.load_tuner(unet, files / "one.safetensors", "one")
    assert list(unet.state_dict()) == keys


# --- the zoo ---


def shake(unet, name, seed=0, size=0.05):
    """Moves every weight of a fresh tuner of any kind, so that it shows."""
    generator = torch.Generator().manual_seed(seed)
    for p in inject.adapter_parameters(unet, name).values():
        p.data += size * torch.randn(p.shape, generator=generator).to(p)


def ops_of(kind: str) -> list[str]:
    """The operations of the model of the tests that a kind of tuner can be added to."""
    return [op for op in TUNER_OPS if op != "block" or kind != "res_attn_layer"]


@pytest.mark.parametrize(("kind", "op"), [(kind, op) for kind in KINDS for op in ops_of(kind)])
def test_each_kind_beside_each_operation_starts_at_zero_and_adds_only_its_own_weights(unet, kind, op, tmp_path):
    before, tensors = predict(unet), dict(unet.state_dict(keep_vars=True))
    config = sdtune.TunerConfig(kind, ops=[op])
    sdtune.add_tuner(unet, config, "new")
    assert torch.equal(predict(unet), before)
    own = {k: p for k, p in unet.state_dict(keep_vars=True).items() if k not in tensors}
    assert all(unet.state_dict(keep_vars=True)[k] is t for k, t in tensors.items())
    assert {k.replace(".res_tuner.tuners.new", "") for k in own} == inject.adapter_parameters(unet, "new").keys()
    assert {k: tuple(p.shape) for k, p in inject.adapter_parameters(unet, "new").items()} == inject.expected_shapes(
        unet, config
    )
    shake(unet, "new")
    changed = predict(unet)
    assert not torch.allclose(changed, before, atol=1e-3)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(predict(twin), changed)
        for path, block in blocks(twin).items():  # a copy's tuner uses the copy's attention
            module = block if op == "block" else getattr(block, op)
            module = next(m for m in module.modules() if hasattr(m, "res_tuner"))
            assert module.res_tuner.operation.attention is twin.get_submodule(path).get_submodule(
                "attn2" if op == "attn2" else "attn1"
            )
    sdtune.save_tuner(unet, tmp_path, "new", dtype=torch.float32)
    sdtune.unload_tuner(unet, "new")
    assert torch.equal(predict(unet), before)
    sdtune.load_tuner(unet, tmp_path, "again")
    assert torch.equal(predict(unet), changed)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_from_its_start_and_alike_with_gradient_checkpointing(unet, kind):
    sdtune.add_tuner(unet, sdtune.TunerConfig(kind, ops=ops_of(kind)), "new")
    parameters, gradients = in_training(unet, "new")
    first = gradients()
    assert any(g.any() for g in first)  # there is a way out of zero
    for p, g in zip(parameters.values(), first):
        p.data -= 1e-3 * g.sign()
    plain = gradients()
    assert all(g.any() and g.isfinite().all() for g in plain)  # and after one step nothing is dead
    unet.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_follows_the_dtype_and_works_in_fp32_beside_a_half_precision_base(unet, kind, dtype):
    sdtune.add_tuner(unet, sdtune.TunerConfig(kind, ops=ops_of(kind)), "new")
    shake(unet, "new", size=0.02)
    full = predict(unet)
    unet.to(dtype)
    half = predict(unet)
    for p in inject.adapter_parameters(unet, "new").values():
        p.data = p.data.float()
    results = [half, predict(unet)]
    with torch.autocast("cpu", dtype):
        results.append(predict(unet))
    for result in results:
        assert result.dtype == dtype and (result.float() - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("ffn_kind", [None, *KINDS])
def test_dual_tuning_is_any_kind_beside_attention_and_any_beside_the_feed_forward(unet, ffn_kind):
    for kind in KINDS:
        name = f"{kind}_and"
        sdtune.add_tuner(unet, sdtune.TunerConfig(kind, ops=["attn1", "attn2", "ff"], ffn_kind=ffn_kind), name)
        block = blocks(unet).popitem()[1]
        for op, expected in zip(ALL, [kind, kind, ffn_kind or kind]):
            layers = [m for m in getattr(block, op).modules() if isinstance(m, hook.ParallelTuners)]
            assert {type(m.tuners[name]) for m in layers if name in m.tuners} == {KINDS[expected]}
        shake(unet, name)
    unet.set_adapters(list(unet.peft_config), [0.1] * len(KINDS))  # and all mix
    assert predict(unet).isfinite().all()


@pytest.mark.parametrize("kind", ["res_prefix", "res_prompt"])
def test_a_tuner_that_uses_the_frozen_projections_sees_a_lora_on_them_as_the_attention_does(unet, kind):
    """So fusing the LoRA changes nothing."""
    sdtune.add_tuner(unet, sdtune.TunerConfig(kind), "new")
    shake(unet, "new")
    alone = predict(unet)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "lora")
    unet.set_adapters(["new"])
    assert torch.equal(predict(unet), alone)
    unet.set_adapters(["new", "lora"], [1.0, 0.1])
    mixed = predict(unet)
    assert not torch.allclose(mixed, alone, atol=1e-2)
    unet.fuse_lora(adapter_names=["lora"])
    torch.testing.assert_close(predict(unet), mixed, atol=1e-3, rtol=1e-3)


def test_each_kind_can_have_a_weight_per_sample_beside_a_lora_on_the_projections(unet):
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False), "lora")
    weights = {"lora": [0.0, 0.5, -0.3, 0.0]}
    for i, kind in enumerate(KINDS):
        sdtune.add_tuner(unet, sdtune.TunerConfig(kind, ops=ops_of(kind)), kind)
        shake(unet, kind, i, 0.02)
        weights[kind] = [1.0 * (i == 0), 1.0 * (i in (1, 3)), 0.2, 1.0 * (i == 4)]
    x, t, text = batch(2)
    with per_sample.per_sample_weights(unet, weights, repeat=2), torch.no_grad():
        together = unet(x, t, text).sample
    for i in range(len(x)):
        unet.set_adapters(list(weights), [w[i % 4] for w in weights.values()])
        with torch.no_grad():
            alone = unet(x[i : i + 1], t, text[i : i + 1]).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_the_feed_forward_give_the_same_or_are_refused(unet, kind):
    sdtune.add_tuner(unet, sdtune.TunerConfig(kind, ops=["ff"]), "new")
    shake(unet, "new")
    x, t, text = batch(1)
    with torch.no_grad():
        whole = unet(x, t, text).sample
        for dim in (0, 1):
            for block in blocks(unet).values():
                block.set_chunk_feed_forward(1, dim=dim)
            assert not per_sample.can_share_a_pass(unet, ["new"])
            with pytest.raises(ValueError, match="in chunks"), per_sample.per_sample_weights(unet, {"new": [1.0]}):
                pass
            if dim == 1 and kind.startswith("res_attn"):
                with pytest.raises(ValueError, match="the tuner 'new' attends to all tokens"):
                    unet(x, t, text)
            else:
                torch.testing.assert_close(unet(x, t, text).sample, whole, atol=5e-4, rtol=1e-3)


def make_offloaded_weights_nan(monkeypatch):
    """What group offloading has moved away is NaN in between, as on a GPU it is on another device."""
    kept = {}

    def tensors(group):
        for module in group.modules:
            yield from (*module.parameters(), *module.buffers())
        yield from (*group.parameters, *group.buffers)

    def offload(group):
        for tensor in tensors(group):
            whole = kept.setdefault(id(tensor), (tensor, tensor.data))[1]
            tensor.data = torch.full_like(whole, float("nan")) if whole.is_floating_point() else whole

    def onload(group):
        for tensor in tensors(group):
            tensor.data = kept.get(id(tensor), (tensor, tensor.data))[1]

    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload)


@pytest.mark.parametrize("how", ["enable_sequential_cpu_offload", "group"])
@pytest.mark.parametrize("kind", [*KINDS, "full"])
def test_each_kind_survives_offloading(pipe, kind, how, monkeypatch):
    """On the CPU only, where accelerate's sequential hooks leave weights on "meta" in between."""
    real = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda m, d, **kwargs: real(m, torch.device(d.type), **kwargs))
    make_offloaded_weights_nan(monkeypatch)
    sdtune.add_tuner(pipe, sdtune.TunerConfig(kind, ops=None if kind == "full" else ops_of(kind)), "new")
    shake(pipe.unet, "new", size=0.02 if kind != "full" else 0.001)
    before = picture(pipe)
    if how == "group":
        pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    else:
        getattr(pipe, how)(device="cpu")
        assert all(p.is_meta for p in inject.adapter_parameters(pipe.unet, "new").values())
    assert torch.equal(picture(pipe), before)


def test_the_text_is_what_the_cross_attention_gets(unet):
    """Also under gradient checkpointing, which passes it by position, and with an IP-Adapter's pictures beside it."""
    sdtune.add_tuner(unet, sdtune.TunerConfig("res_attn_text", ops=["attn2", "block"]), "new")
    seen = []
    for module in unet.modules():
        if isinstance(module, KINDS["res_attn_text"]):
            module.register_forward_hook(lambda m, args, out: seen.append(args[1].text))
    x, t, text = inputs()
    unet(x, t, text)
    unet.train().enable_gradient_checkpointing()
    unet(x, t, text)
    block = blocks(unet).popitem()[1]
    tokens = torch.randn(1, 4, block.norm1.normalized_shape[0])
    hook.add_residual(block.attn2, (tokens,), {"encoder_hidden_states": (text, [text])}, tokens)
    assert len(seen) == 4 * 7 + 1 and all(s is text for s in seen)


def test_a_tuner_and_a_lora_on_the_same_convolutions_mix_in_any_order_and_go_without_a_trace(unet):
    configs = {"tuner": sdtune.TunerConfig("res_attn_conv"), "lora": sdtune.TunerConfig("lora", ops=["ff", "conv"])}
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, unet.config.cross_attention_dim)

    def predict(model):
        with torch.no_grad():
            return model(x, 500, text).sample

    before, found = predict(unet), []
    for names in (["tuner", "lora"], ["lora", "tuner"]):
        for name in names:
            sdtune.add_tuner(unet, configs[name], name)
            generator = torch.Generator().manual_seed(len(name))
            for p in api.tuner_parameters(unet, name).values():
                p.data = 0.05 * torch.randn(p.shape, generator=generator)
        unet.set_adapters(["tuner", "lora"], [1.0, 0.5])
        found.append(predict(unet))
        for name in names:
            sdtune.unload_tuner(unet, name)
        assert torch.equal(predict(unet), before)
    assert torch.allclose(*found, atol=1e-5) and (found[0] - before).norm() > 0.01 * before.norm()
