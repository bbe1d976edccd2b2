"""Scores every checkpoint of a run on held-out prompts and recommends one; `choose_step` is the command.

The prompts are drawn with every checkpoint from the same noise into one sheet, and scored by the metrics of
`sdtune.evaluation` (extra `evaluate`). Recommended is the earliest that is beyond doubt worse than the best neither in
likeness to the true pictures, nor in following its prompt, and that does not copy the training pictures. The held-out
loss has no say: it rises while faces still become more whole (`assets/results/forms.md`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image

from ..adapters import api, tuner_file
from ..bases import load, properties
from ..inference import compare, grids
from ..training import caption_variants, checkpoints, run_folder, setup
from ..training.buckets import AspectBuckets
from ..training.encoding import Encoded
from ..training.errors import TrainError
from ..training.loss import denoising_errors
from . import features, intervals, metrics
from .intervals import Statistic
from .model import default_device

SHEET_NAME, TABLE_NAME = "steps.png", "steps.md"
MOST_STEPS = 8  # checkpoints that are scored, besides the base
CRITERIA = ("similarity", "rank")  # of both, more is better


@dataclass
class Scored:
    """A step of a run: what it drew of each held-out prompt, and its scores."""

    step: int
    pictures: list[Image.Image]
    scores: dict[str, Statistic]


@dataclass(frozen=True)
class Recommendation:
    """The step to keep, 0 for the base, the reason as a sentence, the sheet of all steps, and their scores."""

    step: int
    reason: str
    sheet: Path
    scored: list[Scored]

    def tuner(self) -> Path | None:
        """The tuner file of the step, or None for the base."""
        folder = self.sheet.parent / checkpoints.FOLDER / f"step-{self.step:06d}"
        return folder / tuner_file.FILE_NAME if self.step else None


def choose(
    folder: Path,
    prompts: int = 8,
    drawing_steps: int = 20,
    log: Callable[[str], None] = print,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recommendation:
    """Scores the checkpoints of a run and writes steps.png and steps.md into its folder.

    Args:
        folder: the output of a training with held-out pictures.
        prompts: most held-out prompts, at least 2.
        drawing_steps: sampling steps of a picture.
        log: called with a line for each thing that a user should know.
        on_progress: called with (UNet passes done, passes in all) after each pass; an exception of it ends the work.

    Raises:
        TrainError, DataError, BaseError, MissingPackages: as `score_steps`.
    """
    scored, texts, true = score_steps(folder, prompts, drawing_steps, log, on_progress)
    step, reason = recommend(scored)
    sheet = write_sheet(folder, scored, texts, true, step)
    tuner_file.write_text(folder / TABLE_NAME, make_table(scored, reason))
    return Recommendation(step, reason, sheet, scored)


def score_steps(
    folder: Path,
    prompts: int,
    drawing_steps: int,
    log: Callable[[str], None],
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Scored], list[str], list[Image.Image]]:
    """The base (step 0) and every checkpoint, the held-out prompts and their true pictures; arguments as of `choose`.

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
    of_pairs, encoded = setup.encode_pairs(config, pipe, pairs, heldout, buckets, device, torch.float32, log)
    pipe.to(device)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    shapes = [buckets.shape_for(pair.size) for pair in heldout]
    true = _reconstruct(pipe, encoded)
    of_true, of_train = features.features(true, device), features.features(_reconstruct(pipe, of_pairs), device)
    local = features.local_features(true, device)
    texts = [caption_variants.first_text(pair, config.trigger_words) for pair in heldout]
    guidance = properties.default_guidance(pipe) if config.guidance_scale is None else config.guidance_scale

    def score(step: int, adapters: dict[str, float]) -> Scored:
        cells = [
            compare.Cell(text, i, adapters, guidance, "", *shape, config.clip_skip)
            for i, (text, shape) in enumerate(zip(texts, shapes))
        ]

        def on_step(done: int, passes: int) -> None:
            if on_progress:
                on_progress(len(scored) * passes + done, (len(found) + 1) * passes)

        title = "" if on_progress else f"step {step}"
        drawn = compare.draw_cells(pipe, cells, steps=drawing_steps, title=title, on_step=on_step)
        own = features.features(drawn, device)
        scores = {
            "similarity": metrics.local_similarity(features.local_features(drawn, device), local),
            "rank": metrics.fidelity(own, of_true)[1],
            "error": intervals.mean(denoising_errors(pipe.unet, scheduler, encoded)),
            "novelty": metrics.novelty(own, of_true, of_train),
        }
        return Scored(step, drawn, scores)

    scored: list[Scored] = []
    scored.append(score(0, {}))
    for path in found:
        name = api.attach_file(pipe, path, "scored")
        scored.append(score(checkpoints.step_of(path), {name: 1.0}))
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
    excludes 0. Steps that copy, whose pictures are beyond doubt nearer to the training pictures than the true pictures
    of the same prompts are, are left out.
    """
    copying = [s.step for s in scored if s.step and intervals.estimate([s.scores["novelty"]]).high < 1]
    usable = [s for s in scored if s.step not in copying]
    equal_in: dict[int, list[str]] = {s.step: [] for s in usable}
    titles = {column.key: column.title for column in metrics.COLUMNS}
    best_steps = {}
    for key in CRITERIA:
        best = max(usable, key=lambda s: intervals.estimate([s.scores[key]]).value)
        best_steps[key] = best.step
        for s in usable:
            difference = intervals.estimate([s.scores[key] - best.scores[key]])
            if s is best or intervals.outcome(difference, better=1) != "wins against":
                equal_in[s.step].append(key)
    most = max(map(len, equal_in.values()))
    step = next(step for step, keys in equal_in.items() if len(keys) == most)
    names = ", ".join(f"{titles[key]} (best at step {best_steps[key]})" for key in equal_in[step])
    reason = f"step {step} is the earliest that cannot be told from the best one in {names}"
    if most < len(CRITERIA):
        reason += (
            f"; no step is among the best in {', '.join(titles[k] for k in CRITERIA if k not in equal_in[step])} too"
        )
    if copying:
        left_out = ", ".join(map(str, copying))
        reason += f"; left out for copying training pictures (novelty below 1 beyond doubt): step {left_out}"
    if step == 0:
        reason += "; step 0 is the base: the tuner has not helped beyond doubt on these prompts"
    return step, reason


def write_sheet(folder: Path, scored: list[Scored], texts: list[str], true: list[Image.Image], chosen: int) -> Path:
    """Writes steps.png: a row for each prompt, a column for each step with its scores, and the true picture."""
    columns = [[*s.pictures] for s in scored] + [true]
    titles = [_title(s, chosen) for s in scored] + ["true picture"]
    path = folder / SHEET_NAME
    grids.write_png(grids.make_grid([list(row) for row in zip(*columns)], titles, texts, cell=160), path)
    return path


def _title(scored: Scored, chosen: int) -> str:
    name = "base" if scored.step == 0 else f"step {scored.step}"
    mark = "recommended: " if scored.step == chosen else ""
    values = {key: intervals.estimate([statistic]).value for key, statistic in scored.scores.items()}
    similarity, rank, novelty = (values[key] for key in ("similarity", "rank", "novelty"))
    return f"{mark}{name}, similarity {similarity:.3f}, prompt {rank:.0%}, novelty {novelty:.2f}"


def make_table(scored: list[Scored], reason: str) -> str:
    """The content of steps.md: the recommendation, and each step's scores with their intervals over the prompts."""
    titles, *rows = score_rows(scored)
    lines = [f"Recommended: {reason}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]
    lines += ["", *(f"- **{title}**: {meaning}" for title, meaning in meanings(scored))]
    return "\n".join(lines) + "\n"


def score_rows(scored: list[Scored]) -> list[list[str]]:
    """A table of the scores of each step with their intervals over the prompts; the first row are the titles."""
    columns = _columns(scored)
    rows = [["step", *(column.title for column in columns)]]
    for s in scored:
        found = [intervals.estimate([s.scores[column.key]]) for column in columns]
        cells = [
            f"{c.form.format(e.value)} ({c.form.format(e.low)} to {c.form.format(e.high)})"
            for c, e in zip(columns, found)
        ]
        rows.append([str(s.step) if s.step else "0, the base", *cells])
    return rows


def meanings(scored: list[Scored]) -> list[tuple[str, str]]:
    """The title of each metric and what it measures."""
    return [(column.title, column.meaning) for column in _columns(scored)]


def _columns(scored: list[Scored]) -> list[metrics.Column]:
    return [column for column in metrics.COLUMNS if column.key in scored[0].scores]
