"""Many pictures in few UNet passes: the base, tuners, LoRAs and mixtures of them side by side from the same noise.

Each picture of a batch has its own adapter weights, so a row of columns costs one pass of the UNet per sampling step
instead of one per column.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from .. import kernels
from ..adapters import active_adapters, per_sample
from ..adapters.operations import ADAPTER_PATHS
from ..bases import text_encoding
from ..bases.properties import default_guidance, native_size
from ..kernels.cpu import heap
from ..kernels.cuda import graphs
from . import prompts


@dataclass(frozen=True)
class Cell:
    """One picture to draw: `adapters` maps attached adapters to their weights; empty is the base alone.

    `guidance` is the scale of classifier-free guidance; up to 1 there is none, and None is what suits the base: 7.5, or
    3 for a small UNet. `width` and `height` are in pixels, multiples of the VAE's factor (8); None is the base's own.
    """

    prompt: str
    seed: int = 0
    adapters: Mapping[str, float] = field(default_factory=dict)
    guidance: float | None = None
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    clip_skip: int | None = None  # as AUTOMATIC1111 counts; None: what its tuner was trained with


def compare(
    pipe,
    prompt: str,
    columns: Mapping[str, Mapping[str, float]],
    *,
    seed: int = 0,
    images: int = 1,
    negative_prompt: str = "",
    guidance: float | None = None,
    steps: int = 30,
    width: int | None = None,
    height: int | None = None,
    clip_skip: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, list]:
    """Draws one prompt in several columns, every column from the same starting noise.

    Args:
        columns: title -> adapters and their weights, e.g. {"base": {}, "anime": {"anime": 1.0}}.
        seed, images: picture i of every column starts from the noise of seed + i.
        guidance, width, height: as in `Cell`.
        clip_skip: as AUTOMATIC1111 counts, 1 is the last layer; by default what the tuners were trained with.
        steps, on_step: as in `draw_cells`.

    Returns:
        title -> its `images` PIL pictures.
    """
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(f"columns is {columns!r}; it must map titles to adapters and their weights")
    if not isinstance(images, int) or images < 1 or not isinstance(seed, int):
        raise ValueError(f"images is {images!r} and seed {seed!r}; both must be whole numbers, images at least 1")
    cells = [
        Cell(prompt, seed + i, adapters, guidance, negative_prompt, width, height, clip_skip)
        for adapters in columns.values()
        for i in range(images)
    ]
    drawn = draw_cells(pipe, cells, steps=steps, on_step=on_step)
    return {title: drawn[i * images : (i + 1) * images] for i, title in enumerate(columns)}


def draw_cells(
    pipe,
    cells: Sequence[Cell],
    *,
    steps: int = 30,
    batch: int | None = None,
    title: str = "",
    on_step: Callable[[int, int], None] | None = None,
) -> list:
    """Draws all cells, in as few UNet passes as their size, guidance and adapters allow; the pipe is left as it was.

    Two settings stay: without a GPU this process keeps freed memory (`heap.keep_freed_memory`), and on a GPU the
    weights of convolutions are in channels_last (`kernels.to_channels_last`).

    Args:
        batch: most pictures in one pass; by default as many as 16 of 256 px would be.
        title: of a progress bar; without one none is shown.
        on_step: called with (UNet passes done, passes in all) after each pass; an exception of it ends the drawing.

    Returns:
        One PIL picture per cell, in order.

    Raises:
        ValueError: naming every adapter that is not attached, and every argument that is out of range.
    """
    usual = default_guidance(pipe)
    cells = [replace(cell, guidance=usual) if cell.guidance is None else cell for cell in cells]
    _check_arguments(pipe, cells, steps)
    known = {n for names in pipe.get_list_adapters().values() for n in names}
    unknown = sorted({n for cell in cells for n in cell.adapters} - known)
    if unknown:
        there = ", ".join(sorted(known)) or "none"
        raise ValueError(f"no adapter named {', '.join(map(repr, unknown))} is attached; attached adapters: {there}")
    skips = prompts.clip_skip_of_each(pipe, [cell.adapters for cell in cells])
    cells = [replace(cell, clip_skip=cell.clip_skip or own) for cell, own in zip(cells, skips)]
    for clip_skip in {cell.clip_skip for cell in cells}:
        text_encoding.check_clip_skip(pipe.text_encoder, clip_skip)
    groups = list(_groups(pipe, cells, batch))
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
        kernels.to_channels_last(model, ADAPTER_PATHS)  # the trainer holds views of the weights of adapters
    silent = dict(getattr(pipe, "_progress_bar_config", {}))
    with bar, active_adapters.preserve_adapters(*(m for m in (pipe.unet, pipe.text_encoder) if m is not None)):
        pipe.set_progress_bar_config(**silent | {"disable": True})
        try:
            for group in groups:
                own = [cells[i] for i in group]
                pictures = _draw_group(pipe, own, steps, count)
                if len(own) > 1 and not all(map(_is_finite, pictures)):  # one may have spoilt the others of its pass
                    pictures = [_draw_group(pipe, [cell], steps, _no_count)[0] for cell in own]
                for i, picture in zip(group, pictures):
                    drawn[i] = _to_image(pipe, picture, cells[i])
        finally:
            pipe.set_progress_bar_config(**silent)
            pipe.maybe_free_model_hooks()  # a pass that was broken off has not done so
    return drawn


def _check_arguments(pipe, cells: Sequence[Cell], steps: int) -> None:
    """Raises a ValueError that lists every argument that cannot be drawn with."""
    wrong, unit = [], pipe.vae_scale_factor
    if not isinstance(steps, int) or steps < 1:
        wrong.append(f"steps is {steps!r}; it must be a whole number of at least 1")
    for cell in cells:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(cell, name), str):
                wrong.append(f"{name} is {getattr(cell, name)!r}; it must be a text")
        for name, side in (("width", cell.width), ("height", cell.height)):
            if side is not None and (not isinstance(side, int) or side < unit or side % unit):
                wrong.append(f"{name} is {side!r}; it must be a multiple of {unit}")
        if not isinstance(cell.seed, int) or not 0 <= cell.seed < 2**63:
            wrong.append(f"seed is {cell.seed!r}; it must be a whole number from 0")
        if not _is_number(cell.guidance) or cell.guidance < 0:
            wrong.append(f"guidance is {cell.guidance!r}; it must be a number of at least 0")
        if not isinstance(cell.adapters, Mapping):
            wrong.append(f"a column is {cell.adapters!r}; it must map adapters to their weights, as {{'anime': 1.0}}")
        else:
            wrong += [f"the weight of {n!r} is {w!r}; it must be a finite number"
                      for n, w in cell.adapters.items() if not _is_number(w)]  # fmt: skip
    if wrong:
        raise ValueError("this cannot be drawn: " + "; ".join(dict.fromkeys(wrong)))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _size_of(pipe, cell: Cell) -> tuple[int, int]:
    """Width and height of a cell's picture in pixels."""
    width, height = native_size(pipe)
    return cell.width or width, cell.height or height


def _groups(pipe, cells: Sequence[Cell], batch: int | None) -> Iterator[list[int]]:
    """The indices of the cells of each pass: one size, guidance and text length, adapters that can share it."""
    kinds: dict[tuple, list[int]] = {}
    for i, cell in enumerate(cells):
        shared = per_sample.can_share_a_pass(pipe.unet, list(cell.adapters))
        key = (_size_of(pipe, cell), cell.guidance, _chunks(pipe, cell), None if shared else _key(cell))
        kinds.setdefault(key, []).append(i)
    for ((width, height), *_), group in kinds.items():
        count = batch or max(1, 16 * 256**2 // (width * height))
        for start in range(0, len(group), count):
            yield group[start : start + count]


def _chunks(pipe, cell: Cell) -> int:
    """Into how many chunks of 75 tokens its prompt is encoded, and with guidance its negative prompt."""
    texts = (cell.prompt, cell.negative_prompt) if cell.guidance > 1 else (cell.prompt,)
    return max(prompts.count_chunks(pipe, text) for text in texts)


def _key(cell: Cell) -> tuple:
    return tuple(sorted((n, float(w)) for n, w in cell.adapters.items() if w))


def _draw_group(pipe, cells: list[Cell], steps: int, count) -> list:
    guided, guidance = cells[0].guidance > 1, cells[0].guidance
    (width, height), texts = _size_of(pipe, cells[0]), [None] * len(cells)
    for key in dict.fromkeys((_key(c), c.clip_skip) for c in cells):  # a LoRA may change the text encoder, too
        members = [i for i, cell in enumerate(cells) if (_key(cell), cell.clip_skip) == key]
        _activate(pipe, dict(key[0]))
        sides = [[cells[i].prompt for i in members], [cells[i].negative_prompt for i in members]]
        chunks = _chunks(pipe, cells[0])
        encoded = [prompts.encode(pipe, side, key[1], chunks) for side in sides[: 1 + guided]]
        for place, i in enumerate(members):
            texts[i] = [part[place] for part in encoded]
    arguments = dict(
        prompt_embeds=torch.stack([t[0] for t in texts]),
        negative_prompt_embeds=torch.stack([t[1] for t in texts]) if guided else None,
        num_inference_steps=steps, guidance_scale=guidance, height=height, width=width, callback_on_step_end=count,
        output_type="np",
        generator=[torch.Generator("cpu").manual_seed(cell.seed) for cell in cells],
    )  # fmt: skip
    if len(set(map(_key, cells))) == 1:  # all alike, and already active
        with graphs.graphed_unet(pipe.unet):
            return pipe(**arguments).images
    names = sorted({n for cell in cells for n in cell.adapters} & set(getattr(pipe.unet, "peft_config", None) or {}))
    weights = {n: [float(cell.adapters.get(n, 0.0)) for cell in cells] for n in names}
    with per_sample.per_sample_weights(pipe.unet, weights, repeat=2 if guided else 1), graphs.graphed_unet(pipe.unet):
        return pipe(**arguments).images


def _no_count(_pipe, _step, _timestep, _tensors):
    return {}


def _is_finite(picture: np.ndarray) -> bool:
    return bool(np.isfinite(picture).all())


def _to_image(pipe, picture: np.ndarray, cell: Cell) -> Image.Image:
    """The picture (h, w, 3) of values 0 to 1 as an image; if it is not finite, an image that says so, and a warning."""
    if _is_finite(picture):
        return pipe.image_processor.numpy_to_pil(picture)[0]
    names = " + ".join(f"{n} at {w:g}" for n, w in cell.adapters.items()) or "the base"
    warnings.warn(f"the picture of {names} from seed {cell.seed} is not finite (NaN or infinity)", stacklevel=4)
    image = Image.new("RGB", (picture.shape[1], picture.shape[0]), "#777777")
    text = f"no picture:\nnot finite\n(NaN) with\n{names}"
    ImageDraw.Draw(image).multiline_text((6, 6), text, "white", ImageFont.load_default(14))
    return image


def _activate(pipe, adapters: dict[str, float]) -> None:
    if adapters:
        pipe.enable_lora()
        pipe.set_adapters(list(adapters), list(adapters.values()))
    elif any(pipe.get_list_adapters().values()):
        pipe.disable_lora()
