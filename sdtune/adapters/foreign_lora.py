"""LoRA files of other tools: what they hold, whether it fits a base, and how it is loaded.

Read are LoRA and DoRA in the formats of kohya and LyCORIS, diffusers (also the old one) and PEFT, LoHa and LoKr, and
PEFT's OFT. A file is applied exactly or refused by one TunerFileError; layers that the base lacks are told.
"""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.hooks.group_offloading import GroupOffloadingType
from peft import LoHaConfig, LoKrConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from . import foreign_oft, foreign_peft, lora
from .diffusers_guards import check_projections
from .tuner_file import TunerFileError, list_some

_PART = re.compile(
    r"[._]?(?P<part>lora_[AB](?:\.\w+)?|lora_(?:down|up|mid)|lora\.(?:down|up)|lora_linear_layer\.(?:down|up)|dora_scale|"
    r"lora_magnitude_vector(?:\.\w+)?|alpha|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_\w+|diff_?b?|"
    r"w_norm|b_norm|on_input|scale|[ab][12])(?:\.weight)?$"
)
_SAME = {"lora_down": "A", "lora.down": "A", "lora_linear_layer.down": "A", "lora_up": "B", "lora.up": "B",
         "lora_linear_layer.up": "B", "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"}  # fmt: skip
_PREFIXES = (("lora_unet_", "unet"), ("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder"),
             ("text_encoder.", "text_encoder"), ("unet.", "unet"), ("base_model.model.", "unet"))  # fmt: skip
_NOT_BY_LAYER = (
    "which draws nothing sensible where each layer is offloaded by itself; use pipe.enable_model_cpu_offload() in the "
    "place of enable_sequential_cpu_offload(), or group offloading of blocks in that of leaves"
)
_FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors names them
_OTHER_FAMILIES = {
    "Stable Diffusion XL": r"^(lora_te2_|text_encoder_2\.)",
    "Flux or Stable Diffusion 3": r"^(transformer\.|lora_transformer_|lora_unet_(double|single)_blocks|lora_te3_)",
    "a video or DiT model": r"^diffusion_model\.(?!(input|output)_blocks|middle_block)",
}


@dataclass
class ForeignLora:
    """What a file holds for a base. `layers` maps "unet" or "text_encoder" -> layer path -> part -> key in the file."""

    path: Path
    kind: str
    is_peft: bool
    layers: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # layers that the base lacks
    rank: int = 0
    oft: dict = field(default_factory=dict)  # of an OFT, what `foreign_oft.read_config` returns
    settings: dict | None = None  # by model, what `foreign_peft.read_settings` returns

    @property
    def count(self) -> int:
        return sum(map(len, self.layers.values()))

    def left_out(self) -> str:
        """A sentence about the layers that are left out; empty if there are none."""
        if not self.unknown:
            return ""
        total = self.count + len(self.unknown)
        names = list_some(self.unknown)
        return f"{len(self.unknown)} of its {total} layers are not in this base and are left out: {names}"


def inspect(path: Path, unet, text_encoder=None) -> ForeignLora:
    """Reads the keys and shapes of a file and compares them with a base; the page and `load` decide by this alone.

    Args:
        text_encoder: None leaves the layers of text encoders unchecked.

    Raises:
        TunerFileError: if the format is not read, or the layers do not fit this base.
    """
    try:
        with safe_open(path, framework="pt") as f:
            slices = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118
            shapes = {k: tuple(s.get_shape()) for k, s in slices.items()}
            odd_kinds = {k: s.get_dtype() for k, s in slices.items() if s.get_dtype() not in _FLOATS}
    except (SafetensorError, OSError) as error:
        raise TunerFileError(f"{path} is not a whole safetensors file ({error})") from error
    for family, pattern in _OTHER_FAMILIES.items():
        if any(re.search(pattern, k) for k in shapes):
            raise TunerFileError(
                f"{path} is a LoRA for {family}, which this base is not; use it with a base of that kind"
            )
    wrong = [f"{k} ({d})" for k, d in odd_kinds.items() if not k.endswith(("alpha", "on_input"))]
    wrong += [f"{k} (no elements)" for k, shape in shapes.items() if not _count(shape)]
    wrong += [f"{k} ({_count(shapes[k])} values)" for k in shapes if k.endswith("alpha") and _count(shapes[k]) > 1]
    if wrong:
        raise TunerFileError(
            f"{path} holds tensors that a LoRA cannot have: {list_some(wrong)}; expected weights of 16, 32 or 64 bit "
            "floats and one alpha for each layer; get the file again, or convert it with the tool that made it"
        )
    known = {"unet": _modules(unet), "text_encoder": None if text_encoder is None else _modules(text_encoder)}
    found = ForeignLora(path, "LoRA", any(k.startswith("base_model.model.") for k in shapes))
    parts_seen, odd, unknown = set(), [], {}
    for key in shapes:
        model, layer, part = _split(key)
        if part is None:
            odd.append(key)
            continue
        parts_seen.add(part)
        if part == "alpha" and layer is None:
            continue
        real = layer if known[model] is None else known[model].get(_plain(layer), (None,))[0]
        if real is None:
            unknown.setdefault(layer, None)
        else:
            first = found.layers.setdefault(model, {}).setdefault(real, {}).setdefault(part, key)
            if first != key:
                raise TunerFileError(
                    f"{path} holds the layer {real} twice, in {first} and {key}; expected one LoRA in a file"
                )
    found.unknown = list(unknown)
    found.kind = _kind(path, parts_seen, odd, shapes)
    if not found.count:
        raise TunerFileError(
            f"{path} is a {found.kind} that does not fit this base: none of its {len(unknown)} layers is in it "
            f"(such as {list_some(list(unknown), 2)}); use the base that it was made for"
        )
    if found.kind == "OFT":
        found.oft = foreign_oft.read_config(path)
    else:
        found.settings = foreign_peft.read_settings(path, found.kind, found.is_peft, found.layers)
    _check_shapes(found, shapes, known)
    return found


def _modules(model) -> dict[str, tuple[str, nn.Module]]:
    """The linear layers and convolutions of a model, by their path as kohya writes it: (path, layer)."""
    ours = re.compile(r"\.(lora_|res_tuner)|_tuners?\.")
    layers = (
        (n.replace(".base_layer", ""), m)
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and not ours.search(n)
    )
    return {_plain(n): (n, m) for n, m in layers}


def _plain(path: str) -> str:
    path = path.replace(".", "_").removeprefix("text_model_")
    return re.sub(r"_to_out$", "_to_out_0", path.replace("_processor", ""))


def _split(key: str) -> tuple[str, str | None, str | None]:
    """The model, layer and part of a key; part None if it is none that is known."""
    model, rest = "unet", key
    for prefix, of in _PREFIXES:
        if key.startswith(prefix):
            model, rest = of, key.removeprefix(prefix)
            if rest.startswith("unet."):
                rest = rest.removeprefix("unet.")
            elif rest.startswith("text_encoder."):
                model, rest = "text_encoder", rest.removeprefix("text_encoder.")
            break
    match = _PART.search(rest)
    if not match:
        return model, None, None
    part = match["part"]
    if part.startswith(("lora_A", "lora_B")):
        if part.endswith(".bias"):
            return model, None, None
        part = part[5]
    elif part.startswith("lora_magnitude_vector"):
        part = "magnitude"
    layer = rest[: match.start()].removesuffix("_lora")
    return model, layer, _SAME.get(part, part)


def _kind(path: Path, parts: set[str], odd: list[str], shapes: dict) -> str:
    names = {"a LoCon with lora_mid": "lora_mid", "LoHa": "hada_", "LoKr": "lokr_", "OFT": "oft_",
             "full difference": "diff", "norm": ("w_norm", "b_norm"),
             "(IA)^3": "on_input", "GLoRA": ("a1", "a2", "b1", "b2")}  # fmt: skip
    kinds = [name for name, start in names.items() if any(p.startswith(start) for p in parts)]
    if {"A", "B"} & parts:
        kinds.append("DoRA" if "magnitude" in parts else "LoRA")
    elif "magnitude" in parts:
        kinds.append("weight decomposition")
    is_read = kinds in (["LoRA"], ["DoRA"], ["LoHa"], ["LoKr"]) or kinds == ["OFT"] and parts == {"oft_R"}
    if not is_read:
        what = " and ".join(kinds) or f"keys such as {list_some(odd or list(shapes), 2)}"
        if kinds == ["OFT"]:
            what = "OFT of LyCORIS, kohya or an old PEFT (today's PEFT rotates the inputs of a layer, not the outputs)"
        raise TunerFileError(
            f"{path} holds {what}, which is not read; LoRA, DoRA, LoHa, LoKr or PEFT's OFT are, one of them in a file. "
            "Convert it to a LoRA with the tool that made it"
        )
    if odd:
        raise TunerFileError(f"{path} is a {kinds[0]} with {len(odd)} keys of an unknown format: {list_some(odd)}")
    return kinds[0]


def _check_shapes(found: ForeignLora, shapes: dict, known: dict) -> None:
    """Raises a TunerFileError for layers whose parts are incomplete or of another shape than the base's layer."""
    wrong = []
    for model, layers in found.layers.items():
        for path, parts in layers.items():
            module = known[model][_plain(path)][1] if known[model] is not None else None
            wide = None if module is None else tuple(module.weight.shape)
            if found.kind in ("LoRA", "DoRA"):
                flat = [
                    p
                    for p in ("A", "B")
                    if p in parts and len(shapes[parts[p]]) not in ((len(wide),) if wide else (2, 4))
                ]
                if flat:
                    wrong.append(f"{path} has a matrix of {len(shapes[parts[flat[0]]])} dimensions")
                    continue
                if wide and "A" in parts and shapes[parts["A"]][1:2] != wide[1:2]:
                    wrong.append(f"the input of {path} is {shapes[parts['A']][1]} wide, this base's is {wide[1]}")
                    continue
                if not {"A", "B"} <= parts.keys():
                    wrong.append(f"{path} has only {' and '.join(sorted(parts))}")
                    continue
                down, up = shapes[parts["A"]], shapes[parts["B"]]
                found.rank = max(found.rank, down[0])
                if up[1:2] != down[:1]:
                    wrong.append(f"{path} has a rank of {down[0]} in one matrix and of {up[1]} in the other")
                elif wide and down[2:] != wide[2:]:
                    wrong.append(f"{path} has kernels of {list(down[2:])}, this base's are {list(wide[2:])}")
                elif wide and (down[1:2] != wide[1:2] or up[:1] != wide[:1]):
                    wrong.append(f"{path} is {down[1]} to {up[0]} wide, this base's is {wide[1]} to {wide[0]}")
                if found.kind == "DoRA" and "magnitude" not in parts:
                    wrong.append(f"{path} has no dora_scale")
                elif found.kind == "DoRA" and wide and not _is_per_output(shapes[parts["magnitude"]], wide):
                    wrong.append(
                        f"the dora_scale of {path} has the shape {list(shapes[parts['magnitude']])}, not one number "
                        "for each output; one for each input (wd_on_out=False) PEFT has not"
                    )
            elif found.kind == "OFT":
                wrong += [
                    f"{path} {problem}"
                    for problem in foreign_oft.find_problems(shapes[parts["oft_R"]], wide, found.oft)
                ]
            elif found.kind == "LoHa":
                need = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
                if not need <= parts.keys():
                    wrong.append(f"{path} lacks {', '.join(sorted(need - parts.keys()))}")
                    continue
                found.rank = max(found.rank, shapes[parts["hada_w1_b"]][0])
                factors = {_loha_factor(shapes, parts, w, wide) for w in "12"}
                factor = factors.pop() if len(factors) == 1 else None
                if not factor or wide and (factor[0], _count(factor)) != (wide[0], _count(wide)):
                    wrong.append(f"{path} has parts that make no matrix of this base's layer")
            else:
                if not ({"lokr_w1"} <= parts.keys() or {"lokr_w1_a", "lokr_w1_b"} <= parts.keys()) or not (
                    {"lokr_w2"} <= parts.keys() or {"lokr_w2_a", "lokr_w2_b"} <= parts.keys()
                ):
                    wrong.append(f"{path} has only {', '.join(sorted(parts))}")
                    continue
                found.rank = max([found.rank, *(shapes[parts[p]][0] for p in ("lokr_w1_b", "lokr_w2_b") if p in parts)])
                made = _lokr_shape(shapes, parts)
                if "lokr_t2" not in parts and (
                    made is None or wide and (made[0], _count(made)) != (wide[0], _count(wide))
                ):
                    wrong.append(f"{path} has parts that make no matrix of this base's layer")
            if found.kind in ("LoHa", "LoKr") and "magnitude" in parts:
                wrong.append(f"{path} has a dora_scale, which PEFT has only for LoRA")
    if wrong:
        raise TunerFileError(
            f"{found.path} is a {found.kind} that does not fit this base: {len(wrong)} of its {found.count} layers: "
            f"{list_some(wrong, 2)}; use the base that it was made for"
        )


def _loha_factor(shapes: dict, parts: dict[str, str], number: str, wide: tuple | None) -> tuple[int, ...] | None:
    """The shape of one of LoHa's two factors, a product of two matrices, with a core between them for a kernel; None if
    they do not fit each other."""
    a, b = (shapes[parts[f"hada_w{number}_{side}"]] for side in "ab")
    core = shapes[parts[f"hada_t{number}"]] if f"hada_t{number}" in parts else None
    if len(a) != 2 or len(b) != 2:
        return None
    if core is None:
        return (a[0], b[1]) if a[1] == b[0] else None
    fits = core[:2] == (a[0], b[0]) and (wide is None or core[2:] == wide[2:])
    return (a[1], b[1], *core[2:]) if fits else None


def _lokr_shape(shapes: dict, parts: dict[str, str]) -> tuple[int, ...] | None:
    """The shape of the Kronecker product of LoKr's two factors, the second of which may be a kernel; None if a factor
    has parts that do not fit each other."""
    first, second = (_lokr_factor(shapes, parts, f"lokr_{w}") for w in ("w1", "w2"))
    if first is None or second is None or len(first) != 2:
        return None
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _lokr_factor(shapes: dict, parts: dict[str, str], name: str) -> tuple[int, ...] | None:
    """The shape of a LoKr's factor, which is stored whole or as a product of two matrices; None if they do not fit."""
    if name in parts:
        return shapes[parts[name]] if len(shapes[parts[name]]) in (2, 4) else None
    a, b = shapes[parts[f"{name}_a"]], shapes[parts[f"{name}_b"]]
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else None


def _is_per_output(shape: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    """Whether a DoRA's magnitudes belong to the outputs of a layer of this shape.

    That is (out,); for a linear layer also (out, 1), for a convolution (out, 1, 1, 1) and PEFT's (1, out, 1, 1).
    """
    out, ones = wide[0], (1,) * (len(wide) - 1)
    return shape in ((out,), (out, *ones)) or len(wide) == 4 and shape == (1, out, 1, 1)


def _has_rank(parts: dict[str, str]) -> bool:
    return not {"lokr_w1", "lokr_w2"} <= parts.keys()


def _count(shape) -> int:
    return int(torch.Size(shape).numel())


def load(pipe, path: Path, name: str) -> None:
    """Loads a file into a pipeline as adapter `name`.

    Raises:
        TunerFileError: as `inspect`, if a weight is not finite, or if an alpha is beyond
            `foreign_peft.MAX_ALPHA`.
    """
    text_encoder = getattr(pipe, "text_encoder", None)
    found = inspect(path, pipe.unet, text_encoder)
    if text_encoder is None:
        found.unknown += found.layers.pop("text_encoder", {})
    if not found.layers:
        raise TunerFileError(f"{path} is a {found.kind} for a text encoder alone, and this pipeline has none")
    tensors = load_file(path)
    bad = [k for k, t in tensors.items() if not torch.isfinite(t.float()).all()]
    if bad:
        raise TunerFileError(
            f"{path} is a {found.kind} of which {len(bad)} of {len(tensors)} tensors hold NaN or infinity: "
            f"{list_some(bad)}; it is damaged, get it again or train it with a lower rate"
        )
    # without low-rank matrices the alpha of a LoKr means nothing, and LyCORIS writes what the user has given
    alphas = [p["alpha"] for layers in found.layers.values() for p in layers.values() if "alpha" in p and _has_rank(p)]
    huge = [f"{k} ({tensors[k].item():g})" for k in alphas if tensors[k].abs().item() > foreign_peft.MAX_ALPHA]
    if huge:
        raise TunerFileError(
            f"{path} is a {found.kind} with {list_some(huge)}; an alpha is a number near the rank, at most "
            f"{foreign_peft.MAX_ALPHA:,}: the file is damaged, get it again"
        )
    try:
        check_projections(pipe.unet, found.layers.get("unet", {}))
    except ValueError as error:
        raise TunerFileError(f"{path} cannot be loaded: {error}") from error
    if found.settings is None and found.kind != "OFT":
        warnings.warn(f"{path}: there is no adapter_config.json beside it, so its alpha is taken to be its rank",
                      stacklevel=4)  # fmt: skip
    models = [getattr(pipe, model) for model in found.layers]
    if found.kind in ("LoHa", "LoKr", "OFT") and any(map(_is_offloaded_by_layer, models)):
        raise TunerFileError(f"{path} is a {found.kind}, {_NOT_BY_LAYER}")
    if found.kind in ("LoHa", "LoKr"):
        _load_lycoris(pipe, found, tensors, name)
    elif found.kind == "OFT":
        for model, layers in found.layers.items():
            weights = {path: tensors[parts["oft_R"]] for path, parts in layers.items()}
            foreign_oft.add(getattr(pipe, model), name, found.oft, weights)
    else:
        pipe.load_lora_weights(_peft_tensors(found, tensors), adapter_name=name)
    if told := found.left_out():
        warnings.warn(f"{path}: {told}", stacklevel=4)


def _peft_tensors(found: ForeignLora, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The known layers of a LoRA or DoRA in diffusers' format, with alpha / rank multiplied into B.

    diffusers (0.42) itself applies the alpha that most layers have to all of them.
    """
    result = {}
    for model, layers in found.layers.items():
        for path, parts in layers.items():
            down, up = tensors[parts["A"]], tensors[parts["B"]]
            config = (found.settings or {}).get(model)
            own = foreign_peft.scale_of(config, found.kind, path, len(down)) if config else 1.0
            if "alpha" in parts:
                # the tools of kohya and LyCORIS take an alpha of 0 for the rank
                own = (tensors[parts["alpha"]].item() or len(down)) / len(down)
            result[f"{model}.{path}.lora_A.weight"] = down
            result[f"{model}.{path}.lora_B.weight"] = up if own == 1 else up.float() * own
            if "magnitude" in parts:
                magnitude = tensors[parts["magnitude"]].flatten()
                if down.ndim == 4:
                    magnitude = magnitude.view(1, -1, 1, 1)
                result[f"{model}.{path}.lora_magnitude_vector"] = magnitude
    return result


def _load_lycoris(pipe, found: ForeignLora, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Adds PEFT's LoHa or LoKr layers and gives them the weights, rank and alpha of the file."""
    config_class = LoHaConfig if found.kind == "LoHa" else LoKrConfig
    for model_name, layers in found.layers.items():
        model = getattr(pipe, model_name)
        model.add_adapter(config_class(r=1, alpha=1, target_modules=list(layers)), adapter_name=name)
        lora.show_groups(model)
        config = (found.settings or {}).get(model_name)
        added = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        for path, parts in layers.items():
            layer = added[path]
            weight = layer.get_base_layer().weight
            for part in layer.adapter_layer_names:
                if name in getattr(layer, part):
                    del getattr(layer, part)[name]
            for part, key in parts.items():
                if part != "alpha":
                    value = tensors[key].to(weight.device, weight.dtype)
                    getattr(layer, part)[name] = nn.Parameter(value, requires_grad=False)
            ranks = [len(tensors[parts[p]]) for p in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b") if p in parts]
            rank = ranks[0] if ranks else 1
            alpha = (tensors[parts["alpha"]].item() if "alpha" in parts and ranks else rank) or rank
            if config and "alpha" not in parts:
                alpha = rank * foreign_peft.scale_of(config, found.kind, path, rank)
            layer.r[name], layer.alpha[name], layer.scaling[name] = rank, alpha, alpha / rank
            layer.register_forward_pre_hook(_check_device)


def _is_offloaded_by_layer(model: nn.Module) -> bool:
    hooks = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    groups = (hook.get_hook("group_offloading") for hook in hooks if hook)
    is_leaf = any(group and group.config.offload_type == GroupOffloadingType.LEAF_LEVEL for group in groups)
    return is_leaf or any(p.is_meta for p in model.parameters())


def _check_device(layer: BaseTunerLayer, args: tuple) -> None:
    """The pre-hook of a LoHa or LoKr layer: raises a ValueError where offloading has left its weights elsewhere."""
    for part in layer.adapter_layer_names:
        for name, weight in getattr(layer, part).items():
            if name in layer.active_adapters and weight.device != args[0].device:
                raise ValueError(f"the adapter {name!r} is a LoHa or LoKr, {_NOT_BY_LAYER}")
