"""The axes of a grid are read from the page's fields, and each cell gets the right settings."""

import pytest

from sdtune.page.errors import PageError
from sdtune.page.grid_axes import make_cells, parse_axis
from sdtune.page.png_settings import Settings


def test_the_values_of_an_axis_are_parsed():
    assert parse_axis("weight", "0, 0.5;1 -1", []).values == [0, 0.5, 1, -1]
    assert parse_axis("prompt", " a cat \n\na dog", []).titles() == ["a cat", "a dog"]
    assert parse_axis("adapter", "", ["base", "x"]).values == ["", "x"]


@pytest.mark.parametrize("name, text", [("seed", "1.5"), ("seed", "-1"), ("weight", "nan"), ("guidance", "x"),
                                        ("prompt", " "), ("y", "1")])  # fmt: skip
def test_unusable_values_are_refused(name, text):
    with pytest.raises(PageError):
        parse_axis(name, text, [])


def test_a_weight_belongs_to_the_adapter_of_the_other_axis():
    settings = Settings("a cat", "a dog", seed=3, guidance=2.0, columns=[{"z": 0.7}])
    adapters, weights = parse_axis("adapter", "", ["base", "x"]), parse_axis("weight", "0.5, 1", [])
    for cells in (make_cells(settings, adapters, weights), make_cells(settings, weights, adapters)):
        assert sorted(map(str, (cell.adapters for cell in cells))) == ["{'x': 0.5}", "{'x': 1.0}", "{}", "{}"]
        assert {(c.prompt, c.negative_prompt, c.seed, c.guidance) for c in cells} == {("a cat", "a dog", 3, 2.0)}
    seeds, nothing = parse_axis("seed", "1, 2", []), parse_axis("", "", [])
    cells = make_cells(settings, seeds, nothing)
    assert [(cell.seed, cell.adapters) for cell in cells] == [(1, {"z": 0.7}), (2, {"z": 0.7})]
