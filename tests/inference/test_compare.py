"""What drawing side by side promises: the pictures that separate calls would draw, in fewer UNet passes."""

import pytest
import torch
from conftest import ANIME

import sdtune
from sdtune.adapters.api import tuner_parameters
from sdtune.inference import grids
from sdtune.page.samplers import SAMPLERS

PROMPT = "a girl with silver hair, in anime style"
SMALL = dict(width=64, height=64)
assert ANIME.exists()


@pytest.fixture
def loaded(pipe, files):
    sdtune.load_tuner(pipe, files / "one.safetensors", "tuner")
    sdtune.load_tuner(pipe, files / "lora", "lora")
    return pipe


def passes(pipe):
    """Counts the UNet's passes from now on."""
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def by_itself(pipe, prompt, seed, steps, guidance=3.0, width=64, height=64):
    """What diffusers draws in a call of its own, with the adapters as they are."""
    noise = torch.Generator().manual_seed(seed)
    options = dict(num_inference_steps=steps, guidance_scale=guidance, generator=noise, height=height, width=width)
    return pipe(prompt, **options).images[0]


def alone(pipe, cell, steps):
    if cell.adapters:
        pipe.enable_lora()
        pipe.set_adapters(list(cell.adapters), list(cell.adapters.values()))
    else:
        pipe.disable_lora()
    return by_itself(pipe, cell.prompt, cell.seed, steps, cell.guidance or 3.0, cell.width or 64, cell.height or 64)


def test_columns_that_share_passes_are_the_pictures_that_separate_calls_draw(loaded):
    columns = {"base": {}, "tuner": {"tuner": 1.0}, "lora": {"lora": 0.8}, "mix": {"tuner": 0.5, "lora": 0.5}}
    seen = passes(loaded)
    drawn = sdtune.compare(loaded, PROMPT, columns, seed=3, images=2, steps=3, guidance=4.0, **SMALL)
    assert seen == [16] * len(loaded.scheduler.timesteps)  # 4 columns, 2 pictures, with and without the prompt
    for title, adapters in columns.items():
        for i, picture in enumerate(drawn[title]):
            expected = alone(loaded, sdtune.Cell(PROMPT, 3 + i, adapters, 4.0), 3)
            assert grids.mean_difference(picture, expected) < 0.5, title
    assert grids.mean_difference(drawn["base"][0], drawn["mix"][0]) > 1


def test_prompts_seeds_and_guidance_may_differ_from_cell_to_cell(loaded):
    cells = [
        sdtune.Cell(PROMPT, 0, {"tuner": 1.0}, 4.0, **SMALL), sdtune.Cell("a cat", 1, {}, 4.0, "blue", **SMALL),
        sdtune.Cell("a cat", 1, {"tuner": -0.5}, 1.0, **SMALL), sdtune.Cell("a dog", 2, {"lora": 1.0}, 1.0, **SMALL),
    ]  # fmt: skip
    seen = passes(loaded)
    drawn = sdtune.draw_cells(loaded, cells, steps=2)
    assert len(seen) == 2 * len(loaded.scheduler.timesteps)
    for picture, cell in zip(drawn, cells):
        if not cell.negative_prompt:
            assert grids.mean_difference(picture, alone(loaded, cell, 2)) < 0.5


def test_pictures_of_several_sizes_are_those_that_separate_calls_draw(loaded):
    sizes = [(64, 96), (96, 64), (64, 96), (72, 64)]
    cells = [
        sdtune.Cell(PROMPT, i, {"tuner": 1.0} if i % 2 else {}, 4.0, width=w, height=h)
        for i, (w, h) in enumerate(sizes)
    ]
    seen = passes(loaded)
    drawn = sdtune.draw_cells(loaded, cells, steps=2)
    assert seen == [n for n in (4, 2, 2) for _ in loaded.scheduler.timesteps]  # those of one size share a pass
    for picture, cell in zip(drawn, cells):
        assert picture.size == (cell.width, cell.height)
        assert grids.mean_difference(picture, alone(loaded, cell, 2)) < 0.5
    wide = sdtune.compare(loaded, PROMPT, {"a": {}}, steps=1, width=128, height=64)["a"][0]
    assert wide.size == (128, 64)


def test_a_picture_without_guidance_has_the_one_that_suits_the_base(loaded):
    usual, three, seven = sdtune.draw_cells(
        loaded, [sdtune.Cell(PROMPT, guidance=g) for g in (None, 3.0, 7.5)], steps=2
    )
    assert grids.mean_difference(usual, three) == 0 and grids.mean_difference(usual, seven) > 1


def test_a_base_whose_size_is_height_and_width_draws_it(loaded):
    loaded.unet.register_to_config(sample_size=[8, 12])
    drawn = sdtune.compare(loaded, PROMPT, {"a": {}}, steps=1)["a"][0]
    assert drawn.size == (96, 64)


def test_the_pipe_is_left_as_it_was_also_when_the_drawing_is_stopped(loaded):
    loaded.set_adapters(["lora"], [0.3])
    before = by_itself(loaded, PROMPT, 0, 2)

    class Stop(Exception):
        pass

    def stop(done, total):
        assert 0 < done <= total
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        sdtune.compare(loaded, PROMPT, {"base": {}, "both": {"tuner": 1, "lora": 1}}, steps=3, on_step=stop, **SMALL)
    assert loaded.get_active_adapters() == ["lora"]
    after = by_itself(loaded, PROMPT, 0, 2)
    assert grids.mean_difference(before, after) == 0


def test_an_adapter_that_cannot_share_a_pass_gets_its_own(pipe):
    sdtune.add_tuner(pipe, sdtune.TunerConfig(kind="dora"), "dora")
    for key, p in tuner_parameters(pipe, "dora").items():
        p.data += 0.1 if "lora_B" in key else 0
    cells = [sdtune.Cell(PROMPT, 0, mix, **SMALL) for mix in ({}, {"dora": 1.0}, {"dora": 0.5})]
    drawn = sdtune.draw_cells(pipe, cells, steps=2)
    for picture, cell in zip(drawn, cells):
        assert grids.mean_difference(picture, alone(pipe, cell, 2)) < 0.5


def test_every_unknown_adapter_is_named(loaded):
    with pytest.raises(ValueError, match="'nobody', 'nothing'.*attached adapters: lora, tuner"):
        sdtune.compare(loaded, PROMPT, {"a": {"nobody": 1.0}, "b": {"nothing": 1.0, "lora": 1.0}})
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_of_the_page_draws_side_by_side_what_it_draws_alone(loaded, sampler):
    kind, options = SAMPLERS[sampler]
    loaded.scheduler, seen = kind.from_config(loaded.scheduler.config, **options), []
    columns = {"base": {}, "tuner": {"tuner": 1.0}}
    drawn = sdtune.compare(
        loaded, PROMPT, columns, steps=3, on_step=lambda done, all: seen.append((done, all)), **SMALL
    )
    for title, adapters in columns.items():
        expected = alone(loaded, sdtune.Cell(PROMPT, 0, adapters), 3)
        assert grids.mean_difference(drawn[title][0], expected) < 0.5
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
