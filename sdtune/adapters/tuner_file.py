"""The tuner file: safetensors with the tuner's weights only, and metadata that says how to load it.

`save` and `load` are a pair: what one writes the other reads with no flags. Keys are "unet.<op path>.<parameter>", and
for a vision model "<op path>.<parameter>", with those of its classification head.
Those of a LoRA are kohya's, "lora_unet_<layer path>.lora_down.weight", which diffusers, ComfyUI, Forge, AUTOMATIC1111
and InvokeAI read. A DoRA keeps PEFT's keys, since diffusers reads no other DoRA exactly. The metadata holds the format
version, the tuner's configuration, the base's name and shape, trigger words, training settings and library versions as
JSON, and the keys of ModelSpec (https://github.com/Stability-AI/ModelSpec), which other programs show.
"""

import datetime
import functools
import hashlib
import json
import re
import warnings
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..tuners.config import TunerConfig
from . import disk

FORMAT_VERSION = "1"
FILE_NAME = "tuner.safetensors"
LORA_FILE_NAME = "pytorch_lora_weights.safetensors"  # where diffusers looks for a LoRA in a hub repository
FILE_NAMES = (FILE_NAME, LORA_FILE_NAME)  # what a folder or repository is searched for
PEFT_FILE_NAME = "adapter_model.safetensors"  # PEFT's copy of the weights beside a tuner or LoRA of sdtune
_HASH = "modelspec.hash_sha256"
_GIVEN = ("author", "license", "thumbnail")  # fields of TunerFile that are keys of ModelSpec
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TunerFileError(ValueError):
    """A tuner file that cannot be used; the message names the file, what was found and what was expected."""


@dataclass
class TunerFile:
    """What a tuner file holds.

    Attributes:
        config: the tuner.
        tensors: "<op path>.<parameter>" -> weights on the CPU.
        base: `name` of the base it was trained on and its `shape` (configuration values that matter); `family`, "vit"
            for example, where it is a vision model and no UNet.
        trigger_words: words that every training caption began with.
        training: the settings of the run that made it; empty where none did.
        author, license: of the weights, as the user has given them.
        thumbnail: a small picture that the tuner has drawn, as a data URL (data:image/jpeg;base64,...).
        versions: the libraries that wrote it.
        labels: the names of the classes of a vision model's head.
    """

    config: TunerConfig
    tensors: dict[str, torch.Tensor]
    base: dict = field(default_factory=dict)
    trigger_words: str = ""
    training: dict = field(default_factory=dict)
    author: str = ""
    license: str = ""
    thumbnail: str = ""
    versions: dict = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)

    @property
    def clip_skip(self) -> int | None:
        """The clip skip that it was trained with, as AUTOMATIC1111 counts (1 is the last layer); None if unknown."""
        value = self.training.get("clip_skip", 1)
        return value if self.training and type(value) is int and value >= 1 else None


def write_text(path: Path, text: str) -> None:
    """Writes a text file and the folders to it, atomically, also when several processes write it."""
    disk.write_bytes(path, text.encode("utf-8"))


@functools.cache
def library_versions() -> dict[str, str]:
    found = {}
    for name in ("sdtune", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def save(path: str | Path, file: TunerFile, dtype: torch.dtype = torch.float16) -> Path:
    """Writes a tuner file, atomically: a reader sees the old file or the whole new one, never a part.

    Args:
        path: the file to write, ending in .safetensors, or a folder (made if need be) to hold `tuner.safetensors`.
        dtype: of the weights in the file.

    Returns:
        The path of the file.

    Raises:
        ValueError: if a weight is not finite, or too large for `dtype`, or that cannot be loaded; nothing is written
            then.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"dtype is {dtype}; a tuner file has weights of {', '.join(map(str, _FLOATS))}")
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        path = path / FILE_NAME
    tensors = {k: t.detach().to("cpu", dtype).contiguous() for k, t in file.tensors.items()}
    family = file.base.get("family")
    if not family:
        lora = file.config.kind == "lora"
        tensors = kohya_tensors(tensors) if lora else {f"unet.{k}": t for k, t in tensors.items()}
    bad = [k for k, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise ValueError(
            f"{path} was not written: {len(bad)} of {len(tensors)} tensors hold NaN, infinity or values too large "
            f"for {dtype}, the first is {bad[0]}"
        )
    base_name = file.base.get("name", "unknown base")
    kind = "+".join(filter(None, (file.config.kind, file.config.ffn_kind)))
    training = file.training
    resolution = training.get("resolution")
    metadata = {
        "format": "pt",
        "sdtune.format_version": FORMAT_VERSION,
        "sdtune.tuner": json.dumps(asdict(file.config)),
        "sdtune.base": json.dumps(file.base),
        "sdtune.trigger_words": file.trigger_words,
        "sdtune.training": json.dumps(training),
        "sdtune.versions": json.dumps(library_versions()),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family or _architecture(file.base)}/{kind.replace('_', '-')}",
        "modelspec.implementation": "sdtune",
        "modelspec.title": training.get("title") or f"{kind} tuner for {base_name}",
        "modelspec.description": f"A {kind} tuner for {base_name}; load it with sdtune.load_tuner",
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if family:
        metadata["sdtune.labels"] = json.dumps(file.labels)
    else:
        metadata["modelspec.prediction_type"] = "v" if _predicts_v(file.base) else "epsilon"
    if file.clip_skip:
        metadata["ss_clip_skip"] = str(file.clip_skip)  # kohya's key, which other programs read
    if resolution:
        metadata["modelspec.resolution"] = f"{resolution}x{resolution}"
    given = {"trigger_phrase": file.trigger_words, **{name: getattr(file, name) for name in _GIVEN}}
    metadata |= {f"modelspec.{name}": text for name, text in given.items() if text}
    write_tensors(path, tensors, metadata)
    return path


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, atomically, and adds ModelSpec's hash of the tensors to its metadata."""
    unknown = f"0x{'0' * 64}"
    with disk.new_file(path) as part:
        part.touch()
        mode = part.stat().st_mode  # what the user's umask gives; save_file would make it private
        save_file(tensors, part, metadata=metadata | {_HASH: unknown})
        part.chmod(mode)
        # the order of the tensors in the file is safetensors' own, so their hash is known only now
        found = _hash_tensors(part)
        with open(part, "r+b") as f:
            header = f.read(8 + int.from_bytes(f.read(8), "little"))
            f.seek(8 + header.index(unknown.encode()))
            f.write(found.encode())


def _hash_tensors(path: Path) -> str:
    """The SHA-256 of all bytes of a safetensors file after its header, as ModelSpec wants it."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        f.seek(int.from_bytes(f.read(8), "little"), 1)
        while part := f.read(1 << 22):
            digest.update(part)
    return f"0x{digest.hexdigest()}"


def _predicts_v(base: dict) -> bool:
    return base.get("prediction_type") == "v_prediction"


def _architecture(base: dict) -> str:
    """The base's family in the words of modelspec: SD 2.x has a text encoder of width 1024."""
    shape = base.get("shape")
    if not isinstance(shape, dict) or shape.get("cross_attention_dim") != 1024:
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if _predicts_v(base) else "stable-diffusion-v2-512"


def load(source: str | Path, weight_name: str = FILE_NAME, **hub) -> TunerFile:
    """Reads a tuner file.

    Args:
        source: a .safetensors file, a folder with one, or the id of a hub repository.
        weight_name: the file's name inside a folder or repository.
        hub: passed to `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, ...).

    Raises:
        TunerFileError: if there is no such file, or it is not a tuner file of a known version.
    """
    path = find(source, weight_name, **hub)
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            keys = list(f.keys())
            found = metadata.get("sdtune.format_version")
            if found is None:
                raise TunerFileError(
                    f"{path} is not a tuner file: its metadata has no sdtune.format_version. "
                    + ("It looks like a LoRA of another tool; load it as such (in ComfyUI with the node Load LoRA)"
                       if any("lora" in k for k in keys)
                       else "It is a textual inversion; load it with pipe.load_textual_inversion"
                       if "emb_params" in keys
                       else f"Expected a file that sdtune wrote; found keys such as {', '.join(keys[:2]) or 'none'}")
                )  # fmt: skip
            if found != FORMAT_VERSION:
                raise TunerFileError(
                    f"{path} has format version {found!r}; this sdtune reads version {FORMAT_VERSION!r}. "
                    "Update sdtune, or save the tuner again with this version"
                )
            # get_tensor gives a view of the file, which would change with it
            tensors = {_plain_key(k): f.get_tensor(k).clone() for k in keys if not k.endswith(".alpha")}
    except (SafetensorError, OSError) as error:
        raise TunerFileError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated, or a pickle under another name. "
            "Expected a file that sdtune wrote"
        ) from error
    fields = {}
    for name in ("tuner", "base", "training", "versions"):
        text = metadata.get(f"sdtune.{name}", "{}")
        try:
            fields[name] = json.loads(text)
            if not isinstance(fields[name], dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise TunerFileError(f"{path}: the metadata sdtune.{name} is not a JSON object ({error})") from error
    foreign = [k for k in keys if not k.startswith(("unet.", "lora_unet_"))]
    if foreign and not fields["base"].get("family"):
        raise TunerFileError(
            f"{path} holds keys that are no tuner's: {list_some(foreign)}; expected unet.* or lora_unet_* only"
        )
    try:
        labels = json.loads(metadata.get("sdtune.labels", "[]"))
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TunerFileError(f"{path}: the metadata sdtune.labels is not a JSON list of class names")
    try:
        config = TunerConfig(**fields["tuner"])
    except (TypeError, ValueError) as error:
        raise TunerFileError(f"{path}: its tuner configuration {fields['tuner']} is not usable: {error}") from error
    bad = [k for k, t in tensors.items() if t.dtype not in _FLOATS or not torch.isfinite(t).all()]
    if bad:
        kinds = ", ".join(sorted({str(tensors[k].dtype) for k in bad}))
        raise TunerFileError(
            f"{path} holds weights that are NaN, infinite or non-float ({kinds}): {list_some(bad)}; expected finite "
            "weights of 16, 32 or 64 bits"
        )
    if metadata.get(_HASH) not in (None, _hash_tensors(path)):
        warnings.warn(
            f"the weights in {path} are not those that were saved: their SHA-256 is not {_HASH}. The file is damaged, "
            "or another program has changed it",
            stacklevel=3,
        )
    return TunerFile(
        config, tensors, fields["base"], metadata.get("sdtune.trigger_words", ""), fields["training"],
        versions=fields["versions"], labels=labels, **{name: metadata.get(f"modelspec.{name}", "") for name in _GIVEN},
    )  # fmt: skip


# The parts of the layers' paths in diffusers' UNet that contain an underscore, longest first.
_WITH_UNDERSCORE = (
    "transformer_blocks", "down_blocks", "conv_shortcut", "mid_block", "up_blocks", "proj_out", "proj_in", "to_out",
    "to_q", "to_k", "to_v",
)  # fmt: skip


def kohya_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA's tensors, "<layer path>.lora_A.weight" and B, under kohya's keys, with alpha = rank."""
    found = {}
    for key, tensor in tensors.items():
        path, _, part = key.removesuffix(".weight").rpartition(".")
        name = "lora_unet_" + path.replace(".", "_")
        found[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        if part == "lora_A":
            found[f"{name}.alpha"] = torch.tensor(float(len(tensor)))
    return found


def _plain_key(key: str) -> str:
    """The key of a tensor in a file -> "<op path>.<parameter>", or "<layer path>.lora_A.weight" for kohya's keys."""
    if not key.startswith("lora_unet_"):
        return key.removeprefix("unet.")
    path, _, part = key.removeprefix("lora_unet_").partition(".")
    for name in _WITH_UNDERSCORE:
        path = path.replace(name, name.replace("_", "-"))
    path = path.replace("_", ".").replace("-", "_")
    return f"{path}.{part.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a whole safetensors file."""
    with safe_open(path, framework="pt") as f:
        return f.metadata() or {}


def trained_clip_skip(path: Path) -> int | None:
    """The clip skip that kohya's tools name in a file, where "None" is their default, 1; None if it is not named."""
    value = read_metadata(path).get("ss_clip_skip")
    if value == "None":
        return 1
    return int(value) if value and value.isdecimal() and int(value) >= 1 else None


def is_plain_lora(path: Path) -> bool:
    """Whether a file holds a LoRA that another tool wrote (kohya, diffusers, ...)."""
    try:
        with safe_open(path, framework="pt") as f:
            return "sdtune.format_version" not in (f.metadata() or {}) and any(
                re.search("lora|hada_|lokr_|oft_", k)
                for k in f.keys()  # noqa: SIM118
            )
    except (SafetensorError, OSError):
        return False


def check_family(file: TunerFile, base: dict, source) -> None:
    """Raises TunerFileError if a tuner of a UNet is to be loaded into a vision model or the other way round, or into a
    vision model of another family; `base` describes the model."""
    theirs, ours = (b.get("family") or "a Stable Diffusion UNet" for b in (file.base, base))
    if theirs != ours:
        raise TunerFileError(
            f"{source} does not fit this model: it was trained on {file.base.get('name', 'an unnamed base')}, which is "
            f"{theirs}; this model is {ours}. Load it into a base like the one it was trained on"
        )


def check_fits(file: TunerFile, expected: dict[str, tuple[int, ...]], source) -> None:
    """Raises TunerFileError, listing every difference, unless the file has exactly the expected tensors."""
    found = {k: tuple(t.shape) for k, t in file.tensors.items()}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{k} is {list(found[k])}, expected {list(expected[k])}"
        for k in expected
        if k in found and found[k] != expected[k]
    ]
    if missing or extra or wrong:
        parts = []
        if missing:
            parts.append(f"{len(missing)} of the {len(expected)} expected are missing: {list_some(missing)}")
        if extra:
            parts.append(f"{len(extra)} are not expected: {list_some(extra)}")
        if wrong:
            parts.append(f"{len(wrong)} of another shape: {list_some(wrong)}")
        raise TunerFileError(
            f"{source} does not fit this {'model' if file.base.get('family') else 'UNet'} ({'; '.join(parts)}). It was "
            f"trained on {file.base.get('name', 'an unnamed base')} with shape {file.base.get('shape', 'unknown')}; "
            "load it into a base of that shape"
        )


def find(source: str | Path, weight_name: str = FILE_NAME, **hub) -> Path:
    """The path of a tuner file on this machine, fetched from the hub if `source` is a repository's id."""
    try:
        path = Path(source).expanduser()
        if path.is_dir() and hub.get("subfolder"):
            path = path / hub["subfolder"]
        folder, single = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, TypeError) as error:  # a name too long, an unknown ~user, ...
        raise TunerFileError(
            f"{source} cannot be looked up ({error}); expected a file, a folder or a hub id"
        ) from error
    if folder:
        for name in FILE_NAMES if weight_name == FILE_NAME else (weight_name,):
            if (path / name).is_file():
                return path / name
        there = sorted(p.name for p in path.glob("*.safetensors"))
        if len(there) == 1 and weight_name == FILE_NAME:
            return path / there[0]
        raise TunerFileError(
            f"{path} holds no {weight_name}; found {', '.join(there) or 'no .safetensors file'}. "
            "Name one with weight_name"
        )
    if single:
        if path.suffix != ".safetensors":
            raise TunerFileError(
                f"{path} is not loaded: only .safetensors files are, since a {path.suffix or 'nameless'} file may be "
                "a pickle, which can run code"
            )
        return path
    text = str(source)
    if (
        path.suffix in (".safetensors", ".bin", ".pt", ".ckpt")
        or text.count("/") != 1
        or text.startswith((".", "/", "~"))
    ):
        raise TunerFileError(f"there is no file or folder {text}; expected a tuner file, its folder, or a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        try:
            return Path(hf_hub_download(text, weight_name, **hub))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            if weight_name != FILE_NAME:
                raise
            return Path(hf_hub_download(text, LORA_FILE_NAME, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TunerFileError(
            f"there is no folder {text} here, and {weight_name} could not be had from the hub repository of that "
            f"name: {reason}"
        ) from error


def list_some(items: list[str], most: int = 4) -> str:
    """The first few items, and how many more there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
