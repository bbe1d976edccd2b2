"""The loss on held-out images over a run, and the weights for which it was lowest."""

import torch

from ..adapters import active_adapters
from . import stopping
from .encoding import Encoded
from .loss import denoising_errors


class HeldOutLoss:
    """Measures the loss on images that are not trained on. Without such images it does nothing.

    Args:
        images: the held-out images, encoded, or None.
        keep_best: whether to keep a copy of the weights with the lowest mean loss.

    Attributes:
        losses: step -> loss of each image; step 0 is the base without a tuner.
        best: with `keep_best`, the step of the lowest mean loss and its weights.
    """

    def __init__(self, unet, scheduler, images: Encoded | None, keep_best: bool):
        self.unet, self.scheduler, self.images, self.keep_best = unet, scheduler, images, keep_best
        self.losses: dict[int, list[float]] = {}
        self.best: tuple[int, torch.Tensor] | None = None

    def measure(self, step: int, weights: torch.Tensor) -> None:
        """Measures the loss after `step` steps, unless it is known; `weights` are those of the UNet's tuner."""
        if not self.images or step in self.losses:
            return
        if 0 not in self.losses:  # the base's loss is measured late, so that the first training step starts early
            with active_adapters.adapters_disabled(self.unet):
                self.losses[0] = self._compute_losses()
        self.losses[step] = self._compute_losses()
        means = self.means()
        if self.keep_best and step and means[step] == min(mean for s, mean in means.items() if s):
            self.best = step, weights.detach().clone()

    def _compute_losses(self) -> list[float]:
        return denoising_errors(self.unet, self.scheduler, self.images).tolist()

    def means(self) -> dict[int, float]:
        """Step -> mean loss."""
        return {step: sum(losses) / len(losses) for step, losses in self.losses.items()}

    def describe_best(self) -> str:
        """Which step's tuner is kept, as a sentence."""
        step, means = self.best[0], self.means()
        lower = "; that of the base is lower still, so a lower --learning_rate may suit" * (means[0] <= means[step])
        return f"keeping the tuner of step {step}, with the lowest held-out loss{lower}"

    def memorising_since(self) -> int | None:
        """The step since which the loss has risen, by the rule of `stopping`, or None."""
        return stopping.first_memorising_step(self.losses)
