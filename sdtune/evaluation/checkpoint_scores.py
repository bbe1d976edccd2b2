"""Which checkpoint of a run should be kept? `python -m sdtune.evaluation.choose_step --help`

    python -m sdtune.evaluation.choose_step output/mine

Draws held-out prompts with every checkpoint from the same noise into one sheet, scores each by the metrics of
`sdtune.evaluation` (extra `evaluate`), and recommends one: the earliest that is beyond doubt worse than the best
neither in style, nor in following its prompt, nor in held-out error. Written into the folder of the run: steps.png and
steps.md.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image

from .. import extras
from ..adapters import api, tuner_file
from ..bases import load, properties
from ..inference import compare, grids
from ..training import caption_variants, checkpoints, run_folder, setup, stopping
from ..training.buckets import AspectBuckets
from ..training.encoding import Encoded
from ..training.errors import TrainError
from ..training.loss import denoising_errors
from . import features, intervals, metrics
from .intervals import Statistic
from .model import default_device

MOST_STEPS = 8  # checkpoints that are scored, besides the base
CRITERIA = {"kid": -1, "rank": 1, "error": -1}  # metric -> 1 where more is better, -1 where less is


@dataclass
class Scored:
    """A step of a run: what it drew of each held-out prompt, its scores, and its loss on each held-out picture."""

    step: int
    pictures: list[Image.Image]
    scores: dict[str, Statistic]
    losses: list[float]


def score_steps(folder: Path, prompts: int, drawing_steps: int) -> tuple[list[Scored], list[str], list[Image.Image]]:
    """The base (step 0) and every checkpoint, the held-out prompts and their true pictures.

    Raises:
        TrainError: if the run has no checkpoints, or fewer than two held-out pictures.
        DataError, BaseError, MissingPackages: if its pictures, its base or the packages of the metrics are missing.
    """
    config = run_folder.read_config(folder)
    found = checkpoints.list_checkpoints(folder)
    if not found:
        raise TrainError(f"{folder} has no checkpoints; expected the output of a training")
    found = [found[i] for i in sorted({round(i * (len(found) - 1) / (MOST_STEPS - 1)) for i in range(MOST_STEPS)})]
    buckets = AspectBuckets(config.resolution, config.square)
    pairs, heldout = setup.read_pairs(config, buckets, lambda _: None)
    heldout = heldout[:prompts]
    if len(heldout) < 2:
        raise TrainError(
            f"{config.data} has {len(heldout)} held-out pictures, and choosing a step needs 2 or more, in test/"
        )
    device = default_device()
    features.feature_network(device)  # fails at once if its packages are missing
    pipe = load.load_base(config.base)
    for model in (pipe.vae, pipe.text_encoder, pipe.unet):
        model.requires_grad_(False).eval()
    of_pairs, encoded = setup.encode_pairs(config, pipe, pairs, heldout, buckets, device, torch.float32, print)
    pipe.to(device)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    shapes = [buckets.shape_for(pair.size) for pair in heldout]
    true = _reconstruct(pipe, encoded)
    of_true, of_train = features.features(true, device), features.features(_reconstruct(pipe, of_pairs), device)
    texts = [caption_variants.first_text(pair, config.trigger_words) for pair in heldout]
    guidance = properties.default_guidance(pipe) if config.guidance_scale is None else config.guidance_scale

    def score(step: int, adapters: dict[str, float]) -> Scored:
        cells = [
            compare.Cell(text, i, adapters, guidance, "", *shape, config.clip_skip)
            for i, (text, shape) in enumerate(zip(texts, shapes))
        ]
        drawn = compare.draw_cells(pipe, cells, steps=drawing_steps, title=f"step {step}")
        losses = denoising_errors(pipe.unet, scheduler, encoded)
        own = features.features(drawn, device)
        scores = {
            "kid": metrics.kid(own, of_true),
            "rank": metrics.fidelity(own, of_true)[1],
            "error": intervals.mean(losses),
            "novelty": metrics.novelty(own, of_true, of_train),
        }
        return Scored(step, drawn, scores, losses.tolist())

    scored = [score(0, {})]
    for path in found:
        name = api.attach_file(pipe, path, "scored")
        scored.append(score(int(path.name[5:]), {name: 1.0}))
        api.unload_tuner(pipe, name)
    return scored, texts, true


@torch.no_grad()
def _reconstruct(pipe, encoded: Encoded) -> list[Image.Image]:
    """The encoded pictures, decoded again: what is drawn has the VAE's blur, too, which would outweigh the rest."""
    found = {}
    for bucket in encoded.buckets:
        for number, latents in zip(bucket.images.tolist(), bucket.mean[:, 0] / pipe.vae.config.scaling_factor):
            found[number] = pipe.vae.decode(latents[None]).sample.float().cpu()
    return [pipe.image_processor.postprocess(found[i], output_type="pil")[0] for i in sorted(found)]


def recommend(scored: list[Scored]) -> tuple[int, str]:
    """The step to keep, and the reason as a sentence.

    A step counts as worse than the best one in a metric if the 95 % interval of their difference over the prompts
    excludes 0. Steps after the held-out loss has risen (`stopping`) are left out, as they memorise.
    """
    memorising = stopping.first_memorising_step({s.step: s.losses for s in scored})
    usable = [s for s in scored if memorising is None or s.step <= memorising]
    equal_in: dict[int, list[str]] = {s.step: [] for s in usable}
    titles = {column.key: column.title for column in metrics.COLUMNS}
    best_steps = {}
    for key, better in CRITERIA.items():
        best = max(usable, key=lambda s: better * intervals.estimate([s.scores[key]]).value)
        best_steps[key] = best.step
        for s in usable:
            difference = intervals.estimate([s.scores[key] - best.scores[key]])
            if s is best or intervals.outcome(difference, better) != "wins against":
                equal_in[s.step].append(key)
    most = max(map(len, equal_in.values()))
    step = next(step for step, keys in equal_in.items() if len(keys) == most)
    names = ", ".join(f"{titles[key]} (best at step {best_steps[key]})" for key in equal_in[step])
    reason = f"step {step} is the earliest that cannot be told from the best one in {names}"
    if most < len(CRITERIA):
        reason += (
            f"; no step is among the best in {', '.join(titles[k] for k in CRITERIA if k not in equal_in[step])} too"
        )
    if memorising is not None:
        reason += f"; steps after {memorising} are left out, since the held-out loss rises there"
    if step == 0:
        reason += "; step 0 is the base: the tuner has not helped beyond doubt on these prompts"
    return step, reason


def write_sheet(folder: Path, scored: list[Scored], texts: list[str], true: list[Image.Image], chosen: int) -> Path:
    """Writes steps.png: a row for each prompt, a column for each step with its scores, and the true picture."""
    columns = [[*s.pictures] for s in scored] + [true]
    titles = [_title(s, chosen) for s in scored] + ["true picture"]
    path = folder / "steps.png"
    grids.write_png(grids.make_grid([list(row) for row in zip(*columns)], titles, texts, cell=160), path)
    return path


def _title(scored: Scored, chosen: int) -> str:
    name = "base" if scored.step == 0 else f"step {scored.step}"
    values = {key: intervals.estimate([statistic]).value for key, statistic in scored.scores.items()}
    mark = "recommended: " if scored.step == chosen else ""
    return f"{mark}{name}, KID {values['kid']:.3f}, prompt {values['rank']:.0%}, novelty {values['novelty']:.2f}"


def make_table(scored: list[Scored], reason: str) -> str:
    """The content of steps.md: the recommendation, and each step's scores with their intervals over the prompts."""
    columns = [column for column in metrics.COLUMNS if column.key in scored[0].scores]
    rows = [["step", *(column.title for column in columns)], ["---"] * (len(columns) + 1)]
    for s in scored:
        found = [intervals.estimate([s.scores[column.key]]) for column in columns]
        cells = [
            f"{c.form.format(e.value)} ({c.form.format(e.low)} to {c.form.format(e.high)})"
            for c, e in zip(columns, found)
        ]
        rows.append([str(s.step) if s.step else "0, the base", *cells])
    lines = [f"Recommended: {reason}.", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [f"- **{column.title}**: {column.meaning}" for column in columns]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the command with these arguments, by default those of the process; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.evaluation.choose_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", help="the output of a training with held-out pictures", type=Path)
    parser.add_argument("--prompts", help="most held-out prompts (default: 8)", type=int, default=8)
    parser.add_argument("--drawing_steps", help="sampling steps of a picture (default: 20)", type=int, default=20)
    options = parser.parse_args(argv)
    if options.prompts < 2 or options.drawing_steps < 1:
        parser.error("prompts must be at least 2, and drawing_steps at least 1")
    try:
        scored, texts, true = score_steps(options.folder, options.prompts, options.drawing_steps)
    except (TrainError, ValueError, OSError, extras.MissingPackages) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    step, reason = recommend(scored)
    sheet, table = write_sheet(options.folder, scored, texts, true, step), make_table(scored, reason)
    tuner_file.write_text(options.folder / "steps.md", table)
    print(table)
    if step:
        print(f"its tuner: {options.folder / checkpoints.FOLDER / f'step-{step:06d}' / tuner_file.FILE_NAME}")
    print(f"the sheet: {sheet}")
    return 0
