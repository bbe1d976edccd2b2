"""A vision transformer with a head for some classes: from a hub id or a folder, and from a result of training."""

import inspect
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..adapters import api, tuner_file
from ..adapters.operations import find_heads, is_vision_model
from ..bases.errors import BaseError
from ..training.images import open_image

DEFAULT_BASE = "google/vit-base-patch16-224-in21k"
FILE_NAME = "classifier.json"  # beside the weights: the settings of `Setup`
ADAPTER = "classifier"  # the adapter's name
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass
class Setup:
    """What a classifier needs beside its weights.

    Attributes:
        base: hub id or folder.
        labels: names of the classes, in the order of the head.
        image_size: side of the pictures in pixels.
        layers: how many of the base's blocks are used, from the first.
        mean, std: of the pictures' channels, from 0 to 1; those of the base.
    """

    base: str
    labels: list[str]
    image_size: int
    layers: int
    mean: list[float] = field(default_factory=lambda: _IMAGENET[0])
    std: list[float] = field(default_factory=lambda: _IMAGENET[1])


class Classifier:
    """A vision model and its set-up.

    Args:
        model: such as `ViTForImageClassification`.
        autocast: dtype of mixed precision, or None.
    """

    def __init__(self, model: nn.Module, setup: Setup, autocast: torch.dtype | None = None):
        self.model, self.setup, self.autocast = model, setup, autocast
        size, known = model.config.image_size, inspect.signature(model.forward).parameters
        resized = setup.image_size != (size if isinstance(size, int) else size[0])
        self._options = {"interpolate_pos_encoding": True} if resized and "interpolate_pos_encoding" in known else {}
        self._mean, self._std = (
            255 * torch.tensor(v, device=self.device)[:, None, None] for v in (setup.mean, setup.std)
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bytes (B, 3, side, side) -> what the model receives."""
        return (pixels.to(self.device).float() - self._mean) / self._std

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bytes (B, 3, side, side), or floats that `normalise` gave -> logits (B, classes) in float32."""
        x = pixels if pixels.is_floating_point() else self.normalise(pixels)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model(x, **self._options).logits.float()

    @torch.no_grad()
    def predict(self, image: str | Path | Image.Image, top: int = 3) -> list[tuple[str, float]]:
        """The most probable classes of a picture, each with its probability."""
        side = self.setup.image_size
        picture = np.array(open_image(image).resize((side, side), Image.Resampling.BICUBIC))
        self.model.eval()
        probabilities = self(torch.from_numpy(picture).permute(2, 0, 1)[None]).softmax(1)[0]
        values, indices = probabilities.topk(min(top, len(probabilities)))
        return [(self.setup.labels[i], p) for i, p in zip(indices.tolist(), values.tolist())]


def check_base(base: str, image_size: int | None = None, layers: int | None = None) -> list[str]:
    """What is wrong with a base, from its configuration alone, in sentences; empty if nothing."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        return [f"the base {base} cannot be loaded: {reason}; expected a hub id such as {DEFAULT_BASE}, or a folder"]
    if config.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES or not hasattr(config, "patch_size"):
        return [
            f"the base {base} is a {config.model_type}, not a vision transformer for classification; expected one such "
            f"as {DEFAULT_BASE} or facebook/dinov2-small"
        ]
    problems, patch = [], config.patch_size
    if image_size is not None and (image_size < patch or image_size % patch):
        problems.append(f"--image_size is {image_size}; it must be a multiple of the base's patches of {patch} pixels")
    if layers is not None and not 1 <= layers <= config.num_hidden_layers:
        problems.append(f"--layers is {layers}; the base {base} has {config.num_hidden_layers}")
    return problems


def load_base(
    base: str, labels: list[str], image_size: int | None = None, layers: int | None = None, device: str = "cpu"
) -> tuple[nn.Module, Setup]:
    """A base with a fresh head for these classes, frozen.

    Args:
        image_size: default: that of the base, at most 224.
        layers: use the first so many blocks only; default: all.

    Raises:
        BaseError: if it is no vision transformer for classification.
    """
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.utils import logging

    problems = check_base(base, image_size, layers)
    if problems:
        raise BaseError("; ".join(problems))
    config = AutoConfig.from_pretrained(base)
    if layers is not None:  # the names of stages, which a backbone has, are those of all layers
        stages = ("out_features", "out_indices", "stage_names")
        plain = {k: v for k, v in config.to_dict().items() if k not in stages}
        config = type(config).from_dict(plain | {"num_hidden_layers": layers})
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is no news
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            base, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise BaseError(f"the base {base} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.set_verbosity(before)
    if not is_vision_model(model) or not find_heads(model):
        raise BaseError(f"the base {base} is a {type(model).__name__}, which has no transformer blocks with a known "
                        "layout; ViT, DeiT and DINOv2 have")  # fmt: skip
    fresh = (*find_heads(model), "pooler", "mask_token")  # which may be new, or are not used
    found = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lacking := sorted(key for key in found if not any(name in key for name in fresh)):
        raise BaseError(f"the base {base} lacks {len(lacking)} weights of its model, or has them in another shape: "
                        f"{tuner_file.list_some(lacking)}; fetch or save it again")  # fmt: skip
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(base)
        mean, std = found["image_mean"], found["image_std"]
    except (OSError, KeyError):
        mean, std = _IMAGENET
    size = model.config.image_size
    side = image_size or min(224, size if isinstance(size, int) else size[0])
    side -= 0 if image_size else side % model.config.patch_size
    return model.requires_grad_(False).to(device), Setup(base, labels, side, config.num_hidden_layers, mean, std)


def save_classifier(classifier: Classifier, folder: Path, full: bool, training: dict) -> list[Path]:
    """Writes the weights and the set-up; of `full` the whole model, as transformers reads it.

    Returns:
        The files.
    """
    setup = asdict(classifier.setup)
    tuner_file.write_text(folder / FILE_NAME, json.dumps(setup, indent=1))
    if full:
        classifier.model.save_pretrained(folder)
        return [folder / FILE_NAME, *folder.glob("*.safetensors")]
    path = api.save_tuner(
        classifier.model, folder, ADAPTER, dtype=torch.float32, labels=classifier.setup.labels,
        training=training | {"setup": setup},
    )  # fmt: skip
    return [folder / FILE_NAME, path]


def load_classifier(path: str | Path, base: str | None = None, device: str = "cpu") -> Classifier:
    """A classifier from the folder of a run, or from its tuner file alone.

    Args:
        base: the base, where it is not found under the name that it had in training.

    Raises:
        TunerFileError: if there is no classifier.
        BaseError: if the base cannot be loaded.
    """
    path = Path(path)
    if (path / "config.json").is_file():  # full fine-tuning
        setup = Setup(**json.loads((path / FILE_NAME).read_text()))
        model, _ = load_base(str(path), setup.labels, setup.image_size, device=device)
        return Classifier(model.eval(), setup)
    file = tuner_file.load(path)
    if "setup" not in file.training:
        raise tuner_file.TunerFileError(f"{path} is no classifier; expected a file that python -m sdtune.vision wrote")
    setup = Setup(**file.training["setup"])
    setup.base = base or setup.base
    model, _ = load_base(setup.base, setup.labels, setup.image_size, setup.layers, device)
    api.load_tuner(model, path, ADAPTER)
    return Classifier(model.eval(), setup)
