"""The list of adapter files says which ones fit the base, and why the others do not."""

import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tuner_files import save_tuner_of_another_base

import sdtune
from sdtune.adapters import tuner_file
from sdtune.page import html_parts
from sdtune.page.errors import PageError
from sdtune.page.files import AdapterFiles


@pytest.fixture
def folder(files, tmp_path):
    """A folder with three files that fit the small base, five that do not, and one of another format."""
    checkpoint = tmp_path / "mine" / "checkpoints" / "step-000012"
    checkpoint.mkdir(parents=True)
    shutil.copy(files / "one.safetensors", checkpoint / "tuner.safetensors")
    shutil.copy(files / "two.safetensors", tmp_path / "two.safetensors")
    shutil.copy(files / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "lora.safetensors")
    save_tuner_of_another_base(tmp_path / "sd15.safetensors")
    wide = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, 768)}
    save_file(wide, tmp_path / "wide.safetensors")
    save_file({"lora_te_text_model.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "text.safetensors")
    odd = tuner_file.TunerFile(sdtune.TunerConfig(), {"a": torch.zeros(1)}, {"name": [1], "shape": 7})
    tuner_file.save(tmp_path / "odd.safetensors", odd)
    (tmp_path / "incomplete.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "other.bin").write_bytes(b"")
    return tmp_path


def test_files_that_fit_are_offered_and_the_others_say_why_not(base, folder):
    files = AdapterFiles([folder], base.unet)
    assert set(files.by_label) == {"mine @ step 12", "two", "lora", "sd15", "wide", "text", "incomplete", "odd"}
    assert set(files.labels()) == {"mine @ step 12", "two", "lora"}  # the run was stopped at its last checkpoint
    assert files.checkpoint_labels() == ["mine @ step 12"]
    assert "cross_attention_dim is 768, here 192" in files.by_label["sd15"].problem
    assert "768 wide, this base's is 192" in files.by_label["wide"].problem
    assert files.by_label["lora"].kind == "LoRA" and files.by_label["two"].kind == "Res-Attn"
    for label in ("sd15", "odd", "/etc/passwd", "../two", None, ["two"]):
        with pytest.raises(PageError):
            files.get(label)
    cards = html_parts.file_cards(list(files.by_label.values()))
    assert "<script" not in cards and "<img src=x" not in cards


def test_pefts_copy_of_a_tuner_is_not_listed_beside_it(base, files, tmp_path):
    for name in ("tuner", "adapter_model"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(files / "one.safetensors", tmp_path / "run" / f"{name}.safetensors")
    assert AdapterFiles([tmp_path], base.unet).labels() == ["run"]


def test_the_version_increases_only_when_the_files_have_changed(base, folder):
    files = AdapterFiles([folder], base.unet)
    version = files.version
    (folder / "two.safetensors").unlink()
    assert files.scan() == version + 1 and "two" not in files.by_label and files.scan() == version + 1


def test_folders_that_vanish_during_a_scan_are_no_error_and_hidden_ones_are_not_searched(base, folder, monkeypatch):
    shutil.copytree(folder / "mine", folder / ".page" / "mine")
    walk = os.walk

    def walk_and_delete(top):
        for found in walk(top):
            yield found
            shutil.rmtree(folder / "mine", ignore_errors=True)

    monkeypatch.setattr("os.walk", walk_and_delete)
    assert "two" in AdapterFiles([folder], base.unet).by_label


def test_a_preview_that_is_drawn_after_the_file_is_found(base, folder):
    files = AdapterFiles([folder], base.unet)
    Image.new("RGB", (8, 8)).save(folder / "two.png")
    files.scan()
    assert files.by_label["two"].preview == folder / "two.png"
