"""Bad tuner files and LoRA files, through `load_tuner` and through the page's list of files.

What loads is compared with the file by itself: a tuner's weights one by one, a LoRA's layers by the formula of its
kind. What is refused must leave the pipeline as it was. The page must offer exactly the files that load.
"""

import copy
import functools
import json
import pickle
import random
import struct
import warnings
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.nn import functional

import sdtune
from sdtune.adapters import api, tuner_file
from sdtune.page.files import AdapterFiles

from . import commands
from .cases import BYTE_MUTATIONS, Case, Failure, check_message, digest, truncate
from .pictures import HTML, Harmful


def predict(pipe) -> torch.Tensor:
    """What the UNet computes from fixed numbers."""
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=noise)
    text = torch.randn(1, 5, pipe.unet.config.cross_attention_dim, generator=noise)
    with torch.no_grad():
        return pipe.unet(latents, 500, text).sample


@functools.cache
def page_files() -> AdapterFiles:
    """The page's list of files; each case points it at its own folder."""
    base = commands.loaded_base()
    return AdapterFiles([], base.unet, base.text_encoder)


@functools.cache
def predicted_by_base() -> torch.Tensor:
    return predict(commands.loaded_base())


_clean: list = []  # a copy of the base that the last case has left as it was


def load_and_judge(path: Path, find_fault, is_offered_without_reading: bool = False) -> str:
    """Loads a file into a copy of the base, and compares what comes of it with the file and with the page.

    Args:
        find_fault: from (pipeline, warnings) to what is wrong; None where the file must be refused.
        is_offered_without_reading: whether the page may offer a file that is refused for the values of its weights,
            which it does not read before it draws.
    """
    pipe, before = _clean.pop() if _clean else copy.deepcopy(commands.loaded_base()), digest(path)
    page_files().folders = [path.parent]
    page_files().scan()
    listed = page_files().by_label
    fits = any(file.fits for file in listed.values())
    for file in listed.values():
        if not file.fits and "cannot be read" in file.problem:
            raise Failure(f"the page says only: {file.problem}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            sdtune.load_tuner(pipe, path, "x")
        except Exception as error:
            check_message(error, [path.name, str(path)])
            if getattr(pipe.unet, "peft_config", None) or pipe.get_list_adapters():
                raise Failure("the file was refused, and an adapter stayed in the pipeline") from None
            if not torch.equal(predict(pipe), predicted_by_base()):
                raise Failure("the file was refused, and the pipeline draws otherwise now") from None
            if fits and not is_offered_without_reading:
                raise Failure(f"the page offers what load_tuner refuses: {str(error)[:200]}") from None
            answer = f"refused: {' '.join(str(error).split())[:300]}"
            _clean.append(pipe)
        else:
            if find_fault is None:
                raise Failure("it was loaded, and nothing was said")
            if fault := find_fault(pipe, [str(w.message) for w in caught]):
                raise Failure(fault)
            if not fits and path.suffix == ".safetensors":
                raise Failure(f"the page refuses what load_tuner loads: {[f.problem for f in listed.values()]}")
            pipe.delete_adapters("x")
            if not torch.allclose(predict(pipe), predicted_by_base(), atol=1e-5):
                raise Failure("after it was deleted, the pipeline draws otherwise")
            answer = "right"
    if path.is_file() and digest(path) != before:
        raise Failure("the file was changed")
    return answer


def file_case(title: str, content: bytes, make_fault_finder, name: str = "file.safetensors", **options) -> Case:
    """A file with this content; `make_fault_finder` gets its path, and gives None where it must be refused."""

    def run(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return load_and_judge(folder / name, make_fault_finder(folder / name), **options)

    return Case(title, run)


def must_refuse(path: Path) -> None:
    return None


def rewrite_header(content: bytes, change) -> bytes:
    """A safetensors file with another header; `change` gets the header as a dict and may return bytes instead."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


# ---------------------------------------------------------------------------------------------------------- tuners


def compare_tuner(path: Path):
    """The check of a loaded tuner against its file; None if the file does not hold finite weights and a config."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["sdtune.tuner"])
        if not all(t.is_floating_point() and torch.isfinite(t.float()).all() for t in tensors.values()):
            return None
    except Exception:  # safetensors and json raise many kinds
        return None

    def find_fault(pipe, _told) -> str:
        own = api.tuner_parameters(pipe, "x")
        if {f"unet.{k}" for k in own} != tensors.keys():
            return "the loaded tuner has other weights than the file"
        if not all(torch.equal(p, tensors[f"unet.{k}"].to(p)) for k, p in own.items()):
            return "a loaded weight differs from the file's"
        own_config = vars(api.tuner_config(pipe, "x"))
        differ = {k: v for k, v in config.items() if own_config.get(k) != v}
        return f"the configuration differs from the file's: {differ}" if differ else ""

    return find_fault


def tuner_cases(seed: int) -> list[Case]:
    pipe = copy.deepcopy(commands.loaded_base())
    torch.manual_seed(seed)
    sdtune.add_tuner(pipe, sdtune.TunerConfig(rank=2, num_heads=2, ops=["attn1", "ff"]), "x")
    for p in api.tuner_parameters(pipe, "x").values():
        p.data.normal_(std=0.05)
    tensors = {f"unet.{k}": p.detach().half() for k, p in api.tuner_parameters(pipe, "x").items()}
    file = tuner_file.TunerFile(api.tuner_config(pipe, "x"), {}, {"name": "tiny-sd"})
    metadata = {
        "format": "pt", "sdtune.format_version": tuner_file.FORMAT_VERSION, "sdtune.base": json.dumps(file.base),
        "sdtune.tuner": json.dumps(vars(file.config)), "sdtune.training": "{}", "sdtune.versions": "{}",
    }  # fmt: skip
    sound, first = save(tensors, metadata), next(iter(tensors))
    cases = [file_case("tuner: unchanged", sound, compare_tuner)]
    rng = random.Random(f"{seed} tuner")
    for mutation in BYTE_MUTATIONS:
        for i in range(2):
            title = f"tuner: {mutation.__name__} {i + 1}"
            cases.append(file_case(title, mutation(sound, rng), compare_tuner))
    (length,) = struct.unpack("<Q", sound[:8])
    for mutation in BYTE_MUTATIONS[1:6]:  # the header is where a flaw can do most
        for i in range(2):
            header = mutation(sound[8 : 8 + length], rng)
            content = struct.pack("<Q", len(header)) + header + sound[8 + length :]
            cases.append(file_case(f"tuner: header, {mutation.__name__} {i + 1}", content, compare_tuner))
    changed_weights = {
        "NaN": {first: torch.full_like(tensors[first], float("nan"))},
        "infinity": {first: torch.full_like(tensors[first], float("inf"))},
        "whole numbers": {first: torch.ones_like(tensors[first], dtype=torch.int32)},
        "8-bit floats": {first: tensors[first].to(torch.float8_e4m3fn)},
        "complex numbers": {first: tensors[first].to(torch.complex64)},
        "truth values": {first: tensors[first] > 0},
        "another shape": {first: tensors[first][:1]},
        "one dimension more": {first: tensors[first][None]},
        "no elements": {first: tensors[first][:0]},
        "a tensor too many": {"unet.more": torch.ones(2)},
        "a key of another kind": {"more.weight": torch.ones(2)},
        "an empty key": {"": torch.ones(2)},
    }
    for title, change in changed_weights.items():
        cases.append(file_case(f"tuner: {title}", save(tensors | change, metadata), must_refuse))
    lacking = {k: t for k, t in tensors.items() if k != first}
    cases.append(file_case("tuner: a tensor is missing", save(lacking, metadata), must_refuse))
    cases.append(file_case("tuner: no tensors", save({}, metadata), must_refuse))
    config = vars(file.config)
    for title, value in (
        ("not JSON", "{"), ("a list", "[]"), ("nested 100,000 deep", "[" * 100_000), ("empty", "{}"), ("a text", '"a"'),
        ("an unknown kind", json.dumps(config | {"kind": "none"})), ("an unknown field", json.dumps(config | {"x": 1})),
        ("rank -1", json.dumps(config | {"rank": -1})), ("rank 1e12", json.dumps(config | {"rank": 10**12})),
        ("rank 1e30", json.dumps(config | {"rank": 10**30})), ("rank 'a'", json.dumps(config | {"rank": "a"})),
        ("rank 2.5", json.dumps(config | {"rank": 2.5})), ("rank true", json.dumps(config | {"rank": True})),
        ("rank null", json.dumps(config | {"rank": None})), ("rank NaN", json.dumps(config | {"rank": float("nan")})),
        ("heads 0", json.dumps(config | {"num_heads": 0})), ("ops null", json.dumps(config | {"ops": None})),
        ("ops a text", json.dumps(config | {"ops": "attn1"})), ("ops of numbers", json.dumps(config | {"ops": [1]})),
        ("no ops", json.dumps(config | {"ops": []})), ("ops nested", json.dumps(config | {"ops": [["attn1"]]})),
        ("ops twice", json.dumps(config | {"ops": ["attn1", "attn1", "ff"]})),
        ("dropout 'a'", json.dumps(config | {"attn_drop": "a"})), ("dropout 5", json.dumps(config | {"attn_drop": 5})),
        ("dropout NaN", json.dumps(config | {"attn_drop": float("nan")})),
        ("bias 'a'", json.dumps(config | {"qkv_bias": "a"})),
        ("the kind a list", json.dumps(config | {"kind": ["res_attn"]})),
        ("another kind", json.dumps(config | {"kind": "res_adapter"})),
        ("a LoRA", json.dumps(config | {"kind": "lora"})),
        ("an unknown kind in feed-forward", json.dumps(config | {"ffn_kind": "none"})),
    ):  # fmt: skip
        content = save(tensors, metadata | {"sdtune.tuner": value})
        cases.append(file_case(f"tuner: its configuration, {title}", content, must_refuse))
    for field in ("base", "training", "versions"):
        for value in ("{", "[]", "null", "5"):
            content = save(tensors, metadata | {f"sdtune.{field}": value})
            cases.append(file_case(f"tuner: metadata {field} is {value}", content, compare_tuner))
    for title, change in (
        ("version 2", {"sdtune.format_version": "2"}), ("no version", {"sdtune.format_version": ""}),
    ):  # fmt: skip
        cases.append(file_case(f"tuner: {title}", save(tensors, metadata | change), must_refuse))
    for title, content in (
        ("empty", b""), ("8 zeros", bytes(8)), ("a huge length of its header", b"\xff" * 8 + sound[8:]),
        ("a web page", HTML), ("a pickle", pickle.dumps(Harmful())), ("a zip", b"PK\x03\x04" + bytes(200)),
        ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("offsets beyond the end", rewrite_header(sound, lambda h: h[first]["data_offsets"].__setitem__(1, 10**15))),
        ("negative offsets", rewrite_header(sound, lambda h: h[first].update(data_offsets=[-4, 0]))),
        ("a dtype that is none", rewrite_header(sound, lambda h: h[first].update(dtype="F7"))),
        ("a negative shape", rewrite_header(sound, lambda h: h[first].update(shape=[-1, -1]))),
        ("a huge shape", rewrite_header(sound, lambda h: h[first].update(shape=[2**40, 2**40]))),
        ("metadata of numbers", rewrite_header(sound, lambda h: h["__metadata__"].update({"sdtune.tuner": 5}))),
        ("metadata a list", rewrite_header(sound, lambda h: h.update(__metadata__=[]))),
        ("a header of nothing", rewrite_header(sound, lambda h: b"")),
    ):  # fmt: skip
        cases.append(file_case(f"tuner: {title}", content, must_refuse))
    cases.append(file_case("tuner: a pickle named .bin", pickle.dumps(Harmful()), must_refuse, "file.bin"))
    return cases


# ----------------------------------------------------------------------------------------------------------- LoRAs


def lora_layers() -> dict[str, torch.Tensor]:
    """The weights of a few linear layers of the base, by path."""
    unet = commands.loaded_base().unet
    paths = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and ".attn" in n]
    return {path: unet.get_submodule(path).weight.detach() for path in paths[::9]}


PART_NAMES = {  # how each format names the two halves of a LoRA
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "PEFT": ("lora_A.weight", "lora_B.weight"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
}


def layer_key(form: str, path: str) -> str:
    return {"kohya": "lora_unet_" + path.replace(".", "_"), "PEFT": f"base_model.model.{path}",
            "diffusers": f"unet.{path}"}[form]  # fmt: skip


def make_lora(kind: str, form: str, seed) -> dict[str, torch.Tensor]:
    """A LoRA file's tensors for `lora_layers`, in the names of a format."""
    noise, tensors = torch.Generator().manual_seed(zlib.crc32(str(seed).encode())), {}

    def draw(*shape):
        return torch.randn(*shape, generator=noise) * 0.1

    for path, weight in lora_layers().items():
        out, into = weight.shape
        key, (down, up) = layer_key(form, path), PART_NAMES[form]
        if kind in ("LoRA", "DoRA"):
            tensors |= {f"{key}.{down}": draw(4, into), f"{key}.{up}": draw(out, 4)}
            if kind == "DoRA":
                tensors[f"{key}.dora_scale"] = weight.norm(dim=1, keepdim=True) * 1.2
        elif kind == "LoHa":
            tensors |= {f"{key}.hada_w{i}_a": draw(out, 4) for i in (1, 2)}
            tensors |= {f"{key}.hada_w{i}_b": draw(4, into) for i in (1, 2)}
        else:
            tensors |= {f"{key}.lokr_w1": draw(8, 8), f"{key}.lokr_w2_a": draw(out // 8, 4),
                        f"{key}.lokr_w2_b": draw(4, into // 8)}  # fmt: skip
        if form == "kohya":
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


def wanted_weight(weight: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The weight that a layer must have with these parts of a file; None if they make no whole layer."""
    if any(t.is_complex() for t in parts.values()):
        return None
    parts = {k: t.double() for k, t in parts.items()}
    if any(not torch.isfinite(t).all() for t in parts.values()):
        return None
    down = parts.get("lora_down.weight", parts.get("lora_A.weight"))
    up = parts.get("lora_up.weight", parts.get("lora_B.weight"))
    weight = weight.double()
    try:
        if down is not None or up is not None:
            change, rank = up @ down, len(down)
        elif "hada_w1_a" in parts:
            rank = len(parts["hada_w1_b"])
            change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        else:
            rank = len(parts["lokr_w2_b"])
            change = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
        if change.shape != weight.shape or not rank:
            return None
        alpha = parts["alpha"].item() if "alpha" in parts else rank
        result = weight + change * (alpha or rank) / rank  # kohya's tools take an alpha of 0 for the rank
        if "dora_scale" in parts:
            if parts["dora_scale"].shape not in ((len(weight), 1), (len(weight),)):
                return None
            result = result / result.norm(dim=1, keepdim=True) * parts["dora_scale"].reshape(-1, 1)
        return result.float()
    except (RuntimeError, KeyError, TypeError, ValueError):  # shapes that do not belong together, or a missing part
        return None


def compare_lora(form: str):
    """Gives, for a path, the check of a loaded LoRA against its file, or None where it must be refused."""

    def make(path: Path):
        try:
            tensors = load_file(path)
        except Exception:  # safetensors raises many kinds
            return None
        keys = {layer_key(form, p): p for p in lora_layers()}
        by_layer: dict[str, dict[str, torch.Tensor]] = {}
        unknown = 0
        for key, tensor in tensors.items():
            owner = next((k for k in keys if key.startswith(f"{k}.")), None)
            if owner is None:
                unknown += 1
            else:
                by_layer.setdefault(keys[owner], {})[key.removeprefix(f"{owner}.")] = tensor
        wanted = {p: wanted_weight(lora_layers()[p], parts) for p, parts in by_layer.items()}
        if not wanted or any(w is None for w in wanted.values()):
            return None

        def find_fault(pipe, told: list[str]) -> str:
            if unknown and not any("left out" in text for text in told):
                return "keys of the file were left out, and nothing was said"
            for layer_path, weight in lora_layers().items():
                layer = pipe.unet.get_submodule(layer_path)
                x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
                bias = commands.loaded_base().unet.get_submodule(layer_path).bias
                expected = functional.linear(x, wanted.get(layer_path, weight), bias)
                with torch.no_grad():
                    difference = (layer(x) - expected).abs().max()
                largest = functional.linear(x, weight, bias).abs().max()  # weights of zero are reached but for rounding
                if not difference < 2e-3 * torch.maximum(expected.abs().max(), 1e-3 * largest):
                    return f"{layer_path} differs by {difference:.4f} from the formula of the file"
            return ""

        return find_fault

    return make


def lora_cases(seed: int) -> list[Case]:
    cases = []
    kinds = [("LoRA", "kohya"), ("LoRA", "diffusers"), ("LoRA", "PEFT"), ("DoRA", "kohya"), ("LoHa", "kohya"),
             ("LoKr", "kohya")]  # fmt: skip
    for kind, form in kinds:
        tensors, rng = make_lora(kind, form, f"{seed} {kind}"), random.Random(f"{seed} {kind} {form}")
        sound, keys = save(tensors), sorted(tensors)
        first = keys[0].rsplit(".", 2 if keys[0].endswith(".weight") else 1)[0]
        own = [k for k in keys if k.startswith(f"{first}.")]
        matrix = next(k for k in own if tensors[k].ndim == 2)

        def add(title: str, content: bytes, kind=kind, form=form, **options) -> None:
            cases.append(file_case(f"LoRA file: {kind} of {form}, {title}", content, compare_lora(form), **options))

        add("unchanged", sound)
        add("truncated", truncate(sound, rng))
        (length,) = struct.unpack("<Q", sound[:8])
        for mutation in BYTE_MUTATIONS[1:3]:
            header = mutation(sound[8 : 8 + length], rng)
            add(f"header, {mutation.__name__}", struct.pack("<Q", len(header)) + header + sound[8 + length :])
        unread = {"is_offered_without_reading": True}
        for title, value in (("NaN", float("nan")), ("infinity", float("inf"))):
            add(title, save(tensors | {matrix: torch.full_like(tensors[matrix], value)}), **unread)
        add("in 16 bits", save({k: t.half() for k, t in tensors.items()}))
        add("in bfloat16", save({k: t.bfloat16() for k, t in tensors.items()}))
        add("a matrix of whole numbers", save(tensors | {matrix: tensors[matrix].mul(10).int()}))
        add("a matrix in 8 bits", save(tensors | {matrix: tensors[matrix].to(torch.float8_e4m3fn)}))
        add("a matrix of complex numbers", save(tensors | {matrix: tensors[matrix].to(torch.complex64)}))
        add("a matrix is missing", save({k: t for k, t in tensors.items() if k != matrix}))
        add("a matrix is one row short", save(tensors | {matrix: tensors[matrix][1:].clone()}))
        add("a matrix is one column short", save(tensors | {matrix: tensors[matrix][:, 1:].clone()}))
        add("a matrix is a vector", save(tensors | {matrix: tensors[matrix].flatten().clone()}))
        add("a matrix has no elements", save(tensors | {matrix: tensors[matrix][:0].clone()}))
        add("a matrix has four dimensions", save(tensors | {matrix: tensors[matrix][:, :, None, None].clone()}))
        add("a layer that no base has", save({k.replace(first, f"{first}_7"): t
                                             for k, t in tensors.items()}))  # fmt: skip
        add("an unknown part", save(tensors | {f"{first}.lora_mid.weight": torch.ones(4, 4)}))
        add("keys of nothing known", save({f"x{i}": t for i, t in enumerate(tensors.values())}))
        if form == "kohya":
            for title, alpha in (("0", torch.tensor(0.0)), ("NaN", torch.tensor(float("nan"))),
            ("-2", torch.tensor(-2.0)),
                                 ("a vector", torch.ones(4)), ("of one element", torch.tensor([2.0])),
                                 ("a whole number", torch.tensor(2)), ("1e30", torch.tensor(1e30)),
                                 ("without elements", torch.ones(0))):  # fmt: skip
                add(f"alpha is {title}", save(tensors | {f"{first}.alpha": alpha}), **unread)
            for title, extra in (("also OFT", f"{first}.oft_blocks"), ("also a full difference", f"{first}.diff"),
                                 ("also a difference of the bias", f"{first}.diff_b"),
                                 ("also (IA)^3", f"{first}.on_input"),
                                 ("also of SDXL", "lora_te2_x.lora_down.weight")):  # fmt: skip
                add(title, save(tensors | {extra: torch.ones(4, 4)}))
        if kind == "DoRA":
            scale = next(k for k in own if k.endswith("dora_scale"))
            for title, value in (("per input", tensors[matrix][:1].clone()), ("too short", tensors[scale][1:].clone()),
                                 ("missing in one layer", None), ("zero", torch.zeros_like(tensors[scale])),
                                 ("a vector", tensors[scale].flatten().clone())):  # fmt: skip
                changed = {k: t for k, t in tensors.items() if k != scale} | ({} if value is None else {scale: value})
                add(f"dora_scale is {title}", save(changed))
    return cases
