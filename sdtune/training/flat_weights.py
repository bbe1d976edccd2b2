"""All trained parameters as one fp32 vector, so that clipping, update and copies are one operation each."""

from collections.abc import Iterable

import torch


class FlatWeights:
    """One fp32 vector for the optimizer; the trained parameters of the UNet are views of it.

    If the UNet is in half precision, its parameters are views of a half-precision copy instead: `copy_to_model` updates
    the copy before a forward pass, and `collect_gradients` adds the gradients of its views to the vector's.

    Args:
        parameters: the trained parameters by name, all of one dtype.

    Attributes:
        vector: all weights, (n,). Its gradient must be set to zero and never to None, as views of it are in use.
        named, gradients: the views of the vector, and of its gradient, by the names of the parameters.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        self.parameters, dtype = list(parameters.values()), next(iter(parameters.values())).dtype
        self.vector = torch.nn.Parameter(torch.cat([p.detach().float().flatten() for p in self.parameters]))
        self.vector.grad = torch.zeros_like(self.vector)
        self.half = None if dtype == torch.float32 else self.vector.detach().to(dtype)
        self.named = dict(zip(parameters, self._split(self.vector.detach())))
        self.gradients = dict(zip(parameters, self._split(self.vector.grad)))
        views = self._split(self.vector.detach() if self.half is None else self.half)
        for p, view, gradient in zip(self.parameters, views, self.gradients.values()):
            p.data = view
            p.grad = gradient if self.half is None else None

    def _split(self, vector: torch.Tensor) -> Iterable[torch.Tensor]:
        """Views of a vector, in the shapes of the parameters."""
        parts = vector.split([p.numel() for p in self.parameters])
        return (part.view(p.shape) for part, p in zip(parts, self.parameters))

    def copy_to_model(self) -> None:
        """Rounds the vector into the half-precision copy, if there is one."""
        if self.half is not None:
            self.half.copy_(self.vector.detach())
            self._clear_gradients()  # a failed capture of a CUDA graph may have left some

    def collect_gradients(self) -> None:
        """Adds the half-precision gradients, if there are any, to the gradient of the vector."""
        if self.half is not None:
            self.vector.grad += torch.cat([p.grad.flatten() for p in self.parameters])
            self._clear_gradients()

    def _clear_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None
