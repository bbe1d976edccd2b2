"""Trainings of the page: names, the shell command, stop and resume, and closed windows."""

import pickle
import subprocess

import pytest
from training_runs import short_run
from transformers.hf_argparser import HfArgumentParser

import sdtune
from sdtune.adapters import tuner_file
from sdtune.page import html_parts
from sdtune.page.backend import Backend
from sdtune.page.errors import PageError
from sdtune.page.training_jobs import TrainingRun, check_base
from sdtune.training import errors
from sdtune.training import fit as fit_module


def make_run(backend, name: str = "mine") -> TrainingRun:
    config = sdtune.TrainConfig(output=str(backend.output.path / name), steps=3)
    return TrainingRun(config, sdtune.TunerConfig())


def test_the_shell_command_trains_the_same_as_the_form():
    config = sdtune.TrainConfig(
        data="a b/$(x)", steps=7, flip=True, learning_rate=1e-3, preview_prompts=["it's", '"two"', "-blue"],
        resolution=64, trigger_words="-sks",
    )  # fmt: skip
    run = TrainingRun(config, sdtune.TunerConfig(kind="lora", rank=8, ops=["attn1"]))
    script = f"printf '%s\\0' {run.shell_command()}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.split("\0")
    assert words[:3] == ["accelerate", "launch", "train_anime.py"]
    parser = HfArgumentParser((sdtune.TunerConfig, sdtune.TrainConfig))
    tuner, parsed = parser.parse_args_into_dataclasses(words[3:-1])
    assert (parsed, tuner) == (run.config, run.tuner)


def test_a_base_from_the_page_is_never_a_path_of_the_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert check_base("", "own/base") == "own/base" and check_base("x/y", "tiny-sd") == "x/y"
    for text in ("/etc", "../x", "a/b", "~/x", "./a", "a"):
        with pytest.raises(PageError):
            check_base(text, "tiny-sd")


def test_a_training_can_start_from_a_listed_file_whose_kind_and_size_it_takes_over(backend):
    label = next(label for label in backend.files.labels() if "res_attn" in label)
    plan = backend.trainings.plan
    run = plan(None, [], "bundled", "mine", "lora", 5, {"init": label, "rank": 9, "keep_last": 0, "clip_skip": 2.0})
    assert run.config.init == str(backend.files.get(label).path)
    assert run.tuner == tuner_file.load(run.config.init).config and run.tuner.kind == "res_attn_layer"
    assert run.config.keep_last is None and run.config.clip_skip == 2
    with pytest.raises(PageError, match="There is no adapter file"):
        plan(None, [], "bundled", "mine", "lora", 5, {"init": "/etc/passwd"})


def test_a_name_belongs_to_the_first_training_that_uses_it(backend, wait_for):
    first = backend.trainings.start("a", make_run(backend))
    with pytest.raises(PageError, match="has just taken the name mine"):
        backend.trainings.start("b", make_run(backend))
    assert backend.output.free_run_name("mine") == "mine-2"
    with pytest.raises(PageError, match="already has a training"):
        backend.trainings.start("a", make_run(backend, "other"))
    assert not (backend.output.path / "other").exists()  # the refused training leaves no folder
    backend.may_finish.set()
    assert wait_for(first).state == "done"


def test_a_stopped_training_resumes_also_if_it_was_stopped_while_it_waited(backend, wait_for):
    trainings = backend.trainings
    first = trainings.start("a", make_run(backend))
    assert backend.training_started.wait(20)
    backend.queue.stop(first)
    backend.may_finish.set()
    assert wait_for(first).state == "done" and first.resumable and first.result.name == tuner_file.FILE_NAME
    backend.may_finish.clear()
    backend.training_started.clear()
    other = trainings.start("b", make_run(backend, "other"))
    assert backend.training_started.wait(20)
    waiting = trainings.resume("a")
    assert waiting.run.config.resume and waiting.losses == first.losses
    backend.queue.stop(waiting)
    assert waiting.state == "stopped" and waiting.resumable and waiting.result == first.result
    resumed = trainings.resume("a")
    backend.may_finish.set()
    assert wait_for(other).state == wait_for(resumed).state == "done" and not resumed.resumable
    with pytest.raises(PageError, match="no stopped training"):
        trainings.resume("a")


def test_a_stopped_training_can_be_chosen_and_resumed_after_its_window_has_started_another(backend, wait_for):
    trainings = backend.trainings
    first = trainings.start("a", make_run(backend))
    assert backend.training_started.wait(20)
    backend.queue.stop(first)
    backend.may_finish.set()
    wait_for(first)
    other = trainings.start("a", make_run(backend, "other"))
    assert trainings.shown_in("a") is other and list(trainings.unfinished("a")) == ["mine"]
    wait_for(other)
    trainings.choose("a", "mine")
    assert not wait_for(trainings.resume("a")).resumable and not trainings.unfinished("a")


def test_a_training_that_fails_after_a_checkpoint_can_be_resumed(backend, wait_for, monkeypatch):
    def fail(config, tuner, on_step):
        folder = backend.output.path / "mine" / "checkpoints" / "step-000002"
        folder.mkdir(parents=True)
        (folder / tuner_file.FILE_NAME).touch()
        for done in (1, 2, 3):
            on_step(done, 0.1)
        raise errors.TrainError("the disk is full")

    monkeypatch.setattr(fit_module, "fit", fail)
    job = wait_for(backend.trainings.start("a", make_run(backend)))
    assert job.state == "failed" and "the disk is full" in html_parts.training_status(job, "mine")
    assert job.resumable and job.done == len(job.losses) == 2
    resumed = backend.trainings.resume("a")
    assert resumed.run.config.resume and len(resumed.losses) >= 2
    wait_for(resumed)


def test_the_training_of_a_closed_window_is_shown_in_the_next_window(backend, wait_for):
    trainings = backend.trainings
    job = trainings.start("before", make_run(backend))
    backend.close_window("before")  # a reload of the page is a new window
    assert trainings.shown_in("after") is job and trainings.shown_in("third") is job
    backend.may_finish.set()
    wait_for(job)
    assert trainings.shown_in("third") is job and trainings.shown_in("after") is None
    assert trainings.shown_in("third") is job


def test_an_unfinished_training_is_found_on_the_disk_after_a_restart(pairs, tmp_path):
    config = short_run(pairs, tmp_path, steps=3)

    def stop(done, loss):
        return done == 1

    with pytest.raises(errors.Stopped):
        sdtune.fit(config, sdtune.TunerConfig(rank=2), stop)
    backend = Backend("tiny-sd", tmp_path)
    backend.queue.close()  # nothing is trained here
    restarted = backend.trainings
    job = restarted.shown_in("new window")
    assert job.resumable and job.state == "stopped" and (job.done, job.total) == (1, 3)
    assert "was stopped at step 1 of 3" in html_parts.training_status(job, job.run.name)
    assert job.run.config.output == config.output and job.run.tuner == sdtune.TunerConfig(rank=2)
    restarted.close_window("new window")  # a reload of the page
    resumed = restarted.resume("another window")
    assert resumed.run.config.resume and len(resumed.losses) == 1


def test_of_several_unfinished_trainings_each_can_be_chosen_and_resumed(pairs, tmp_path):
    for name in ("first", "second", "third"):
        with pytest.raises(errors.Stopped):
            sdtune.fit(
                short_run(pairs, tmp_path, output=str(tmp_path / name)), sdtune.TunerConfig(rank=2), lambda *_: True
            )
    backend = Backend("tiny-sd", tmp_path)
    backend.queue.close()  # nothing is trained here
    trainings = backend.trainings
    assert trainings.shown_in("window").run.name == "third"
    assert list(trainings.unfinished("window")) == ["second", "first"]
    trainings.choose("window", "first")
    assert trainings.shown_in("window").run.name == "first"
    assert set(trainings.unfinished("window")) == {"second", "third"}
    with pytest.raises(PageError, match="no stopped training named 'first'"):
        trainings.choose("other", "first")
    assert trainings.resume("window").run.config.output == str(tmp_path / "first")
    with pytest.raises(PageError, match="runs or waits"):
        trainings.choose("window", "second")


def test_a_pickle_under_another_name_is_not_added(backend, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(PageError, match="style.safetensors was not added"):
        backend.add_upload(tmp_path / "style.safetensors")
    assert not list(backend.output.path.rglob("*.safetensors"))
