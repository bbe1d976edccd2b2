"""Many pictures in few UNet passes: the base, tuners, LoRAs and mixtures of them side by side from the same noise.

Each picture of a batch has its own adapter weights, so a row of columns costs one pass of the UNet per sampling step
instead of one per column.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from .. import kernels
from ..adapters import per_sample, state
from ..kernels.cpu import heap
from ..kernels.cuda import graphs


@dataclass(frozen=True)
class Cell:
    """One picture to draw: `adapters` maps attached adapters to their weights; empty is the base alone."""

    prompt: str
    seed: int = 0
    adapters: Mapping[str, float] = field(default_factory=dict)
    guidance: float = 7.5
    negative_prompt: str = ""


def compare(
    pipe,
    prompt: str,
    columns: Mapping[str, Mapping[str, float]],
    *,
    seed: int = 0,
    images: int = 1,
    negative_prompt: str = "",
    guidance: float = 7.5,
    steps: int = 30,
    size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, list]:
    """Draws one prompt in several columns, every column from the same starting noise.

    Args:
        columns: title -> adapters and their weights, e.g. {"base": {}, "anime": {"anime": 1.0}}.
        seed, images: picture i of every column starts from the noise of seed + i.
        size, steps, on_step: as in `draw_cells`.

    Returns:
        title -> its `images` PIL pictures.
    """
    cells = [
        Cell(prompt, seed + i, adapters, guidance, negative_prompt)
        for adapters in columns.values()
        for i in range(images)
    ]
    drawn = draw_cells(pipe, cells, steps=steps, size=size, on_step=on_step)
    return {title: drawn[i * images : (i + 1) * images] for i, title in enumerate(columns)}


def draw_cells(
    pipe,
    cells: Sequence[Cell],
    *,
    steps: int = 30,
    size: int | None = None,
    batch: int | None = None,
    title: str = "",
    on_step: Callable[[int, int], None] | None = None,
) -> list:
    """Draws all cells, in as few UNet passes as their guidance and adapters allow; the pipe is left as it was.

    Two settings stay: without a GPU this process keeps freed memory (`heap.keep_freed_memory`), and on a GPU the
    weights of convolutions are in channels_last (`kernels.to_channels_last`).

    Args:
        size: side in pixels; by default the base's own.
        batch: most pictures in one pass; by default as many as 16 of 256 px would be.
        title: of a progress bar; without one none is shown.
        on_step: called with (UNet passes done, passes in all) after each pass; an exception of it ends the drawing.

    Returns:
        One PIL picture per cell, in order.

    Raises:
        ValueError: naming every adapter that is not attached.
    """
    known = {n for names in pipe.get_list_adapters().values() for n in names}
    unknown = sorted({n for cell in cells for n in cell.adapters} - known)
    if unknown:
        there = ", ".join(sorted(known)) or "none"
        raise ValueError(f"no adapter named {', '.join(map(repr, unknown))} is attached; attached adapters: {there}")
    side = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    groups = list(_groups(pipe, cells, batch or max(1, 16 * 256**2 // side**2)))
    pipe.scheduler.set_timesteps(steps)
    total, drawn = len(groups) * len(pipe.scheduler.timesteps), [None] * len(cells)
    bar, done = tqdm(total=total, desc=title, unit="pass", leave=False, disable=not title), 0

    def count(_pipe, _step, _timestep, _tensors):
        nonlocal done
        done += 1
        bar.update()
        if on_step:
            on_step(done, total)
        return {}

    heap.keep_freed_memory()
    for model in (pipe.unet, pipe.vae):
        kernels.to_channels_last(model)
    silent = dict(getattr(pipe, "_progress_bar_config", {}))
    with bar, state.preserve_adapters(*(m for m in (pipe.unet, pipe.text_encoder) if m is not None)):
        pipe.set_progress_bar_config(**silent | {"disable": True})
        try:
            for group in groups:
                own = [cells[i] for i in group]
                pictures = _draw_group(pipe, own, steps, side, count)
                for i, picture in zip(group, pictures):
                    drawn[i] = picture
        finally:
            pipe.set_progress_bar_config(**silent)
            pipe.maybe_free_model_hooks()  # a pass that was broken off has not done so
    return drawn


def _groups(pipe, cells: Sequence[Cell], batch: int) -> Iterator[list[int]]:
    """The indices of the cells of each pass: cells of one guidance whose adapters can share a pass."""
    kinds: dict[tuple, list[int]] = {}
    for i, cell in enumerate(cells):
        shared = per_sample.can_share_a_pass(pipe.unet, list(cell.adapters))
        kinds.setdefault((cell.guidance, None if shared else _key(cell)), []).append(i)
    for group in kinds.values():
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def _key(cell: Cell) -> tuple:
    return tuple(sorted((n, float(w)) for n, w in cell.adapters.items() if w))


def _draw_group(pipe, cells: list[Cell], steps: int, side: int, count) -> list:
    guided, guidance = cells[0].guidance > 1, cells[0].guidance
    device, count_of = pipe._execution_device, len(cells)
    texts: list = [None] * count_of
    for key in dict.fromkeys(map(_key, cells)):  # a LoRA may change the text encoder, too
        members = [i for i, cell in enumerate(cells) if _key(cell) == key]
        _activate(pipe, dict(key))
        prompts = [cells[i].prompt for i in members]
        negative = [cells[i].negative_prompt for i in members]
        encoded = pipe.encode_prompt(prompts, device, 1, guided, negative if guided else None)
        for place, i in enumerate(members):
            texts[i] = [None if part is None else part[place] for part in encoded]
    arguments = dict(
        prompt_embeds=torch.stack([t[0] for t in texts]),
        negative_prompt_embeds=torch.stack([t[1] for t in texts]) if guided else None,
        num_inference_steps=steps, guidance_scale=guidance, height=side, width=side, callback_on_step_end=count,
        generator=[torch.Generator("cpu").manual_seed(cell.seed) for cell in cells],
    )  # fmt: skip
    if len(set(map(_key, cells))) == 1:  # all alike, and already active
        with graphs.graphed_unet(pipe.unet):
            return pipe(**arguments).images
    names = sorted({n for cell in cells for n in cell.adapters} & set(getattr(pipe.unet, "peft_config", None) or {}))
    weights = {n: [float(cell.adapters.get(n, 0.0)) for cell in cells] for n in names}
    with per_sample.per_sample_weights(pipe.unet, weights, repeat=2 if guided else 1), graphs.graphed_unet(pipe.unet):
        return pipe(**arguments).images


def _activate(pipe, adapters: dict[str, float]) -> None:
    if adapters:
        pipe.enable_lora()
        pipe.set_adapters(list(adapters), list(adapters.values()))
    elif any(pipe.get_list_adapters().values()):
        pipe.disable_lora()
