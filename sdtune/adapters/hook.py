"""The hook x' = OP(x) + tuner(x), and the layer that holds the tuners of one operation by name."""

from dataclasses import dataclass, field, fields

import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..tuners.base import Context
from ..tuners.config import TunerConfig
from .operations import CHILD_NAME, Operation
from .sample_weights import per_sample_shape, tile_weights, to_device

PEFT_TYPE = "SDTUNE"  # the name of tuners among PEFT's methods


@dataclass
class TunerPeftConfig(PeftConfig):
    """The entry of a tuner in `unet.peft_config`: the fields of `TunerConfig`, as a configuration of PEFT.

    `peft_model` registers it with PEFT, so that `peft.get_peft_model(unet, TunerPeftConfig(rank=8))` adds a tuner.
    """

    kind: str = "res_attn"
    rank: int = 4
    num_heads: int = 4
    ops: list[str] = field(default_factory=lambda: TunerConfig().ops)
    qkv_bias: bool = False
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    length: int = 10
    ffn_kind: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.tuner  # noqa: B018  raises ValueError for fields out of range

    @property
    def tuner(self) -> TunerConfig:
        return TunerConfig(**{f.name: getattr(self, f.name) for f in fields(TunerConfig)})


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

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor | None:
        """The weighted sum of the active tuners at x, (B, N, dim), or None where no tuner is active.

        Args:
            x: the input of the operation, (B, N, dim); for full fine-tuning the input of the layer.
            text: the operation's `encoder_hidden_states`, (B, L, text width), where it receives them.
        """
        total = None
        for name in [] if self._disable_adapters else self.active_adapters:
            scale = self.weights.get(name, 0.0) * self.call_scales.get(name, 1.0)
            if name not in self.tuners:
                continue
            if isinstance(scale, torch.Tensor):
                part = self._run_per_sample(name, x, text, scale)
            elif scale == 0:
                continue
            else:
                part = self._run_tuner(name, x, text)
                part = part if scale == 1 else part * scale
            total = part if total is None or part is None else total + part
        return total

    def _run_tuner(self, name: str, x: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        tuner, block = self.tuners[name], self.operation.block
        chunked = self.operation.name == "ff" and block._chunk_size is not None and block._chunk_dim == 1
        if chunked and not tuner.per_token:
            raise ValueError(
                f"the tuner {name!r} attends to all tokens, but its feed-forward receives them in chunks; chunk "
                "it along the batch, set_chunk_feed_forward(size, dim=0), or not at all, set_chunk_feed_forward(None)"
            )
        if not tuner.calls_base and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, next(tuner.parameters()).dtype)
        return tuner(x, Context(self.operation.attention, text))

    def _run_per_sample(self, name: str, x: torch.Tensor, text: torch.Tensor | None, weights: torch.Tensor):
        """Each sample's result times its own weight; samples of weight 0 are left out where that is possible."""
        weights = tile_weights(weights, len(x))
        rows = weights.nonzero()[:, 0]  # on the CPU, as the weights are, so that nothing waits for the GPU
        if not len(rows):
            return None
        if self.tuners[name].calls_base:  # a LoRA in the base may need the whole batch, too
            rows = torch.arange(len(x))
        weights, rows = to_device(weights[rows], x.device), to_device(rows, x.device)
        part = self._run_tuner(name, x[rows], None if text is None else text[rows])
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
        return {n: c.r for n, c in self.unet_adapters.items() if not isinstance(c, TunerPeftConfig)}

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


def add_residual(op: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
    """The forward hook: x' = OP(x) + tuner(x), with OP's own input x."""
    layer = op._modules.get(CHILD_NAME)
    if layer is None:  # unload_lora_weights has removed the tuners
        return None
    x = args[0] if args else kwargs["hidden_states"]
    position = 2 if isinstance(op, BasicTransformerBlock) else 1  # gradient checkpointing passes all by position
    text = kwargs.get("encoder_hidden_states", args[position] if len(args) > position else None)
    residual = layer(x, text[0] if isinstance(text, tuple) else text)  # an IP-Adapter passes (text, pictures)
    if residual is None:
        return None
    residual = residual.to(output.dtype)
    if torch.is_grad_enabled():
        return output + residual
    return output.add_(residual)  # in place: it saves a quarter of the time that a tuner costs


def tuner_layers(unet) -> list[tuple[str, ParallelTuners]]:
    """The layer of tuners of every operation that has one, with the operation's path in the UNet without adapters."""
    found = ((n.removesuffix(f".{CHILD_NAME}"), m) for n, m in unet.named_modules() if isinstance(m, ParallelTuners))
    return [(n.replace(".base_layer", ""), m) for n, m in found]


def tuner_names(unet) -> list[str]:
    """The names of the tuners (not the LoRAs) attached to this UNet."""
    return [n for n, c in (getattr(unet, "peft_config", None) or {}).items() if isinstance(c, TunerPeftConfig)]
