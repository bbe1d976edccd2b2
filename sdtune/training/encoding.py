"""Encodes a whole data set once, before training: images with the VAE, captions with the text encoder."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ..bases.text_encoding import CHUNK, count_chunks, encode_texts
from .buckets import AspectBuckets
from .dataset import Pair
from .errors import DataError
from .images import crop_to_shape
from .masks import loss_weight


@dataclass
class Bucket:
    """The encoded images of one shape, m of the data set's.

    Attributes:
        images: their numbers in the data set, ascending, (m,), on the CPU.
        mean, std: of the VAE's posterior, times its scaling factor, (m, flips, C, h, w); flips is 2 if mirror images
            are trained on too, else 1.
        weight: how much each place counts in the loss, on average 1 for each image, (m, flips, 1, h, w); None if no
            image of the bucket is masked.
    """

    images: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor | None = None

    def to(self, device) -> "Bucket":
        """A copy on a device."""
        weight = None if self.weight is None else self.weight.to(device)
        return Bucket(self.images, self.mean.to(device), self.std.to(device), weight)


@dataclass
class Encoded:
    """An encoded data set of n images, on one device.

    Attributes:
        names: of the images, for messages.
        buckets: the images by their shapes.
        text: the encoded texts of all images, one image after the other, (texts, tokens, width).
        empty: the encoded empty caption, (1, tokens, width).
        text_counts: how many texts each image has, of which a step takes one, (n,), on the CPU; by default one.
        repeats: how many times as often as others each image is trained on, (n,), on the CPU; by default once.
        plain: the encoded caption of each image without the trigger words, (n, tokens, width), if they are needed.
    """

    names: list[str]
    buckets: list[Bucket]
    text: torch.Tensor
    empty: torch.Tensor
    text_counts: torch.Tensor | None = None
    repeats: torch.Tensor | None = None
    plain: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("text_counts", "repeats"):
            if getattr(self, name) is None:
                setattr(self, name, torch.ones(len(self.names), dtype=torch.long))

    @property
    def first_texts(self) -> torch.Tensor:
        """The place in `text` of the first text of each image, (n,), on the CPU."""
        return self.text_counts.cumsum(0) - self.text_counts

    def to(self, device, dtype) -> "Encoded":
        """A copy on a device, with the text in `dtype`; mean and std stay in fp32."""
        return Encoded(
            self.names, [bucket.to(device) for bucket in self.buckets],
            self.text.to(device, dtype), self.empty.to(device, dtype), self.text_counts, self.repeats,
            None if self.plain is None else self.plain.to(device, dtype),
        )  # fmt: skip


@torch.no_grad()
def encode(
    pairs: list[Pair], vae, tokenizer, text_encoder, buckets: AspectBuckets, flip: bool = False,
    texts: list[list[str]] | None = None, mask_weight: float = 1.0, clip_skip: int = 1, max_tokens: int = CHUNK,
    plain_texts: list[str] | None = None,
) -> Encoded:  # fmt: skip
    """Encodes every image and every caption once, in the dtype of the models and on their device.

    Args:
        buckets: give the shape in which each image is encoded.
        flip: whether to encode the mirror image of each image too.
        texts: of each image; by default its caption alone.
        mask_weight: how much the masked parts of an image count in the loss, from 0 to 1.
        clip_skip: as in `text_encoding.encode_texts`.
        max_tokens: how many tokens of a caption are read, a multiple of 75.
        plain_texts: the caption of each image without the trigger words, if they are to be encoded too.

    Raises:
        DataError: naming every image whose encoding is not finite, or of which all that is trained on is masked.
    """
    device, posteriors, weights = vae.device, [], []
    for pair in tqdm(pairs, desc="encoding images", leave=False, disable=len(pairs) < 20):
        image = pair.open()
        shape = buckets.shape_for(image.size)
        image = crop_to_shape(image, shape)
        x = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
        x = x.permute(2, 0, 1).div(127.5).sub(1).to(device)
        batch = torch.stack([x, x.flip(-1)] if flip else [x])
        posterior = vae.encode(batch.to(vae.dtype)).latent_dist
        posteriors.append((posterior.mean.float(), posterior.std.float()))
        weights.append(None)
        if pair.open_mask and mask_weight < 1:
            weight = loss_weight(pair.open_mask(), shape, posterior.mean.shape[-2:], mask_weight).to(device)
            weights[-1] = torch.stack([weight, weight.flip(-1)] if flip else [weight])
    problems = [
        f"{pair.name}: the VAE's encoding of it is not finite"
        for pair, (mean, std) in zip(pairs, posteriors)
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all())
    ]
    problems += [
        f"{pair.name}: all that is left of it after cropping is masked; change the mask, or raise mask_weight"
        for pair, weight in zip(pairs, weights)
        if weight is not None and not torch.isfinite(weight).all()
    ]
    if problems:
        raise DataError("encoding", problems)
    texts = texts or [[pair.caption] for pair in pairs]
    return Encoded(
        [p.name for p in pairs],
        _group_by_shape(posteriors, weights, vae.config.scaling_factor),
        encode_text([text for own in texts for text in own], tokenizer, text_encoder, clip_skip, max_tokens // CHUNK),
        encode_text([""], tokenizer, text_encoder, clip_skip, max_tokens // CHUNK),
        torch.tensor([len(own) for own in texts]),
        torch.tensor([pair.repeats for pair in pairs]),
        plain_texts and encode_text(plain_texts, tokenizer, text_encoder, clip_skip, max_tokens // CHUNK),
    )


def _group_by_shape(
    posteriors: list[tuple[torch.Tensor, torch.Tensor]], weights: list[torch.Tensor | None], scale: float
) -> list[Bucket]:
    """Buckets of the images' means, standard deviations and loss weights, in the order of their first images."""
    by_shape: dict[tuple, list[int]] = {}
    for i, (mean, _) in enumerate(posteriors):
        by_shape.setdefault(tuple(mean.shape), []).append(i)
    buckets = []
    for images in by_shape.values():
        mean, std = (torch.stack(part) * scale for part in zip(*(posteriors[i] for i in images)))
        own, weight = [weights[i] for i in images], None
        if any(w is not None for w in own):
            weight = torch.stack([torch.ones_like(mean[0][:, :1]) if w is None else w for w in own])
        buckets.append(Bucket(torch.tensor(images), mean, std, weight))
    return buckets


def encode_text(texts: list[str], tokenizer, text_encoder, clip_skip: int = 1, chunks: int = 1) -> torch.Tensor:
    """As `text_encoding.encode_texts`; equal texts are encoded once."""
    unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return encode_texts(list(unique), tokenizer, text_encoder, clip_skip, chunks)[[unique[t] for t in texts]]


def truncated_texts(names: list[str], texts: list[list[str]], tokenizer, max_tokens: int = CHUNK) -> list[str]:
    """The names of the images of which a text has more tokens than are read of it."""
    return [
        name
        for name, own in zip(names, texts)
        if any(count_chunks(text, tokenizer) > max_tokens // CHUNK for text in set(own))
    ]
