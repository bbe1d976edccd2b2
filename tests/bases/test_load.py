"""A base loads whole, from a folder and from a single file, without a network; what is none is refused in words."""

import json
import re
import shutil
import socket

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtune.bases import load, single_file
from sdtune.bases.errors import BaseError
from sdtune.bases.load import load_base, native_resolution

SMALL = {
    "unet": {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 8, "cross_attention_dim": 32},
    "vae": {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
}
SPREAD = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


# --- the original layout, written down from CompVis' and OpenCLIP's modules ---

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def split(key: str) -> tuple[str, str]:
    module, _, weight = key.rpartition(".")
    return module, weight


def original_unet_key(key: str, unet) -> str:
    module, weight = split(key)
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{weight}"
    per_level = unet.config.layers_per_block + 1  # resnets going up; going down, the downsampler is the last
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        kind, j, rest = found.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{RESNET.get(rest, rest)}.{weight}"
    way, i, kind, j, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", module).groups()
    i, j = int(i), int(j)
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (i + 1)}.0.op.{weight}"
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in unet.config.up_block_types[i] else 1
        return f"output_blocks.{per_level * i + per_level - 1}.{after}.conv.{weight}"
    block = f"input_blocks.{1 + per_level * i + j}" if way == "down" else f"output_blocks.{per_level * i + j}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{RESNET.get(rest, rest) if kind == 'resnets' else rest}.{weight}"


def original_vae(vae) -> dict:
    tensors, last = {}, len(vae.config.block_out_channels) - 1
    for key, value in vae.state_dict().items():
        key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", key):
            key = f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
            value = value[..., None, None] if value.ndim == 2 else value  # the original has 1x1 convolutions
        tensors[f"first_stage_model.{key}"] = value
    return tensors


def text_weights(text_encoder) -> dict:
    return {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()}  # as transformers >= 5.6


def original_clip(text_encoder) -> dict:
    tensors = {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text_weights(text_encoder).items()}
    ids = torch.arange(text_encoder.config.max_position_embeddings)[None]
    return tensors | {"cond_stage_model.transformer.text_model.embeddings.position_ids": ids}


def original_open_clip(text_encoder) -> dict:
    old, new = text_weights(text_encoder), {}
    new["positional_embedding"] = old["embeddings.position_embedding.weight"]
    new["token_embedding.weight"] = old["embeddings.token_embedding.weight"]
    for w in ("weight", "bias"):
        new[f"ln_final.{w}"] = old[f"final_layer_norm.{w}"]
        for i in range(text_encoder.config.num_hidden_layers):
            layer, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            new[f"{block}.attn.in_proj_{w}"] = torch.cat([old[f"{layer}.self_attn.{x}_proj.{w}"] for x in "qkv"])
            for ours, theirs in TEXT_LAYER.items():
                new[f"{block}.{theirs}.{w}"] = old[f"{layer}.{ours}.{w}"]
    # What a real file holds beside that: the last layer, which SD 2.x does not use, and two weights of CLIP.
    first, unused = "transformer.resblocks.0.", f"transformer.resblocks.{text_encoder.config.num_hidden_layers}."
    new |= {k.replace(first, unused): torch.ones_like(v) for k, v in new.items() if k.startswith(first)}
    new |= {"text_projection": torch.ones_like(new["positional_embedding"][:1]).T @ new["positional_embedding"][:1]}
    return {f"cond_stage_model.model.{k}": v for k, v in new.items()} | {
        "cond_stage_model.model.logit_scale": torch.ones(())
    }


def original_layout(parts: dict, kind: str) -> dict:
    unet = parts["unet"]
    tensors = {f"model.diffusion_model.{original_unet_key(k, unet)}": v for k, v in unet.state_dict().items()}
    tensors |= original_vae(parts["vae"])
    tensors |= (original_clip if kind == "sd15" else original_open_clip)(parts["text_encoder"])
    return tensors | {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(())}  # loaders skip such


def build(configs, kind: str) -> dict:
    """The three models of a configs folder, on the current default device."""
    folder = configs / kind
    return {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
    }


# --- fixtures ---


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The shipped configs with narrow layers, and for each kind random models and their single file in fp16."""
    root = tmp_path_factory.mktemp("small")
    configs = shutil.copytree(single_file.CONFIGS, root / "configs")
    for kind in ("sd15", "sd21"):
        for part, changes in SMALL.items():
            path = configs / kind / part / "config.json"
            if part == "unet" and kind == "sd21":
                changes = changes | {"attention_head_dim": [1, 2, 4, 4]}
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    made = {}
    for kind in ("sd15", "sd21"):
        torch.manual_seed(0)
        parts = build(configs, kind)
        for model in parts.values():
            model.half().eval()
            for weight in model.parameters():
                weight.data.normal_(std=0.05)  # norms and biases too, so that a swap shows
        path = root / f"{kind}.safetensors"
        save_file({k: v.contiguous() for k, v in original_layout(parts, kind).items()}, path)
        made[kind] = (parts, path)
    return configs, made


@pytest.fixture
def single(small, monkeypatch):
    monkeypatch.setattr(single_file, "CONFIGS", small[0])
    return small[1]


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    parts, _ = small[1]["sd15"]
    path = tmp_path_factory.mktemp("folder") / "base"
    StableDiffusionPipeline(
        **parts, tokenizer=CLIPTokenizer.from_pretrained(single_file.CONFIGS / "tokenizer"), feature_extractor=None,
        scheduler=PNDMScheduler.from_pretrained(single_file.CONFIGS / "sd15" / "scheduler"), safety_checker=None,
        requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip
    return path


def assert_same_weights(pipe, parts, dtype):
    for name, model in parts.items():
        got, wanted = getattr(pipe, name).state_dict(), model.state_dict()
        assert got.keys() == wanted.keys()
        assert [k for k in wanted if got[k].dtype != dtype or not torch.equal(got[k], wanted[k].to(dtype))] == []


# --- what loads ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_a_single_file_gives_every_weight(single, kind, dtype):
    parts, path = single[kind]
    pipe = load_base(path, dtype)
    assert_same_weights(pipe, parts, dtype)
    assert pipe.safety_checker is None and pipe.name_or_path == path.name
    assert not any(getattr(pipe, name).training for name in parts)


@pytest.mark.parametrize(("kind", "padding"), [("sd15", 49407), ("sd21", 0)])
def test_a_single_file_draws(single, kind, padding):
    pipe = load_base(str(single[kind][1]))
    ids = pipe.tokenizer("A photo of a cat", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [padding] * 70
    image = pipe("a cat", num_inference_steps=1, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and 0 <= image.min() < image.max() <= 1


def test_a_folder_gives_every_weight(folder, small):
    pipe = load_base(folder)
    assert_same_weights(pipe, small[1]["sd15"][0], torch.float32)
    assert native_resolution(folder) == native_resolution(str(folder)) == 512


def test_a_single_file_saved_as_a_folder_loads_again(single, tmp_path):
    pipe = load_base(single["sd21"][1])
    pipe.save_pretrained(tmp_path)
    again = load_base(tmp_path)
    assert_same_weights(again, {"unet": pipe.unet, "text_encoder": pipe.text_encoder}, torch.float32)
    assert again.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    assert again.tokenizer("a cat!").input_ids == pipe.tokenizer("a cat!").input_ids


@pytest.mark.parametrize(
    ("kind", "stated", "spread", "prediction", "resolution"),
    [
        ("sd15", None, 0.2, "epsilon", 512),
        ("sd15", "v", 0.05, "v_prediction", 512),
        ("sd21", None, 0.2, "v_prediction", 768),
        ("sd21", None, 0.05, "epsilon", 512),
        ("sd21", "epsilon", 0.2, "epsilon", 512),
        ("sd21", "v_prediction", 0.05, "v_prediction", 768),
    ],
)
def test_what_a_single_file_predicts(single, tmp_path, kind, stated, spread, prediction, resolution):
    tensors = load_file(single[kind][1])
    bias = torch.linspace(-1, 1, len(tensors[SPREAD]))
    tensors[SPREAD] = (bias / bias.std() * spread).half()
    path = tmp_path / "base.safetensors"
    save_file(tensors, path, metadata={"modelspec.prediction_type": stated} if stated else None)
    assert native_resolution(path) == resolution
    pipe = load_base(path)
    assert pipe.scheduler.config.prediction_type == prediction
    assert pipe.unet.config.sample_size == resolution // 8
    assert type(pipe.scheduler) is (PNDMScheduler if kind == "sd15" else DDIMScheduler)


def test_shipped_configs_have_the_published_sizes():
    with torch.device("meta"):
        sizes = {
            kind: [sum(p.numel() for p in model.parameters()) for model in build(single_file.CONFIGS, kind).values()]
            for kind in ("sd15", "sd21")
        }
    assert sizes == {"sd15": [859_520_964, 83_653_863, 123_060_480], "sd21": [865_910_724, 83_653_863, 340_387_840]}


def test_shipped_vocabulary():
    tokenizer = CLIPTokenizer.from_pretrained(single_file.CONFIGS / "tokenizer")
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("Hello, world! naïve 猫 🐈").input_ids[1:5] == [3306, 267, 1002, 256]
    assert len((single_file.CONFIGS / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()) == 1 + 48894


# --- what is refused ---


def edited(source, target, change, metadata=None):
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target, metadata=metadata)


def without(*prefixes):
    def change(tensors):
        for key in [k for k in tensors if k.startswith(prefixes)]:
            del tensors[key]

    return change


def reshaped(key, shape):
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
BAD_FILES = {
    # what: (how to make it from the sd15 file and at the target, what was found, what to do)
    "ckpt": (None, "is a .ckpt", "convert"),
    "no suffix": (None, "file without suffix", "convert"),
    "truncated": (lambda s, t: t.write_bytes(s.read_bytes()[:200_000]), "not a whole safetensors", "again"),
    "truncated header": (lambda s, t: t.write_bytes(s.read_bytes()[:100]), "not a whole safetensors", "again"),
    "empty": (lambda s, t: t.write_bytes(b""), "not a whole safetensors", "again"),
    "a web page": (lambda s, t: t.write_text("<!doctype html><title>404</title>"), "not a whole safetensors", "again"),
    "pickle": (lambda s, t: torch.save({"state_dict": {}}, t), "is a pickle", "again"),
    "old pickle": (
        lambda s, t: torch.save({}, t, _use_new_zipfile_serialization=False), "is a pickle", "again",
    ),
    "LoRA": (lambda s, t: save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, t), "LoRA", "load_lora_weights"),
    "tuner": (
        lambda s, t: save_file({"unet.x": torch.ones(1)}, t, metadata={"sdtune.tuner": "{}"}), "tuner", "load_tuner",
    ),
    "SDXL": (
        lambda s, t: save_file({"conditioner.embedders.1.model.ln_final.bias": torch.ones(1)}, t),
        "Stable Diffusion XL", "another base",
    ),
    "part of a folder": (lambda s, t: save_file({"conv_in.weight": torch.ones(1)}, t), "conv_in.weight", "folder"),
    "no tensors": (lambda s, t: save_file({}, t), "first keys: none", "folder"),
    "no VAE": (lambda s, t: edited(s, t, without("first_stage")), "holds no VAE", "whole checkpoint"),
    "UNet only": (
        lambda s, t: edited(s, t, without("first_stage", "cond")), "holds no VAE, text encoder", "whole checkpoint",
    ),
    "inpainting": (lambda s, t: edited(s, t, reshaped(CONV_IN, (32, 9, 3, 3))), "reads 9 channels", "another base"),
    "other widths": (lambda s, t: edited(s, t, reshaped(CONV_IN, (16, 4, 3, 3))), "[16, 4, 3, 3]", "again"),
    "a lost weight": (
        lambda s, t: edited(s, t, without("model.diffusion_model.out.2.bias")), "weights of the UNet", "again",
    ),
    "a lost VAE weight": (
        lambda s, t: edited(s, t, without("first_stage_model.decoder.mid.attn_1.q.")), "or the VAE", "again",
    ),
    "a lost layer": (
        lambda s, t: edited(s, t, without("cond_stage_model.transformer.text_model.encoder.layers.11")),
        "lacks 16 weights of the text encoder, such as", "again",
    ),
}  # fmt: skip


SEEN_IN_WEIGHTS = ("other widths", "a lost weight", "a lost VAE weight", "a lost layer")  # not in a few header fields


def assert_refused(base, name, found, todo, function=load_base):
    with pytest.raises(BaseError) as caught:
        function(base)
    text = str(caught.value)
    assert str(name) in text and found in text, text
    assert todo in text.split("expected ", 1)[1].partition(";")[2], text
    assert "\n" not in text and len(text) < 800


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_refused(single, tmp_path, what):
    make, found, todo = BAD_FILES[what]
    path = tmp_path / {"ckpt": "base.ckpt", "no suffix": "base"}.get(what, "base.safetensors")
    if make:
        make(single["sd15"][1], path)
    else:
        torch.save({}, path)
    assert_refused(path, path, found, todo)
    if what not in SEEN_IN_WEIGHTS:
        assert_refused(path, path, found, todo, native_resolution)


def write_index(path, kind):
    path.mkdir(exist_ok=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": kind}))


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusionUpscalePipeline", None])
def test_a_folder_of_another_pipeline_is_refused(tmp_path, kind):
    write_index(tmp_path, kind)
    assert_refused(tmp_path, tmp_path, f"is a {kind or 'pipeline without a name'}", "another base")


def test_broken_folders_are_refused(folder, tmp_path):
    assert_refused(tmp_path, tmp_path, "model_index.json is missing", "name")
    assert_refused(tmp_path, tmp_path, "config.json is missing", "name", native_resolution)
    (tmp_path / "model_index.json").write_text("{")
    assert_refused(tmp_path, tmp_path, "not readable", "again")
    (tmp_path / "model_index.json").write_text("[]")
    assert_refused(tmp_path, tmp_path, "a JSON list", "again")

    write_index(tmp_path, "StableDiffusionInpaintPipeline")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"in_channels": 9, "sample_size": [64, 96]}))
    assert_refused(tmp_path, tmp_path, "reads 9 channels", "another base")
    assert_refused(tmp_path, tmp_path, "[64, 96]", "resolution", native_resolution)
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"sample_size": [64, 64]}))
    assert native_resolution(tmp_path) == 512

    cut = shutil.copytree(folder, tmp_path / "cut")
    for part in ("unet", "text_encoder", "vae"):
        weights = next((cut / part).glob("*.safetensors"))
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        assert_refused(cut, cut, "could not be loaded", "again")
        weights.unlink()
        assert_refused(cut, cut, "could not be loaded", "again")
        weights.write_bytes(whole)


@pytest.mark.parametrize("function", [load_base, native_resolution])
@pytest.mark.parametrize("base", ["nowhere", "./nowhere", "/nowhere/at/all", "some/where/else", "models/x.safetensors"])
def test_missing_paths_are_refused(base, function):
    assert_refused(base, base, "no file or folder", "spelling", function)


@pytest.mark.parametrize("function", [load_base, native_resolution])
def test_an_unreachable_hub_id_is_refused(function, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused("someone/no-such-base", "someone/no-such-base", "the hub does not give", "HF_HUB_OFFLINE", function)


def test_a_hub_id_loads_under_its_name(folder, monkeypatch):
    monkeypatch.setattr(load, "hf_hub_download", lambda base, name: str(folder / name))
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda base, **_: str(folder))
    assert load_base("someone/base").name_or_path == "someone/base"
    assert native_resolution("someone/base") == 512


def test_another_pipeline_on_the_hub_is_refused_before_its_weights_come(tmp_path, monkeypatch):
    write_index(tmp_path, "StableDiffusionXLPipeline")
    monkeypatch.setattr(load, "hf_hub_download", lambda base, name: str(tmp_path / name))
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda *_, **__: pytest.fail("it fetched the weights"))
    assert_refused("someone/xl", "someone/xl", "is a StableDiffusionXLPipeline", "another base")


def test_a_missing_tiny_sd_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "TINY_SD", tmp_path / "gone")
    assert_refused("tiny-sd", tmp_path / "gone", "is not at", "clone")


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors, next(name for name, tensor in sorted(tensors.items()) if tensor.ndim > 1))
    save_file(tensors, path, {"format": "pt"})


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize("change, message", [
    (lambda base: (base / "tokenizer/tokenizer.json").unlink(), "its tokenizer knows 2 tokens, its text encoder 4,152"),
    (lambda base: (base / "tokenizer/tokenizer_config.json").unlink(), r"gives up to 1e\+30 tokens.*reads 77"),
    (lambda base: change_json(base / "scheduler/scheduler_config.json", prediction_type="sample"), "'sample', which"),
    (lambda base: change_json(base / "unet/config.json", sample_size="a"), "sample_size 'a'"),
    (lambda base: change_tensors(base / TEXT, lambda t, k: t.pop(k)), "text_encoder lacks 1 weights"),
    (lambda base: change_tensors(base / UNET, lambda t, k: t[k].fill_(float("nan"))), "1 weights that are NaN"),
])  # fmt: skip
def test_a_base_that_would_load_and_then_draw_wrongly_is_refused(tmp_path, change, message):
    shutil.copytree(load.TINY_SD, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "*.png", "drawn"))
    change(tmp_path / "base")
    with pytest.raises(BaseError, match=message) as error:
        load_base(tmp_path / "base")
    assert str(tmp_path / "base") in str(error.value)


@pytest.mark.parametrize("text", ["", "~nobody-there/base", "x" * 5000, "a\nb", "a\0b"])
def test_a_text_that_can_be_no_path_is_refused_in_one_short_line(text):
    with pytest.raises(BaseError, match="there is no file or folder") as error:
        load_base(text)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()
