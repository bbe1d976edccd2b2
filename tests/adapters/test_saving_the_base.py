"""`save_pretrained` of a pipeline with adapters writes the whole base, and says that it leaves the adapters out."""

import warnings

import pytest

import sdtune


def test_the_base_is_saved_whole_and_the_adapters_that_are_left_out_are_named(pipe, base, files, tmp_path):
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    sdtune.load_tuner(pipe, files / "lora" / "pytorch_lora_weights.safetensors", "style")
    with pytest.warns(
        UserWarning, match="without its adapters 'one', 'style'; save each of them with sdtune.save_tuner"
    ):
        pipe.unet.save_pretrained(tmp_path / "unet")
    with pytest.warns(UserWarning, match="without its adapters"):
        pipe.save_pretrained(tmp_path / "pipe")
    for folder in (tmp_path / "pipe" / "unet", tmp_path / "unet"):
        unet, info = type(base.unet).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert all(t.equal(unet.state_dict()[k]) for k, t in base.unet.state_dict().items())
    assert "one" in pipe.get_list_adapters()["unet"]

    pipe.delete_adapters(["one", "style"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.unet.save_pretrained(tmp_path / "again")


def test_a_tuner_that_was_unloaded_leaves_no_replaced_method(pipe, files):
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    sdtune.unload_tuner(pipe, "one")
    assert "save_pretrained" not in pipe.unet.__dict__
