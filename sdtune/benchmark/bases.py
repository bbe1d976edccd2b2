"""A base of Stable Diffusion 1.5's shape, for measurements that need the shape and not the weights."""

from pathlib import Path

from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..bases.single_file import CONFIGS
from .processes import log


def sd15_shape() -> str:
    """The folder of a base of Stable Diffusion 1.5's exact shape with random weights, made once and kept; 4.3 GB."""
    folder, part, configs = Path("output/sd15-shape"), Path("output/.sd15-shape.part"), CONFIGS / "sd15"
    if not folder.exists():
        log(f"making {folder}, Stable Diffusion 1.5's shape with random weights")
        StableDiffusionPipeline(
            vae=AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder")),
            tokenizer=CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer", pad_token="<|endoftext|>"),
            unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet")),
            scheduler=PNDMScheduler.from_pretrained(configs / "scheduler"),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(part)  # fmt: skip
        part.rename(folder)
    return str(folder)
