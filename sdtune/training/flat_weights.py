"""All trained parameters as one vector in fp32."""

from collections.abc import Iterable

import torch


class FlatWeights:
    """What is trained: one vector for the optimizer, in fp32, whose pieces are the UNet's parameters.

    A UNet in half precision has pieces of a copy in its own, which `renew` makes of the vector before they are used;
    `gather` brings their gradients to the vector's.

    Attributes:
        vector: of all weights, with its gradient, which is to be set to zero, not to be taken away.
        named: its pieces by the names of the parameters, to be read and written.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        self.used, dtype = list(parameters.values()), next(iter(parameters.values())).dtype
        self.vector = torch.nn.Parameter(torch.cat([p.detach().float().flatten() for p in self.used]))
        self.vector.grad = torch.zeros_like(self.vector)
        self.copy = None if dtype == torch.float32 else self.vector.detach().to(dtype)
        self.named = dict(zip(parameters, self._pieces(self.vector.detach())))
        pieces = self._pieces(self.vector.detach() if self.copy is None else self.copy)
        for p, piece, gradient in zip(self.used, pieces, self._pieces(self.vector.grad)):
            p.data = piece
            p.grad = gradient if self.copy is None else None

    def _pieces(self, vector: torch.Tensor) -> Iterable[torch.Tensor]:
        parts = vector.split([p.numel() for p in self.used])
        return (part.view(p.shape) for part, p in zip(parts, self.used))

    def renew(self) -> None:
        if self.copy is not None:
            self.copy.copy_(self.vector.detach())
            self._forget()  # what a recording that failed may have left

    def gather(self) -> None:
        if self.copy is not None:
            self.vector.grad += torch.cat([p.grad.flatten() for p in self.used])
            self._forget()

    def _forget(self) -> None:
        for p in self.used:
            p.grad = None
