"""Work on a GPU that is launched as one: kernels that are recorded once and then replayed (a CUDA graph).

A step of Stable Diffusion's UNet is thousands of kernels of some microseconds. Python takes several times as long to
launch them, one by one, as the GPU to run them.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch


class CudaGraphed:
    """A function on a CUDA device whose kernels are launched one by one at the first call only.

    The first call warms up, the second one records, and all from the second on replay. If it cannot be recorded, it is
    called as it is, after a warning.

    Args:
        function: takes tensors by name, of the same shapes at each call, and gives a tensor. What else it changes
            must lie in the same place at each call; it must not wait for the device.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function, self.stream = function, torch.cuda.Stream()
        self.given: dict[str, torch.Tensor] | None = None  # what is taken lies here
        self.graph, self.possible = None, True

    def __call__(self, **tensors: torch.Tensor) -> torch.Tensor:
        if self.given is None:
            self.given = {name: tensor.clone() for name, tensor in tensors.items()}
            return self._beside()
        for name, tensor in tensors.items():
            self.given[name].copy_(tensor)
        if self.graph is None and self.possible:
            self._record()
        if self.graph is None:
            return self._beside()
        self.graph.replay()
        return self.result.clone()

    def _beside(self) -> torch.Tensor:
        """Calls the function on the stream on which it is recorded: gradients remember theirs."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function(**self.given)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.result = self.function(**self.given)
        except RuntimeError as error:
            warnings.warn(f"the GPU's work cannot be recorded, and is launched piece by piece: {error}", stacklevel=2)
            self.possible = False
        else:
            self.graph = graph


@contextmanager
def graphed_unet(unet):
    """Within the `with`, a UNet's passes without a gradient, all of one shape, are recorded and replayed.

    Does nothing but on CUDA, nor for a UNet that is offloaded or compiled, or whose `forward` is someone else's.
    """
    moved = any(hasattr(module, hook) for module in unet.modules() for hook in ("_hf_hook", "_diffusers_hook"))
    if unet.device.type != "cuda" or moved or hasattr(unet, "_orig_mod") or "forward" in vars(unet):
        yield
        return
    plain, replayed = (
        unet.forward,
        CudaGraphed(lambda **given: plain(**given, return_dict=False)[0]),
    )

    def forward(sample, timestep, encoder_hidden_states, return_dict=True, **more):
        if torch.is_grad_enabled() or return_dict or any(value is not None for value in more.values()):
            return plain(sample, timestep, encoder_hidden_states, return_dict=return_dict, **more)
        timestep = torch.as_tensor(timestep, device=sample.device)
        return (replayed(sample=sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
