"""Encodes a whole data set once, before training: images with the VAE, captions with the text encoder."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from .dataset import Pair
from .errors import DataError
from .images import crop_to_square


@dataclass
class Encoded:
    """An encoded data set of n images, on one device.

    Attributes:
        names: of the images, for messages.
        mean, std: of the VAE's posterior, times its scaling factor, (n, flips, C, h, w); flips is 2 if mirror images
            are trained on too, else 1.
        text: the encoded captions, (n, tokens, width).
        empty: the encoded empty caption, (1, tokens, width).
    """

    names: list[str]
    mean: torch.Tensor
    std: torch.Tensor
    text: torch.Tensor
    empty: torch.Tensor

    def to(self, device, dtype) -> "Encoded":
        """A copy on a device, with the text in `dtype`; mean and std stay in fp32."""
        return Encoded(
            self.names, self.mean.to(device), self.std.to(device),
            self.text.to(device, dtype), self.empty.to(device, dtype),
        )  # fmt: skip


@torch.no_grad()
def encode(
    pairs: list[Pair], vae, tokenizer, text_encoder, resolution: int, flip: bool = False, trigger_words: str = ""
) -> Encoded:
    """Encodes every image and every caption once, in the dtype of the models and on their device.

    Args:
        resolution: side in pixels to which the middle square of each image is resized.
        flip: whether to encode the mirror image of each image too.
        trigger_words: are put before every caption.

    Raises:
        DataError: naming every image whose encoding is not finite.
    """
    device, posteriors = vae.device, []
    for pair in tqdm(pairs, desc="encoding images", leave=False, disable=len(pairs) < 20):
        x = torch.from_numpy(np.asarray(crop_to_square(pair.open(), resolution), dtype=np.float32).copy())
        x = x.permute(2, 0, 1).div(127.5).sub(1).to(device)
        batch = torch.stack([x, x.flip(-1)] if flip else [x])
        posterior = vae.encode(batch.to(vae.dtype)).latent_dist
        posteriors.append((posterior.mean.float(), posterior.std.float()))
    bad = [p.name for p, (m, s) in zip(pairs, posteriors) if not (torch.isfinite(m).all() and torch.isfinite(s).all())]
    if bad:
        raise DataError("encoding", [f"{name}: the VAE's encoding of it is not finite" for name in bad])
    scale = vae.config.scaling_factor
    texts = [f"{trigger_words} {p.caption}".strip() for p in pairs]
    return Encoded(
        [p.name for p in pairs],
        torch.stack([m for m, _ in posteriors]) * scale,
        torch.stack([s for _, s in posteriors]) * scale,
        encode_text(texts, tokenizer, text_encoder),
        encode_text([""], tokenizer, text_encoder),
    )


@torch.no_grad()
def encode_text(texts: list[str], tokenizer, text_encoder) -> torch.Tensor:
    """The last hidden states of the text encoder for each text, (n, tokens, width); equal texts are encoded once."""
    unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = tokenizer(
        list(unique), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    states = torch.cat([text_encoder(part.to(text_encoder.device))[0] for part in ids.split(32)])
    return states[[unique[t] for t in texts]]


def truncated_captions(pairs: list[Pair], tokenizer, trigger_words: str = "") -> list[str]:
    """The names of the pairs whose caption has more tokens than the text encoder reads."""
    max_tokens = tokenizer.model_max_length
    return [p.name for p in pairs if len(tokenizer(f"{trigger_words} {p.caption}".strip()).input_ids) > max_tokens]
