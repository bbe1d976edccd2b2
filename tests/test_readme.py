"""The README's lines of Python run as they stand, but for fewer steps and other paths."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_lines_of_python_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    for old, new in (
        ("output/anime/tuner.safetensors", str(ROOT / "assets/anime_res_attn.safetensors")),
        ("my/lora.safetensors", str(ROOT / "assets/anime_lora.safetensors")),
        ("guidance_scale=3)", "guidance_scale=3, num_inference_steps=1)"),
        ("images=2)", "images=2, steps=1)"),
        ('"blurry"))', '"blurry"), num_inference_steps=1)'),
    ):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    space = {}
    exec(code, space)
    assert {title: len(found) for title, found in space["pictures"].items()} == {"base": 2, "anime": 2}
    assert (tmp_path / "copy.safetensors").exists()
