"""Draws the 12 held-out prompts with tuners or LoRAs, next to the true pictures.

    python assets/anime/sheet.py assets/anime_res_attn.safetensors assets/anime_lora.safetensors --output sheet.png

One row per prompt: the base, each file, the true picture. All pictures of prompt i start from the noise of seed i.
"""

import argparse
from pathlib import Path

from sdtune import Cell, draw_cells, load_base, load_tuner
from sdtune.bases.properties import default_guidance
from sdtune.inference.grids import make_grid, write_png
from sdtune.training.buckets import AspectBuckets
from sdtune.training.dataset import read_pairs

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="tuner or LoRA files that fit the base")
    parser.add_argument("--base", default="tiny-sd", help="tiny-sd, a folder, a .safetensors checkpoint or a hub id")
    parser.add_argument("--steps", type=int, default=30, help="sampling steps")
    parser.add_argument("--count", type=int, default=12, help="how many of the 12 prompts")
    parser.add_argument("--output", type=Path, default=Path("sheet.png"), help="the PNG file to write")
    options = parser.parse_args()

    print(f"loading the base {options.base} ...", flush=True)
    pipe = load_base(options.base)
    names = [load_tuner(pipe, file, f"file-{i}") for i, file in enumerate(options.files)]
    pairs = read_pairs(HERE, AspectBuckets(256), "test")[: options.count]
    columns = [{}, *({name: 1.0} for name in names)]
    guidance = default_guidance(pipe)
    cells = [Cell(pair.caption, i, adapters, guidance) for i, pair in enumerate(pairs) for adapters in columns]
    drawn = draw_cells(pipe, cells, steps=options.steps, title="drawing")
    rows = [drawn[i : i + len(columns)] for i in range(0, len(drawn), len(columns))]
    rows = [[*row, pair.open()] for row, pair in zip(rows, pairs)]
    titles = ["base", *(file.stem for file in options.files), "true picture"]
    write_png(make_grid(rows, titles, [pair.caption for pair in pairs]), options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
