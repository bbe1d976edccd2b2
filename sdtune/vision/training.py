"""One run: trains one method with one seed, measures it on the test pictures, and saves what it learnt.

The protocol is that of NOAH and SSF on VTAB-1K: AdamW, warm-up over a tenth of the epochs, cosine to a hundredth,
batches of 64, no augmentation. A killed run continues from its last saved epoch, to the same weights.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters import api, disk
from ..adapters.operations import find_heads
from ..tuners.config import FULL, LINEAR
from .augmentation import augment
from .data import Pixels
from .methods import Method
from .model import ADAPTER, Classifier, load_classifier, save_classifier

_SAVE_EVERY = 20  # seconds between two checkpoints


@dataclass(frozen=True)
class Schedule:
    """The settings of training.

    Attributes:
        epochs: passes over the training pictures.
        batch_size: pictures of a step.
        rate: largest learning rate; None: the method's usual one.
        decay: weight decay of AdamW.
        augment: "none"; "crop_flip": random crops of 8 to 100 % of the area and flips; or "ssf": these and the
            RandAugment, mixup, CutMix, erasing and label smoothing of SSF's code for CIFAR-100.
    """

    epochs: int = 100
    batch_size: int = 64
    rate: float | None = None
    decay: float = 1e-4
    augment: str = "none"

    def factor(self, done: float) -> float:
        """The share of the largest rate, after a share of training: linear warm-up, then cosine from 1 to 0.01."""
        if done < 0.1:
            return max(0.01, done / 0.1)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


def train(
    classifier: Classifier, method: Method, train: Pixels, test: Pixels, schedule: Schedule, seed: int,
    folder: Path | None = None, save: bool = True, log: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """One run; the model is as before at its end.

    Args:
        folder: for the result and the checkpoint; None: neither is written.
        save: whether the result is saved.

    Returns:
        `accuracy`, `predictions` for the test pictures, `parameters` (without the head), `head_parameters`, `memory`
        (bytes of training beyond the model's weights), `seconds`, `rate`, `loss` of the last epoch.

    Raises:
        ArithmeticError: if the loss is not finite.
    """
    model, full = classifier.model, method.config.kind == FULL
    torch.manual_seed(seed)
    (head,) = find_heads(model).values()
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    before = {k: v.clone() for k, v in model.state_dict().items()} if full else {}
    if full:
        parameters = {k: p.requires_grad_() for k, p in model.named_parameters() if "mask_token" not in k}
        heads = [p for k, p in parameters.items() if k.startswith("classifier")]
    else:
        api.add_tuner(model, method.config, ADAPTER)
        parameters = api.tuner_parameters(model, ADAPTER)
        heads = [p for k, p in parameters.items() if k.startswith("classifier")]
    head_count = sum(p.numel() for p in heads)
    try:
        found = _fit(classifier, method, train, schedule, seed, parameters, folder, log)
        predictions = predict(classifier, test)
        found |= {
            "accuracy": (predictions == test.labels.cpu()).double().mean().item(),
            "predictions": predictions.tolist(),
            "parameters": sum(p.numel() for p in parameters.values()) - head_count,
            "head_parameters": head_count,
        }
        if save and folder:
            _save_and_verify(
                classifier, folder, full, test, found | {"method": method.name, "seed": seed} | asdict(schedule)
            )
    finally:
        if full:
            model.load_state_dict(before)
            model.requires_grad_(False)
        else:
            api.unload_tuner(model, ADAPTER)
    if folder:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return found


def _fit(
    classifier: Classifier, method: Method, pixels: Pixels, schedule: Schedule, seed: int,
    parameters: dict[str, nn.Parameter], folder: Path | None, log: Callable[[str], None],
) -> dict:  # fmt: skip
    model, count = classifier.model, len(pixels)
    rate = schedule.rate or method.rate
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=schedule.decay)
    scaler = torch.amp.GradScaler(classifier.device.type, enabled=classifier.autocast == torch.float16)
    checkpoint = folder / "checkpoint.pt" if folder else None
    start, spent = _resume(checkpoint, parameters, optimizer, scaler, schedule, rate)
    features = _features(classifier, pixels) if method.config.kind == LINEAR and schedule.augment == "none" else None
    (layer,) = find_heads(model).values()
    steps, began, saved, memory, loss = -(-count // schedule.batch_size), time.monotonic(), time.monotonic(), 0, 0.0
    for epoch in range(start, schedule.epochs):
        model.train()
        torch.manual_seed(seed * 100_003 + epoch)  # dropout and augmentation, so that a resumed run continues alike
        order, total = torch.randperm(count), 0.0
        for step, indices in enumerate(order.split(schedule.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule.factor((epoch + step / steps) / schedule.epochs)
            with CountSaved(model) if step == 0 and epoch == start else nullcontext() as counted:
                targets = pixels.labels[indices.to(pixels.labels.device)]
                if features is not None:
                    logits = layer(features[indices])
                else:
                    x, targets = augment(pixels[indices], targets, classifier, schedule.augment)
                    logits = classifier(x)
                loss = F.cross_entropy(logits, targets)
            memory = counted.bytes if counted else memory
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total += loss.item() * len(indices)
        if not math.isfinite(total):
            raise ArithmeticError(f"{method.name}, seed {seed}: the loss is not finite at the rate {rate:g}")
        loss = total / count
        log(f"epoch {epoch + 1} of {schedule.epochs}: loss {loss:.4f}")
        if checkpoint and time.monotonic() - saved > _SAVE_EVERY and epoch + 1 < schedule.epochs:
            spent_now = spent + time.monotonic() - began
            state = {"epoch": epoch + 1, "seconds": spent_now, "optimizer": optimizer.state_dict(), "rate": rate,
                     "scaler": scaler.state_dict(),
                     "schedule": asdict(schedule), "weights": {k: p.data for k, p in parameters.items()}}  # fmt: skip
            with disk.new_file(checkpoint) as part:
                torch.save(state, part)
            saved = time.monotonic()
    trained = sum(p.numel() * 4 * 3 for p in parameters.values())  # the gradient and AdamW's two means
    return {
        "rate": rate, "decay": schedule.decay, "epochs": schedule.epochs, "loss": loss,
        "seconds": spent + time.monotonic() - began, "memory": memory + trained,
    }  # fmt: skip


def _resume(
    checkpoint: Path | None, parameters: dict, optimizer, scaler, schedule: Schedule, rate: float
) -> tuple[int, float]:
    """The number of epochs done, and the seconds they took; 0 where there is no checkpoint of these settings."""
    if not checkpoint or not checkpoint.is_file():
        return 0, 0.0
    try:
        state = torch.load(checkpoint, weights_only=True)
    except Exception:  # a damaged file; the run starts again
        return 0, 0.0
    if (
        "scaler" not in state
        or state["schedule"] != asdict(schedule)
        or state["rate"] != rate
        or state["weights"].keys() != parameters.keys()
    ):
        return 0, 0.0
    for key, parameter in parameters.items():
        parameter.data.copy_(state["weights"][key])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["epoch"], state["seconds"]


@torch.no_grad()
def predict(classifier: Classifier, pixels: Pixels, batch: int = 256) -> torch.Tensor:
    """The class of each picture, (N,) on the CPU."""
    classifier.model.eval()
    return torch.cat([classifier(pixels[i]).argmax(1).cpu() for i in torch.arange(len(pixels)).split(batch)])


@torch.no_grad()
def _features(classifier: Classifier, pixels: Pixels, batch: int = 256) -> torch.Tensor:
    """What the head receives for each picture, (N, width); the model below it is frozen, so once is enough."""
    (layer,), found = find_heads(classifier.model).values(), []
    hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].float()))
    classifier.model.eval()
    try:
        for indices in torch.arange(len(pixels)).split(batch):
            classifier(pixels[indices])
    finally:
        hook.remove()
    return torch.cat(found)


class CountSaved:
    """Counts, in a `with`, the bytes that autograd saves for the backward pass, without the model's own weights."""

    def __init__(self, model: nn.Module):
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda t: t)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)


@torch.no_grad()
def _save_and_verify(classifier: Classifier, folder: Path, full: bool, test: Pixels, training: dict) -> None:
    """Writes the result, loads it back into a fresh base, and compares the logits of some test pictures.

    Raises:
        RuntimeError: if they differ.
    """
    training = {k: v for k, v in training.items() if k != "predictions"}
    save_classifier(classifier, folder, full, training)
    some = test[torch.arange(min(16, len(test)))]
    again = load_classifier(folder, device=str(classifier.device))
    again.autocast = classifier.autocast
    classifier.model.eval()
    difference = (again(some) - classifier(some)).abs().max().item()
    if not difference < 1e-3:
        raise RuntimeError(
            f"{folder} was written, but loaded back its logits differ by {difference:g}; the disk or the memory may be "
            "faulty: run again"
        )
