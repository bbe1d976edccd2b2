"""CUDA graphs: a function's kernels are captured once and then launched together.

A step of Stable Diffusion's UNet is thousands of kernels of some microseconds each. Python needs several times as long
to launch them one by one as the GPU needs to run them.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch

from .. import is_enabled


class CudaGraphed:
    """A function on a CUDA device that runs as a CUDA graph from its second call with inputs of the same shapes on.

    There is a graph for each combination of shapes. The first call of each is the warm-up and counts; the second one
    captures. If the function cannot be captured, it is called as it is from then on, after a warning.

    Args:
        function: takes tensors by name and returns a tensor. Everything else that it changes must stay at the same
            place in memory; it must not wait for the device.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function, self.stream = function, torch.cuda.Stream()
        # the graphs run one after another and their results are copied at once, so they can share their memory
        self.pool = torch.cuda.graph_pool_handle()
        self.by_shapes: dict[tuple, _OneGraph] = {}

    def __call__(self, **tensors: torch.Tensor) -> torch.Tensor:
        shapes = tuple((name, tensor.shape) for name, tensor in tensors.items())
        if shapes not in self.by_shapes:
            self.by_shapes[shapes] = _OneGraph(self.function, self.stream, self.pool)
        return self.by_shapes[shapes](tensors)


class _OneGraph:
    """The CUDA graph of a function for inputs of one combination of shapes."""

    def __init__(self, function: Callable[..., torch.Tensor], stream: torch.cuda.Stream, pool):
        self.function, self.stream, self.pool = function, stream, pool
        self.inputs: dict[str, torch.Tensor] | None = None  # the captured kernels read their inputs here
        self.graph, self.can_capture = None, True

    def __call__(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.inputs is None:
            self.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
            return self._call_on_stream()
        for name, tensor in tensors.items():
            self.inputs[name].copy_(tensor)
        if self.graph is None and self.can_capture:
            self._capture()
        if self.graph is None:
            return self._call_on_stream()
        self.graph.replay()
        return self.result.clone()

    def _call_on_stream(self) -> torch.Tensor:
        """Calls the function on the stream of the capture, because gradients remember their stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function(**self.inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.result = self.function(**self.inputs)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph could be captured, so kernels are launched one by one: {error}", stacklevel=2)
            self.can_capture = False
        else:
            self.graph = graph


def is_compiled(model) -> bool:
    """Whether torch.compile, `compile()` or `compile_repeated_blocks()` has compiled a model or a part of it."""
    return hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())


@contextmanager
def graphed_unet(unet):
    """A context in which a UNet's passes without a gradient, all of one shape, run as a CUDA graph.

    It does nothing without CUDA, with SDTUNE_KERNELS=off, or if the UNet is offloaded or compiled, or if its `forward`
    is replaced.
    """
    hooked = any(hasattr(module, hook) for module in unet.modules() for hook in ("_hf_hook", "_diffusers_hook"))
    replaced = is_compiled(unet) or "forward" in vars(unet)
    if unet.device.type != "cuda" or not is_enabled() or hooked or replaced:
        yield
        return
    original = unet.forward
    graphed = CudaGraphed(lambda **tensors: original(**tensors, return_dict=False)[0])

    def forward(sample, timestep, encoder_hidden_states, return_dict=True, **more):
        if torch.is_grad_enabled() or return_dict or any(value is not None for value in more.values()):
            return original(sample, timestep, encoder_hidden_states, return_dict=return_dict, **more)
        timestep = torch.as_tensor(timestep, device=sample.device)
        return (graphed(sample=sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
