"""Prompts as the UNet takes them, with the clip skip that the tuners were trained with."""

from collections.abc import Mapping, Sequence

import torch

from ..adapters import api
from ..bases import text_encoding


def clip_skips(pipe, adapters: Mapping[str, float]) -> list[int]:
    """The clip skips that these adapters were trained with, the greatest weight first; of those whose files name one.

    Args:
        adapters: name -> weight.
    """
    strongest = sorted(adapters, key=lambda name: -abs(adapters[name]))
    found = [api.trained_clip_skip(pipe, name) for name in strongest if adapters[name]]
    return [clip_skip for clip_skip in found if clip_skip]


def clip_skip_of_each(pipe, columns: Sequence[Mapping[str, float]]) -> list[int]:
    """The clip skip of each column by default: that of its strongest tuner.

    A column without a tuner, such as the base's, is drawn like the others if these agree, else with 1.
    """
    own = [clip_skips(pipe, adapters) for adapters in columns]
    named = {skips[0] for skips in own if skips}
    others = named.pop() if len(named) == 1 else 1
    return [skips[0] if skips else others for skips in own]


def encode_prompt(pipe, prompt: str, negative_prompt: str = "", *, clip_skip: int | None = None) -> dict:
    """The arguments `prompt_embeds` and `negative_prompt_embeds` of a pipeline: `pipe(**encode_prompt(...))`.

    Unlike the pipeline's own encoding it reads prompts of any length, in chunks of 75 tokens, and it takes both prompts
    from the layer of `clip_skip`, as AUTOMATIC1111's web UI and ComfyUI do. (The pipeline's own argument `clip_skip`
    leaves the negative prompt at the last layer, and fails in diffusers 0.42 with transformers 5.)

    Args:
        clip_skip: as in `text_encoding.encode_texts`; by default what the active tuner was trained with, else 1.

    Raises:
        ValueError: if the text encoder has no such layer.
    """
    if clip_skip is None:
        clip_skip = next(iter(clip_skips(pipe, dict.fromkeys(pipe.get_active_adapters(), 1.0))), 1)
    chunks = max(count_chunks(pipe, text) for text in (prompt, negative_prompt))
    embeds = (encode(pipe, [text], clip_skip, chunks) for text in (prompt, negative_prompt))
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds))


def count_chunks(pipe, prompt: str) -> int:
    """How many chunks of 75 tokens a prompt has, with its textual inversions counted as they are read."""
    return text_encoding.count_chunks(pipe.maybe_convert_prompt(prompt, pipe.tokenizer), pipe.tokenizer)


def encode(pipe, prompts: list[str], clip_skip: int, chunks: int) -> torch.Tensor:
    """The encoded prompts, (n, 77 * chunks, width), with the text encoder's adapters as they are now."""
    prompts = pipe.maybe_convert_prompt(prompts, pipe.tokenizer)
    return text_encoding.encode_texts(
        prompts, pipe.tokenizer, pipe.text_encoder, clip_skip, chunks, pipe._execution_device
    )
