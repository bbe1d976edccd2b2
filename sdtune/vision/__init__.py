"""The paper's other half: image classification with a vision transformer, and all methods it is compared with.

    python -m sdtune.vision --data my/classes --kinds linear res_attn lora

`load_classifier` loads a result: `load_classifier("output/vision/classes/res_attn/seed-0").predict("photo.jpg")`.
"""


def load_classifier(path, base: str | None = None):
    """A trained classifier; see `model.load_classifier`."""
    from .model import load_classifier

    return load_classifier(path, base)
