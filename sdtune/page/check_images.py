"""The part of the Train tab that looks at each uploaded image before a training."""

import json

from ..check import words
from ..training.buckets import AspectBuckets
from ..training.config import TrainConfig
from . import html_parts
from .backend import Backend
from .errors import PageError, plain_message

LOOK_THROUGH = "Look through my images"
NO_IMAGES = "There are no images yet. Drop some above."


def look_through(backend: Backend, uploaded, captions: str, resolution, square: bool, trigger_words: str) -> str:
    """What is worth a look in the uploaded images, as HTML; problems and errors as a message.

    Args:
        captions: as they stand in the browser, a JSON list.
        resolution, square, trigger_words: of the form.
    """
    try:
        if uploaded is None or not uploaded.pairs:
            raise PageError(NO_IMAGES)
        texts = json.loads(captions)
        if len(texts) != len(uploaded.pairs):  # the fields are still loading
            texts = [caption for _, caption in uploaded.pairs]
        config = TrainConfig(resolution=int(resolution) if resolution else None)  # which is checked so
        buckets = AspectBuckets(config.resolution or backend.side, bool(square))
        lines, cards = backend.datasets.look_through(uploaded, texts, buckets)
        return html_parts.picture_sheet([*lines, *words.describe_words(trigger_words or "")], cards)
    except (ValueError, OverflowError, OSError) as error:
        return html_parts.message(plain_message(error), error=True)
