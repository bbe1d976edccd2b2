"""The texts that each picture is trained with: its captions, with tags in another order or left out, and with choices.

All of them are made and encoded once, before the first step, from the run's seed. A step then only picks one, so that
it takes no longer and a resumed run picks the same.
"""

import random
import re
from collections.abc import Callable

from .buckets import mix_seed
from .config import TrainConfig
from .dataset import Pair

_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")  # {red|blue hair}, the innermost first


def training_texts(pairs: list[Pair], config: TrainConfig) -> list[list[str]]:
    """The texts of each pair, with the trigger words before them.

    Of a pair whose texts vary by chance `config.caption_variants`, or one for each of its captions if these are more;
    of another one for each of its captions.
    """
    return [
        [with_trigger_words(text, config.trigger_words) for text in _variants(pair, number, config)]
        for number, pair in enumerate(pairs)
    ]


def first_text(pair: Pair, trigger_words: str) -> str:
    """The one text of a pair for previews and held-out losses: its first caption with the first choices."""
    return with_trigger_words(pick_choices(pair.caption, lambda options: options[0]), trigger_words)


def with_trigger_words(caption: str, trigger_words: str) -> str:
    return f"{trigger_words} {caption}".strip()


def _variants(pair: Pair, number: int, config: TrainConfig) -> list[str]:
    captions = pair.captions
    varies = config.shuffle_tags or config.tag_dropout or any(map(_CHOICE.search, captions))
    count = max(config.caption_variants, len(captions)) if varies else len(captions)
    return [
        _vary(captions[i % len(captions)], config, mix_seed(config.seed, number * 1000 + i, 4)) for i in range(count)
    ]


def _vary(caption: str, config: TrainConfig, seed: int) -> str:
    """One variant of a caption: choices made, then tags after the first `keep_tokens` left out and put in order."""
    chance = random.Random(seed)
    caption = pick_choices(caption, chance.choice)
    if not (config.shuffle_tags or config.tag_dropout):
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, others = tags[: config.keep_tokens], tags[config.keep_tokens :]
    left = [tag for tag in others if chance.random() >= config.tag_dropout]
    if others and not (kept or left):
        left = [chance.choice(others)]  # an empty caption would be caption_dropout's
    if config.shuffle_tags:
        chance.shuffle(left)
    return ", ".join(kept + left)


def pick_choices(caption: str, pick: Callable[[list[str]], str]) -> str:
    """A caption with one option of each {a|b} in it; choices may be inside choices."""
    while _CHOICE.search(caption):
        caption = re.sub(r"\s+", " ", _CHOICE.sub(lambda match: pick(match[1].split("|")), caption)).strip()
    return caption
