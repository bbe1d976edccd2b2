"""Encodes texts for the UNet: the one place where clip skip and texts of more than 75 tokens are handled.

Training, previews, drawing, evaluation and the page all call `encode_texts`, so they agree.
"""

import torch

CHUNK = 75  # tokens of a text that the text encoder reads at once, besides a start and an end token


def check_clip_skip(text_encoder, clip_skip: int) -> None:
    """Raises a ValueError if the text encoder has no such layer."""
    layers = text_encoder.config.num_hidden_layers
    if not isinstance(clip_skip, int) or not 1 <= clip_skip <= layers:
        raise ValueError(
            f"clip_skip is {clip_skip!r}; the text encoder of this base has {layers} layers, so it must be a whole "
            f"number from 1, the last layer, to {layers}"
        )


def count_chunks(text: str, tokenizer) -> int:
    """How many chunks of 75 tokens a text has; at least 1."""
    return max(1, -(-(len(_all_ids(text, tokenizer)) - 2) // (tokenizer.model_max_length - 2)))


@torch.no_grad()
def encode_texts(
    texts: list[str], tokenizer, text_encoder, clip_skip: int = 1, chunks: int = 1, device=None
) -> torch.Tensor:
    """What the UNet attends to for each text, (n, 77 * chunks, width).

    A text is cut into chunks of 75 tokens. Each is encoded by itself between a start and an end token, padded, and the
    chunks are joined, as AUTOMATIC1111's web UI and ComfyUI do (kohya's scripts cut too, but keep the start and end
    tokens only at the outer ends). What is beyond the last chunk is cut off, so a caller counts them (`count_chunks`).

    Args:
        clip_skip: as AUTOMATIC1111 counts: 1 takes the last layer of the text encoder, 2 the one before it. Whatever
            the layer, the encoder's final norm follows. (diffusers' own `clip_skip` counts one less.)
        chunks: into how many chunks each text is padded.
        device: of the result; by default that of the text encoder.

    Raises:
        ValueError: if the text encoder has no such layer.
    """
    check_clip_skip(text_encoder, clip_skip)
    ids = _token_ids(texts, tokenizer, chunks)
    states = torch.cat([_hidden_states(text_encoder, part, clip_skip, device) for part in ids.split(32)])
    return states.unflatten(0, (len(texts), chunks)).flatten(1, 2)


def _token_ids(texts: list[str], tokenizer, chunks: int) -> torch.Tensor:
    """The tokens of all chunks of all texts, (n * chunks, 77)."""
    length = tokenizer.model_max_length
    if chunks == 1:
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    rows = []
    for text in texts:
        start, *ids, end = _all_ids(text, tokenizer)
        for i in range(chunks):
            row = [start, *ids[i * (length - 2) : (i + 1) * (length - 2)], end]
            rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
    return torch.tensor(rows)


def _all_ids(text: str, tokenizer) -> list[int]:
    """The tokens of a text, however long, with those of start and end."""
    return tokenizer(text, verbose=False).input_ids  # verbose: it would warn that the text is long


def _hidden_states(text_encoder, ids: torch.Tensor, clip_skip: int, device) -> torch.Tensor:
    ids = ids.to(device or text_encoder.device)
    if clip_skip == 1:
        return text_encoder(ids)[0]
    states = text_encoder(ids, output_hidden_states=True).hidden_states[-clip_skip]
    # since transformers 5 the text model is no part of CLIPTextModel, but is one
    return getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states)
