"""Trigger words: what the text encoder's vocabulary makes of them, and whether the base knows them already."""

import torch
from diffusers import DDPMScheduler
from transformers import CLIPTokenizer

from ..bases import load, properties, single_file
from ..training import encoding
from ..training.buckets import AspectBuckets
from ..training.dataset import Pair
from ..training.loss import denoising_errors


def describe_words(words: str) -> list[str]:
    """How the tokenizer of Stable Diffusion 1.x and 2.x, which is one, reads each of the words; a sentence for each."""
    tokenizer = CLIPTokenizer.from_pretrained(single_file.CONFIGS / "tokenizer")
    size, lines = tokenizer.vocab_size, []
    for word in dict.fromkeys(words.split()):
        tokens = tokenizer.tokenize(word)
        if len(tokens) == 1:
            number = tokenizer.convert_tokens_to_ids(tokens[0])
            lines.append(f"{word} is a word of the vocabulary, number {number} of {size} (the commonest first), so the "
                         "base may have a meaning for it")  # fmt: skip
        else:
            parts = " + ".join(token.removesuffix("</w>") for token in tokens)
            lines.append(f"{word} is no word of the vocabulary; it is read as {parts}")
    return lines


def measure_words(words: str, pairs: list[Pair], base: str, buckets: AspectBuckets) -> str:
    """Whether the base predicts the pictures better with the words before their captions, as a sentence.

    It compares the denoising error of each picture with and without the words, with the same noise, and gives the mean
    difference with its standard error. A base of Stable Diffusion's size is measured on a GPU only.
    """
    pipe = load.load_base(base)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not properties.is_small(pipe):
        return "whether the base knows them is not measured: with a base of this size that needs a GPU"
    pipe.to("cuda" if on_gpu else "cpu")
    models = pipe.vae, pipe.tokenizer, pipe.text_encoder, buckets
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    encoded = encoding.encode(pairs, *models).to(pipe.device, torch.float32)
    without = denoising_errors(pipe.unet, scheduler, encoded)
    texts = [f"{words} {pair.caption}" for pair in pairs]
    encoded.text = encoding.encode_text(texts, pipe.tokenizer, pipe.text_encoder).to(pipe.device)
    change = denoising_errors(pipe.unet, scheduler, encoded) / without - 1
    mean = change.mean().item()
    error = (change.std() / len(change) ** 0.5).item() if len(change) > 1 else float("inf")
    text = f"with {words!r} before the captions, the base's error on these pictures changes by {mean:+.2%}"
    text += f" (standard error {error:.2%})" if len(change) > 1 else ""
    if mean < -2 * error:
        return f"{text}: the base knows the words already, and they mean something like these pictures to it"
    if mean > 2 * error:
        return f"{text}: the base knows the words already, and they mean something else to it; choose others"
    return f"{text}: no more than by chance, so they are free to take a meaning"
