"""The hook x' = OP(x) + tuner(x), and the layer that holds the tuners of one operation by name."""

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..tuners.base import Context
from ..tuners.vpt import VPT
from .operations import CHILD_NAME, Operation
from .peft_config import ResAttnConfig
from .sample_weights import per_sample_shape, tile_weights, to_device

INPUT_NAME = "_sdtune_input"  # what `keep_input` keeps in a block, for a bypass


class ParallelTuners(nn.Module, BaseTunerLayer):
    """The tuners of one operation, by adapter name, each with its weight; to diffusers an adapter layer of PEFT."""

    adapter_layer_names = ("tuners",)

    def __init__(self, operation: Operation):
        nn.Module.__init__(self)
        self.operation = operation
        self.tuners = nn.ModuleDict()
        self.weights: dict[str, float | torch.Tensor] = {}  # from set_adapters, or one weight per sample (B,)
        self.call_scales: dict[str, float] = {}  # from cross_attention_kwargs, for the length of one call
        self.unet_adapters: dict[str, PeftConfig] = {}  # the UNet's peft_config
        self.cast_input_dtype_enabled = True  # diffusers' layerwise casting switches it off
        self._active_adapter = []
        self._disable_adapters = False

    def _active_scales(self) -> dict[str, float | torch.Tensor]:
        """The active tuners of this operation, and their weights times the call's scale."""
        names = [] if self._disable_adapters else [n for n in self.active_adapters if n in self.tuners]
        return {n: self.weights.get(n, 0.0) * self.call_scales.get(n, 1.0) for n in names}

    def forward(
        self, x: torch.Tensor, text: torch.Tensor | None = None, output: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The weighted sum of the active tuners at x, (B, N, dim), or None where no tuner is active.

        Args:
            x: the input of the operation, (B, N, dim); for methods that change single layers the input of the layer.
            text: the operation's `encoder_hidden_states`, (B, L, text width), where it receives them.
            output: the operation's own result.
        """
        hooks = getattr(self.operation.module, "_diffusers_hook", None)
        if hooks is None:
            return self._sum(x, text, output)
        # diffusers moves and casts what is within a leaf layer for the layer's own forward alone, which is over by now
        group, cast = (hooks.get_hook(name) for name in ("group_offloading", "layerwise_casting"))
        if group:
            group.group.onload_()
        if cast:
            self.to(dtype=cast.compute_dtype)
        try:
            return self._sum(x, text, output)
        finally:
            if cast:
                self.to(dtype=cast.storage_dtype)
            if group:
                group.group.offload_()

    def _sum(self, x: torch.Tensor, text: torch.Tensor | None, output: torch.Tensor | None) -> torch.Tensor | None:
        total = None
        for name, scale in self._active_scales().items():
            if isinstance(self.tuners[name], VPT):
                continue  # its tokens are in the input already
            if isinstance(scale, torch.Tensor):
                part = self._run_per_sample(name, x, text, output, scale)
            elif scale == 0:
                continue
            else:
                part = self._run_tuner(name, x, text, output)
                part = part if scale == 1 else part * scale
            total = part if total is None or part is None else total + part
        return total

    def prompts(self) -> list[torch.Tensor]:
        """The trainable tokens, (length, dim), of the active VPT tuners of this block.

        Raises:
            ValueError: if one has a weight other than 0 and 1.
        """
        found = []
        for name, scale in self._active_scales().items():
            if isinstance(self.tuners[name], VPT):
                if isinstance(scale, torch.Tensor) or scale not in (0, 1):
                    raise ValueError(
                        f"the weight of {name!r} is {scale}; trainable tokens (vpt) are there or not: 0 or 1"
                    )
                found += [self.tuners[name].prompt] if scale else []
        return found

    def head(self, x: torch.Tensor) -> torch.Tensor | None:
        """The logits of the first active adapter's own head, or None where no active adapter has one."""
        for name, scale in self._active_scales().items():
            if isinstance(scale, torch.Tensor) or scale != 0:
                return self._run_tuner(name, x, None, None)
        return None

    def _run_tuner(
        self, name: str, x: torch.Tensor, text: torch.Tensor | None, output: torch.Tensor | None
    ) -> torch.Tensor:
        tuner = self.tuners[name]
        if self.operation.receives_chunks and not tuner.per_token:
            raise ValueError(
                f"the tuner {name!r} attends to all tokens, but its feed-forward receives them in chunks; chunk "
                "it along the batch, set_chunk_feed_forward(size, dim=0), or not at all, set_chunk_feed_forward(None)"
            )
        if not tuner.calls_base and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, next(tuner.parameters()).dtype)
            output = None if output is None else self._cast_input_dtype(output, x.dtype)
        inputs = tuple(block.__dict__[INPUT_NAME] for block in self.operation.blocks)
        return tuner(x, Context(self.operation.attention, text, output, inputs))

    def _run_per_sample(
        self, name: str, x: torch.Tensor, text: torch.Tensor | None, output: torch.Tensor | None, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Each sample's result times its own weight; samples of weight 0 are left out where that is possible."""
        weights = tile_weights(weights, len(x))
        rows = weights.nonzero()[:, 0]  # on the CPU, as the weights are, so that nothing waits for the GPU
        if not len(rows):
            return None
        if self.tuners[name].calls_base:  # a LoRA in the base may need the whole batch, too
            rows = torch.arange(len(x))
        weights, rows = to_device(weights[rows], x.device), to_device(rows, x.device)
        text, output = (None if t is None else t[rows] for t in (text, output))
        part = self._run_tuner(name, x[rows], text, output)
        part = (part * per_sample_shape(weights, part)).to(part.dtype)
        return part.new_zeros(len(x), *part.shape[1:]).index_copy(0, rows, part)

    # The methods that diffusers and PEFT call on every adapter layer.

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter not in self.tuners:
            return
        if self.call_scales.get(adapter) == 0:
            # diffusers cannot divide by a scale of 0 and sets the weight to 1 instead; only the call's scale is undone
            # here, so that the weight that the user has set survives
            self.call_scales[adapter] = 1.0
        else:
            self.weights[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            self.call_scales[name] = scale

    def unscale_layer(self, scale: float | None = None) -> None:
        self.call_scales.clear()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [n for n in adapter_names or self.active_adapters if n in self.tuners]
        if names and not self._disable_adapters:
            raise ValueError(cannot_fuse_message(names))

    def unmerge(self) -> None:
        pass  # nothing is ever merged

    def get_base_layer(self) -> None:
        """None, which `unload_lora_weights` of diffusers puts in the place of the adapter layer and so removes it."""
        return None

    base_layer = property(get_base_layer)

    @property
    def r(self) -> dict[str, int]:
        """One entry per LoRA of the whole UNet; diffusers numbers unnamed LoRAs by the length."""
        return {n: c.r for n, c in self.unet_adapters.items() if not isinstance(c, ResAttnConfig)}

    @property
    def lora_A(self) -> nn.ModuleDict:
        """The modules that diffusers' `set_lora_device` moves."""
        return self.tuners

    lora_B = lora_A

    def delete_adapter(self, adapter_name: str) -> None:
        if self.active_adapters == [adapter_name]:
            # PEFT activates a remaining adapter in each layer, in a LoRA layer its first LoRA; all layers must agree
            remaining = sorted(n for n in self.unet_adapters if n != adapter_name)
            self.set_adapter([n for n in remaining if n in self.r][:1] or remaining[:1])
        super().delete_adapter(adapter_name)
        self.weights.pop(adapter_name, None)
        self.call_scales.pop(adapter_name, None)


def cannot_fuse_message(names: list[str]) -> str:
    return (
        f"the tuner{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))} cannot be fused into the base's "
        "weights: a tuner's result depends on its input through its own attention or activation, so no change of "
        "the frozen weights equals it (a LoRA can be fused; a full fine-tuning is kept apart from them as well). "
        "Leave it attached, or deactivate it first with "
        'set_adapters(...), or fuse only LoRAs with fuse_lora(adapter_names=["..."])'
    )


def add_residual(op: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple):
    """The forward hook: x' = OP(x) + tuner(x), with OP's own input x.

    The attention of transformers returns a tuple, whose first part is OP(x).
    """
    layer = op._modules.get(CHILD_NAME)
    if layer is None:  # unload_lora_weights has removed the tuners
        return None
    if isinstance(output, tuple):
        first = add_residual(op, args, kwargs, output[0])
        return None if first is None else (first, *output[1:])
    x = args[0] if args else kwargs["hidden_states"]
    prompts = sum(len(p) for p in layer.prompts())
    if prompts:  # `insert_prompts` has put them behind the tokens
        x, output = x[:, :-prompts], output[:, :-prompts]
    position, text = layer.operation.text_position, None
    if position is not None:  # gradient checkpointing passes all by position
        text = kwargs.get("encoder_hidden_states", args[position] if len(args) > position else None)
        text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter passes (text, pictures)
    residual = layer(x, text, output)
    for block in layer.operation.blocks:  # the memory is free again
        block.__dict__.pop(INPUT_NAME, None)
    if residual is None:
        return output if prompts else None
    residual = residual.to(output.dtype)
    if torch.is_grad_enabled():
        return output + residual
    return output.add_(residual)  # in place: it saves a quarter of the time that a tuner costs


def insert_prompts(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The pre-hook of a block: puts the tokens of active VPT tuners behind the block's own, (B, N + length, dim)."""
    layer = block._modules.get(CHILD_NAME)
    prompts = layer.prompts() if layer is not None else []
    if not prompts:
        return None
    x = args[0] if args else kwargs["hidden_states"]
    x = torch.cat([x, *(p.to(x.dtype).expand(len(x), -1, -1) for p in prompts)], dim=1)
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})


def keep_input(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """The pre-hook of every block of a model with a bypass: keeps what the block receives until the last is done."""
    block.__dict__[INPUT_NAME] = (args[0] if args else kwargs["hidden_states"]).detach()


def replace_head(head: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
    """The forward hook of a classification head: the active adapter's head takes its place."""
    layer = head._modules.get(CHILD_NAME)
    return None if layer is None else layer.head(args[0])


def tuner_layers(unet) -> list[tuple[str, ParallelTuners]]:
    """The layer of tuners of every operation that has one, with the operation's path in the UNet without adapters."""
    found = ((n.removesuffix(f".{CHILD_NAME}"), m) for n, m in unet.named_modules() if isinstance(m, ParallelTuners))
    return [(n.replace(".base_layer", ""), m) for n, m in found]


def tuner_names(unet) -> list[str]:
    """The names of the tuners (not the LoRAs) attached to this UNet."""
    return [n for n, c in (getattr(unet, "peft_config", None) or {}).items() if isinstance(c, ResAttnConfig)]
