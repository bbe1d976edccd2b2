"""Puts the result of a training run on the Hugging Face hub: the file, its settings, pictures, and a model card."""

import base64
import json
import shutil
import tempfile
from pathlib import Path

from .. import paths
from ..tuners.config import KINDS, LORAS
from . import tuner_file
from .peft_files import save_peft_files
from .tuner_file import TunerFile

LORA_FILE_NAME = tuner_file.LORA_FILE_NAME
HELDOUT_NAME = "heldout.json"  # in the output folder of a run
SAMPLE = "images/sample.jpg"  # in the repository: the first preview prompt, as the tuner draws it


def push_to_hub(
    folder: str | Path, repo: str, *, license: str | None = None, private: bool | None = None, token: str | None = None
) -> str:
    """Uploads the output folder of a run to a model repository of the hub, which is made if need be.

    Args:
        folder: the output folder of a run, with tuner.safetensors.
        repo: "owner/name".
        license: of the weights, as the hub writes it, such as "mit"; by default that in the file, if there is one.
        private: whether a new repository is private; default: as the account has it.
        token: by default that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        TunerFileError: if there is no tuner file.
        huggingface_hub.errors.HfHubHTTPError, OSError: if the hub cannot be reached or refuses; nothing is lost here.
    """
    from huggingface_hub import HfApi

    folder, api = paths.expand(folder), HfApi(token=token)
    path = tuner_file.find(folder)
    file = tuner_file.load(path)
    tuner_file.check_family(file, {}, path)  # the card and the names are those of Stable Diffusion
    file.license = license or file.license
    with tempfile.TemporaryDirectory() as staging:
        prepare_files(folder, path, file, Path(staging), repo)
        url = api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=staging, commit_message=f"{file.config.kind} tuner, by sdtune")
    return str(url)


def prepare_files(folder: Path, path: Path, file: TunerFile, staging: Path, repo: str) -> None:
    """Writes into `staging` what is uploaded."""
    is_lora = file.config.kind in LORAS
    shutil.copyfile(path, staging / (LORA_FILE_NAME if is_lora else tuner_file.FILE_NAME))
    for name in ("config.json", "loss.png"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    pictures = [p for p in (folder / "preview.png", *sorted(folder.glob("previews/*.png"))[-3:]) if p.is_file()]
    (staging / "images").mkdir()
    for i, picture in enumerate(pictures):
        shutil.copyfile(picture, staging / "images" / f"{i}.png")
    if file.thumbnail:
        (staging / SAMPLE).write_bytes(base64.b64decode(file.thumbnail.partition(",")[2]))
    save_peft_files(staging, file)
    card = model_card(file, repo, len(pictures), _heldout_losses(folder), (folder / "loss.png").is_file())
    (staging / "README.md").write_text(card, encoding="utf-8")


def _heldout_losses(folder: Path) -> dict[int, float]:
    """Step -> mean loss on the held-out images; empty where there were none."""
    path = folder / HELDOUT_NAME
    return {int(step): loss for step, loss in json.loads(path.read_text()).items()} if path.is_file() else {}


def model_card(file: TunerFile, repo: str, pictures: int, heldout: dict[int, float], has_loss_plot: bool) -> str:
    """The README.md of the repository, with the YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    config, base, is_lora = file.config, file.base.get("name", "unknown"), file.config.kind in LORAS
    kind = "+".join(filter(None, (config.kind, config.ffn_kind)))
    tags = ["text-to-image", "stable-diffusion", "stable-diffusion-diffusers", "diffusers-training", "sdtune"]
    tags += ["lora", "template:sd-lora"] if is_lora else []
    tags += [kind.replace("_", "-")]
    more = {"license": file.license} if file.license else {}
    more |= {"instance_prompt": file.trigger_words} if file.trigger_words else {}
    if base.count("/") == 1:  # the id of a hub repository, not a folder or a file
        more |= {"base_model": base, "base_model_relation": "adapter"}
    trained = file.training
    prompts, has_counts = trained.get("preview_prompts") or [], {"images", "steps_done"} <= trained.keys()
    if file.thumbnail and prompts:
        more["widget"] = [{"text": prompts[0], "output": {"url": SAMPLE}}]
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **more)
    base_code = base if base.count("/") == 1 or base == "tiny-sd" else f"path/to/{base}"
    if config.kind == "lora":
        comfyui = "Put the file into `models/loras` and use ComfyUI's own Load LoRA node."
    elif config.kind == "dora":
        comfyui = (
            "Write it for ComfyUI with `python -m sdtune.adapters.export FILE --to kohya` first; ComfyUI draws it "
            "only roughly as diffusers does: about a fifth of its effect differs."
        )
    elif config.kind in KINDS:
        comfyui = (
            f"Put `{tuner_file.FILE_NAME}` into `models/tuners` and use the node Load Tuner (sdtune), which is in "
            "sdtune/integrations/comfyui."
        )
    else:
        comfyui = "It cannot be loaded there."
    lines = ["---", data.to_yaml(), "---", "", f"# {repo.split('/')[-1]}", ""]
    lines += [
        f"A {kind} tuner for {base}, trained with sdtune"
        + (f" on {trained['images']} pictures in {trained['steps_done']} steps." if has_counts else ".")
    ]
    lines += ["", f"Made by {file.author}."] if file.author else []
    lines += ["", f"Trigger words: `{file.trigger_words}`"] if file.trigger_words else []
    lines += ["", "<Gallery />"] if "widget" in more else []
    if pictures:
        lines += ["", "## The base beside the tuned model, from the same noise"]
        lines += ["", *(f"![the preview prompts](images/{i}.png)" for i in range(pictures))]
    if heldout:
        steps = sorted(heldout)
        lines += ["", "## Loss on pictures that were held out", "", "| step | loss |", "| --- | --- |"]
        lines += [f"| {'0, the base' if s == 0 else s} | {heldout[s]:.4f} |" for s in steps]
    lines += ["", "![losses](loss.png)"] if has_loss_plot else []
    lines += ["", "## Use it in diffusers", "", "```python"]
    lines += ["import sdtune", "", f'pipe = sdtune.load_base("{base_code}")', f'sdtune.load_tuner(pipe, "{repo}")']
    if is_lora:
        lines += ["", "# or, without sdtune:", f'pipe.load_lora_weights("{repo}", weight_name="{LORA_FILE_NAME}")']
    lines += ["```", "", "## Use it in ComfyUI", "", comfyui, ""]
    return "\n".join(lines)


def how_to_push_again(folder: Path, repo: str, error: Exception) -> str:
    """What to print when a push has failed: nothing is lost, and the command that tries again."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"the run was not pushed to {repo}: {reason}. All files are in {folder}. Push them again with:\n"
        f'  python -c \'import sdtune; sdtune.push_to_hub("{folder}", "{repo}")\''
    )
