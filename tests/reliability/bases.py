"""Bad bases, through `load_base`: folders in diffusers' layout and single files, of which a part is changed.

A base that loads is compared with its files, weight by weight.
"""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

import sdtune
from sdtune.bases.load import TINY_SD

from .cases import BYTE_MUTATIONS, Case, judge
from .pictures import HTML, Harmful

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
           "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
           "tokenizer/tokenizer_config.json")  # fmt: skip


def copy_base(folder: Path) -> Path:
    """The small base, with links to its weights, which are replaced and never written to."""
    for source in [*CONFIGS, *WEIGHTS.values()]:
        target = folder / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if source in CONFIGS:
            shutil.copyfile(TINY_SD / source, target)
        else:
            os.symlink(TINY_SD / source, target)
    return folder


def find_fault(folder: Path):
    """The check of a loaded base: that every weight is the one in its file, and finite."""

    def check(pipe) -> str:
        for part, file in WEIGHTS.items():
            tensors, own = load_file(folder / file), getattr(pipe, part).state_dict()
            for key, tensor in own.items():
                if key not in tensors:
                    if key.endswith("position_ids"):
                        continue
                    return f"{part} has {key}, which its file has not"
                if not torch.isfinite(tensor).all():
                    return f"{key} of {part} is not finite"
                if not torch.equal(tensor.float(), tensors[key].float()):
                    return f"{key} of {part} is not what its file holds"
        return ""

    return check


def base_case(title: str, change, is_refused: bool = False) -> Case:
    """A copy of the small base after `change(folder)`."""

    def run(folder: Path) -> str:
        base = copy_base(folder / "base")
        change(base)
        check = None if is_refused else find_fault(base)
        return judge(lambda: sdtune.load_base(base), base, [str(base), "base"], check)

    return Case(f"base: {title}", run)


def write(name: str, content: bytes):
    def change(base: Path) -> None:
        (base / name).unlink()
        (base / name).write_bytes(content)

    return change


def change_json(name: str, **values):
    """A change of values in a configuration; None removes one."""

    def change(base: Path) -> None:
        content = json.loads((base / name).read_text()) | values
        (base / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def change_tensors(part: str, edit):
    def change(base: Path) -> None:
        tensors = load_file(TINY_SD / WEIGHTS[part])
        edit(tensors, next(k for k, t in sorted(tensors.items()) if t.ndim > 1))
        (base / WEIGHTS[part]).unlink()
        save_file(tensors, base / WEIGHTS[part], {"format": "pt"})

    return change


def round_all(tensors: dict[str, torch.Tensor], _key: str) -> None:
    tensors.update({name: tensor.half() for name, tensor in tensors.items()})


def single_file_case(title: str, content: bytes, name: str = "base.safetensors") -> Case:
    def run(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return judge(lambda: sdtune.load_base(folder / name), folder, name)

    return Case(f"base: single file, {title}", run)


def base_cases(seed: int) -> list[Case]:
    rng = random.Random(f"{seed} bases")
    cases = [
        base_case("unchanged", lambda base: None),
        base_case("its index names no UNet", change_json("model_index.json", unet=None)),
    ]
    for name in CONFIGS:
        content = (TINY_SD / name).read_bytes()
        cases.append(base_case(f"{name} is missing", lambda base, n=name: (base / n).unlink(), True))
        cases.append(base_case(f"{name} is empty", write(name, b""), True))
        cases.append(base_case(f"{name} is a web page", write(name, HTML), True))
        cases.append(base_case(f"{name} is a list", write(name, b"[1]"), True))
        cases.append(base_case(f"{name} is cut", write(name, content[: len(content) // 2]), True))
    for part, name in WEIGHTS.items():
        content = (TINY_SD / name).read_bytes()
        cases.append(base_case(f"{name} is missing", lambda base, n=name: (base / n).unlink(), True))
        cases.append(base_case(f"{name} is empty", write(name, b""), True))
        cases.append(base_case(f"{name} is a pickle", write(name, pickle.dumps(Harmful())), True))
        cases.append(base_case(f"{name} is a pointer of Git LFS", write(name, b"version https://git-lfs"), True))
        cases.append(base_case(f"{name} is cut", write(name, content[: len(content) // 2]), True))
        for title, edit in (
            ("lacks a tensor", lambda t, k: t.pop(k)),
            ("holds NaN", lambda t, k: t[k].fill_(float("nan"))),
            ("has a tensor of another shape", lambda t, k: t.__setitem__(k, t[k][1:].clone())),
            ("has a renamed tensor", lambda t, k: t.__setitem__(f"old.{k}", t.pop(k))),
        ):
            cases.append(base_case(f"{part} {title}", change_tensors(part, edit), True))
        cases.append(base_case(f"{part} in 16 bits", change_tensors(part, round_all)))
    for title, change in (
        ("sample_size is a text", change_json("unet/config.json", sample_size="a")),
        ("in_channels is 9", change_json("unet/config.json", in_channels=9)),
        ("channels are a text", change_json("unet/config.json", block_out_channels="a")),
        ("channels are fewer", change_json("unet/config.json", block_out_channels=[32, 64])),
        ("an unknown block", change_json("unet/config.json", down_block_types=["None"] * 4)),
        ("an unknown class", change_json("model_index.json", _class_name="None")),
        ("an unknown UNet", change_json("model_index.json", unet=["diffusers", "None"])),
        ("a class of another library", change_json("model_index.json", unet=["os", "system"])),
        ("an unknown scheduler", change_json("model_index.json", scheduler=["diffusers", "None"])),
        ("betas are a text", change_json("scheduler/scheduler_config.json", beta_start="a")),
        ("no timesteps", change_json("scheduler/scheduler_config.json", num_train_timesteps=0)),
        ("an unknown prediction", change_json("scheduler/scheduler_config.json", prediction_type="none")),
        ("a text encoder of another width", change_json("text_encoder/config.json", hidden_size=96)),
    ):
        cases.append(base_case(title, change, True))
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
               "first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
               "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": torch.zeros(77, 8),
               }  # fmt: skip
    sound = save(tensors)
    cases += [
        single_file_case("parts of a base", sound), single_file_case("empty", b""),
        single_file_case("a web page", HTML),
        single_file_case("a pickle", pickle.dumps(Harmful())), single_file_case("named .ckpt", sound, "base.ckpt"),
        single_file_case("a tuner", (TINY_SD.parent / "anime_res_attn.safetensors").read_bytes()),
        single_file_case("a LoRA", (TINY_SD.parent / "anime_lora.safetensors").read_bytes()),
        single_file_case("a UNet of a folder", (TINY_SD / WEIGHTS["unet"]).read_bytes()),
        *(single_file_case(m.__name__, m(sound, rng)) for m in BYTE_MUTATIONS),
    ]  # fmt: skip
    return cases
