"""Adds adapter files to those that the page offers: from an upload, or from a repository on the Hugging Face Hub."""

import filecmp
import secrets
import shutil
import threading
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..adapters import disk, tuner_file
from .errors import PageError
from .files import AdapterFiles
from .output_folder import OutputFolder
from .png_settings import make_slug
from .training_jobs import HUB_ID

MAX_BYTES = 2e9  # a larger file is a whole model
MAX_PREVIEW_BYTES = 2e7
_adding = threading.Lock()  # so that of two uploads of one name neither replaces the other
_LORA_NAME = "pytorch_lora_weights.safetensors"  # what diffusers writes


def add_upload(source: str | Path, files: AdapterFiles, output: OutputFolder) -> str:
    """Copies an uploaded .safetensors file into the output folder, and returns its label.

    Raises:
        PageError: if it is no .safetensors file.
    """
    source = Path(source)
    if source.suffix.lower() != ".safetensors":
        raise PageError(f"{source.name} is not a .safetensors file. Other formats can run code when they are read.")
    try:
        with safe_open(source, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise PageError(
            f"{source.name} was not added: it is no whole safetensors file ({error}), whatever its name says."
        ) from error
    output.require_space(source.stat().st_size, "This file")
    name = make_slug(source.stem) or "file"
    target = output.path / "uploads" / f"{name}.safetensors"
    with _adding:
        while target.exists() and not filecmp.cmp(target, source, shallow=False):
            target = target.with_stem(f"{name}-{secrets.token_hex(2)}")
        if not target.exists():
            with disk.new_file(target) as part:
                shutil.copyfile(source, part)
    files.scan()
    return next((file.label for file in files.by_label.values() if file.path == target), target.stem)


def add_from_hub(repository: str, files: AdapterFiles, output: OutputFolder) -> str:
    """Downloads the tuner or LoRA of a hub repository into the output folder, and returns the repository's id.

    Raises:
        PageError: if there is no such repository, or not exactly one adapter file in it.
    """
    repository = repository.strip()
    if not HUB_ID.fullmatch(repository):
        raise PageError(f"{repository[:80]!r} is not a hub id. Enter one such as owner/name.")
    from huggingface_hub import HfApi, hf_hub_download

    folder = output.path / "hub" / repository.replace("/", "--")
    try:
        sizes = {f.rfilename: f.size or 0 for f in HfApi().model_info(repository, files_metadata=True).siblings or []}
        name = _choose_file(repository, sizes)
        output.require_space(sizes[name], name)
        hf_hub_download(repository, name, local_dir=folder)
        if sizes.get("preview.png", MAX_PREVIEW_BYTES) < MAX_PREVIEW_BYTES:
            hf_hub_download(repository, "preview.png", local_dir=folder)
    except PageError:
        raise
    except Exception as error:  # the hub client raises many kinds of errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PageError(f"{repository} could not be downloaded: {reason}") from error
    files.scan()
    return repository


def _choose_file(repository: str, sizes: dict[str, int]) -> str:
    """The name of the one adapter file among a repository's files; file name -> bytes."""
    names = [name for name in sizes if name.endswith(".safetensors") and "/" not in name]
    names = [name for name in names if name in (tuner_file.FILE_NAME, _LORA_NAME)] or names
    if len(names) != 1:
        raise PageError(f"Expected one .safetensors file in {repository}; found {', '.join(names[:5]) or 'none'}.")
    if sizes[names[0]] > MAX_BYTES:
        gigabytes = sizes[names[0]] / 1e9
        raise PageError(f"{names[0]} of {repository} has {gigabytes:.1f} GB, which is too large for a tuner or LoRA.")
    return names[0]
