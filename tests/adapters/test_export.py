"""The command that writes a DoRA for other programs."""

import copy
import subprocess
import sys

import torch
from conftest import picture
from safetensors import safe_open
from safetensors.torch import load_file

import sdtune
from sdtune.adapters import api, tuner_file
from sdtune.adapters.export import export_to_kohya


def export(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sdtune.adapters.export", *map(str, arguments), "--to", "kohya"]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_dora_is_written_in_kohyas_key_names(base, tmp_path):
    pipe = copy.deepcopy(base)
    sdtune.add_tuner(pipe, sdtune.TunerConfig(kind="dora", ops=["attn1", "conv"]), "dora")
    path = sdtune.save_tuner(pipe, tmp_path / "dora.safetensors", "dora")
    done = export(path)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "dora-kohya.safetensors")
    assert "note: ComfyUI and Forge scale a DoRA by another norm than diffusers" in done.stderr
    found, expected = load_file(tmp_path / "dora-kohya.safetensors"), tuner_file.load(path).tensors
    assert len(found) == len(expected) / 3 * 4  # of each layer down, up, magnitudes, and alpha
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    name = f"lora_unet_{block.replace('.', '_')}"
    assert found[f"{name}.dora_scale"].shape == (expected[f"{block}.lora_B.weight"].shape[0], 1)
    assert torch.equal(found[f"{name}.dora_scale"].flatten(), expected[f"{block}.lora_magnitude_vector"])
    assert torch.equal(found[f"{name}.lora_up.weight"], expected[f"{block}.lora_B.weight"])
    assert found["lora_unet_down_blocks_0_resnets_0_conv1.dora_scale"].dim() == 4
    assert found[f"{name}.alpha"] == 4
    with safe_open(tmp_path / "dora-kohya.safetensors", "pt") as new, safe_open(path, "pt") as old:
        assert new.metadata()["modelspec.title"] == old.metadata()["modelspec.title"]
        assert new.metadata()["modelspec.hash_sha256"] != old.metadata()["modelspec.hash_sha256"]


def test_what_was_written_for_others_draws_the_same_here_and_no_file_is_replaced_by_its_own_copy(base, tmp_path):
    torch.manual_seed(0)
    pipe, other = copy.deepcopy(base), copy.deepcopy(base)
    sdtune.add_tuner(pipe, sdtune.TunerConfig(kind="dora", ops=["attn1", "conv"]), "dora")
    for p in api.tuner_parameters(pipe, "dora").values():
        p.data += 0.05 * torch.randn(p.shape)
    path = sdtune.save_tuner(pipe, tmp_path / "dora.safetensors", "dora", dtype=torch.float32)
    sdtune.load_tuner(other, export_to_kohya(path))
    assert torch.allclose(picture(other), picture(pipe), atol=1e-3)
    assert not torch.allclose(picture(other), picture(base), atol=0.1)
    content = path.read_bytes()
    done = export(path, "--output", path)
    assert done.returncode == 1 and "is the file itself" in done.stderr and path.read_bytes() == content


def test_a_tuner_cannot_be_exported_and_the_message_says_what_to_use():
    done = export("assets/anime_res_attn.safetensors")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "holds a res_attn_layer, which sdtune does not write in kohya's format; use sdtune's node" in done.stderr
