"""The tuner file: what is written is read, and what is wrong is refused with a sentence."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdtune
from sdtune.adapters import inject, tuner_file


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {"mid.attn1.qkv.weight": torch.randn(48, 32), "mid.attn1.o.weight": torch.randn(32, 16),
            "mid.attn1.o.bias": torch.randn(32)}  # fmt: skip


@pytest.fixture
def file(tensors, tmp_path):
    content = tuner_file.TunerFile(sdtune.TunerConfig(), tensors, {"name": "tiny-sd"}, "tok", {"resolution": 128})
    return tuner_file.save(tmp_path / "a.safetensors", content)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_saved_is_loaded(tensors, tmp_path, dtype):
    config = sdtune.TunerConfig(rank=8, num_heads=2, ops=["attn1"], qkv_bias=False)
    path = tuner_file.save(
        tmp_path / "new" / "folder", tuner_file.TunerFile(config, tensors, {"name": "b"}, "tok"), dtype
    )
    assert path.name == "tuner.safetensors"
    back = tuner_file.load(tmp_path / "new" / "folder")
    assert back.config == config and back.trigger_words == "tok" and back.base == {"name": "b"}
    assert back.versions["torch"] and back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[k], t.to(dtype)) for k, t in tensors.items())


def test_the_metadata_has_the_keys_that_the_ecosystem_reads(file):
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/res-attn"
    assert metadata["modelspec.trigger_phrase"] == "tok" and metadata["modelspec.resolution"] == "128x128"
    assert {"modelspec.sai_model_spec", "modelspec.title", "modelspec.date", "sdtune.versions"} <= metadata.keys()
    assert not {"modelspec.author", "modelspec.license", "modelspec.thumbnail"} & metadata.keys()  # none was given


def test_the_metadata_has_the_hash_of_the_tensors_and_weights_that_changed_are_told(file, tmp_path):
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    with safe_open(file, "pt") as f:
        assert f.metadata()["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content[start:]).hexdigest()}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner_file.load(file)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match="a.safetensors are not those that were saved"):
        tuner_file.load(file)


def test_author_license_and_thumbnail_stay_when_a_loaded_tuner_is_saved_again(base, pipe, tmp_path):
    tensors = {k: torch.zeros(s) for k, s in inject.expected_shapes(base.unet, sdtune.TunerConfig()).items()}
    picture = "data:image/jpeg;base64,AA=="
    old = tuner_file.TunerFile(sdtune.TunerConfig(), tensors, author="Ann", license="mit", thumbnail=picture)
    sdtune.load_tuner(pipe, tuner_file.save(tmp_path / "old.safetensors", old), "mine")
    new = tuner_file.load(sdtune.save_tuner(pipe, tmp_path / "new.safetensors", "mine"))
    assert (new.author, new.license, new.thumbnail) == ("Ann", "mit", picture)
    assert new.base["name"] == "tiny-sd"


def rewrite(file, tensors=None, drop=(), **metadata):
    with safe_open(file, "pt") as f:
        old = f.metadata()
    new = {k: v for k, v in {**old, **metadata}.items() if k not in drop}
    save_file(load_file(file) if tensors is None else tensors, file, metadata=new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(drop=["sdtune.format_version"]), "no sdtune.format_version"),
        ({"sdtune.format_version": "9"}, "format version '9'.*reads version '1'"),
        ({"sdtune.tuner": "{"}, "sdtune.tuner is not a JSON object"),
        ({"sdtune.training": "[1]"}, "sdtune.training is not a JSON object"),
        ({"sdtune.tuner": json.dumps({"kind": "magic"})}, "magic"),
        ({"sdtune.tuner": json.dumps({"flavour": 1})}, "flavour"),
        (dict(tensors={"unet.a": torch.tensor([float("nan")])}), "NaN"),
        (dict(tensors={"unet.a": torch.tensor([1])}), "non-float"),
        (dict(tensors={"other.a": torch.ones(1)}), "no tuner's"),
    ],
)
def test_a_file_that_sdtune_did_not_write_like_this_is_refused(file, change, words):
    rewrite(file, **change)
    with pytest.raises(sdtune.TunerFileError, match=f"a.safetensors.*{words}"):
        tuner_file.load(file)


def test_pickles_are_refused_under_any_name_and_a_lora_is_told_apart(tmp_path):
    for name in ("a.bin", "a.pt", "a.ckpt", "renamed.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(sdtune.TunerFileError, match=f"{name}.*pickle"):
            tuner_file.load(tmp_path / name)
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(sdtune.TunerFileError, match="looks like a LoRA of another tool"):
        tuner_file.load(tmp_path / "lora.safetensors")


def test_a_source_without_a_file_is_told(tmp_path, monkeypatch):
    with pytest.raises(sdtune.TunerFileError, match="holds no tuner.safetensors"):
        tuner_file.load(tmp_path)
    with pytest.raises(sdtune.TunerFileError, match="no file or folder"):
        tuner_file.load(tmp_path / "gone.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(sdtune.TunerFileError, match="nobody/nothing.*hub"):
        tuner_file.load("nobody/nothing")
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(sdtune.TunerFileError, match="a.safetensors, b.safetensors"):
        tuner_file.load(tmp_path)


def test_a_file_for_sd15_is_small_and_its_metadata_names_the_base_in_the_words_of_others(sd15_unet, tmp_path):
    config = sdtune.TunerConfig()
    tensors = {k: torch.zeros(s) for k, s in inject.expected_shapes(sd15_unet, config).items()}
    said = {}
    for width, predicts in ((768, "epsilon"), (1024, "epsilon"), (1024, "v_prediction")):
        base = {"shape": {"cross_attention_dim": width}, "prediction_type": predicts}
        path = tuner_file.save(tmp_path, tuner_file.TunerFile(config, tensors, base))
        with safe_open(path, framework="pt") as file:
            found = file.metadata()
        said[width, predicts] = found["modelspec.architecture"], found["modelspec.prediction_type"]
    assert path.stat().st_size < 5e6
    assert said == {
        (768, "epsilon"): ("stable-diffusion-v1/res-attn", "epsilon"),
        (1024, "epsilon"): ("stable-diffusion-v2-512/res-attn", "epsilon"),
        (1024, "v_prediction"): ("stable-diffusion-v2-768-v/res-attn", "v"),
    }


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_loaded_right_or_with_a_warning_or_refused_never_a_crash(file, tensors, tmp_path, data):
    whole = file.read_bytes()
    bad = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if bad:
            bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(bytes(bad))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = tuner_file.load(damaged).tensors
        except sdtune.TunerFileError as error:
            assert "damaged.safetensors" in str(error)
            return
    if found.keys() == tensors.keys():  # others are refused where the file is used, since they fit no model
        is_whole = all(torch.equal(found[k], tensors[k].half()) for k in tensors)
        assert is_whole or any("not those that were saved" in str(w.message) for w in warned)


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(file, tensors, monkeypatch):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="was not written.*too large"):
        tuner_file.save(file, tuner_file.TunerFile(sdtune.TunerConfig(), {"a": torch.tensor([1e9])}))

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        tuner_file.save(file, tuner_file.TunerFile(sdtune.TunerConfig(), tensors))
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == ["a.safetensors"]


def test_others_may_read_the_file_as_the_umask_says(tensors, tmp_path):
    (tmp_path / "plain").write_text("")
    path = tuner_file.save(tmp_path / "a.safetensors", tuner_file.TunerFile(sdtune.TunerConfig(), tensors))
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_kill_9_while_saving_leaves_a_whole_file(tmp_path):
    code = (
        "import torch, sys; from sdtune import TunerConfig; from sdtune.adapters import tuner_file\n"
        "tensors = {'a': torch.ones(3_000_000)}\n"
        "while True: tuner_file.save(sys.argv[1], tuner_file.TunerFile(TunerConfig(), tensors))"
    )
    path = tmp_path / "a.safetensors"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert tuner_file.load(path).tensors["a"].sum() == 3_000_000
