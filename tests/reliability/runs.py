"""Bad checkpoints, through `--resume`, and bad settings, through the flags of train_anime.py."""

import functools
import json
import os
import pickle
import random
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from . import commands
from .cases import BYTE_MUTATIONS, Case, Failure, check_message, digest, judge
from .pictures import HTML, Harmful, write_pairs

FLAGS = [*commands.SHORT, "--checkpoint_every", "1", "--lr_scheduler", "constant"]


@functools.cache
def finished_run() -> tuple[Path, Path, dict]:
    """A data set, the output of a run of two steps on it, and the weights that a third step gives."""
    folder = Path(tempfile.mkdtemp(dir=os.getcwd(), prefix="finished-"))
    data = folder / "data"
    write_pairs(data, random.Random(0))
    flags = ["--data", str(data), *FLAGS]
    commands.train(*flags, "--output", str(folder / "run"), "--steps", "2")
    shutil.copytree(folder / "run", folder / "longer")
    commands.train(*flags, "--output", str(folder / "longer"), "--steps", "3", "--resume")
    return data, folder / "run", load_file(folder / "longer/checkpoints/step-000003/tuner.safetensors")


def checkpoint_case(title: str, change) -> Case:
    """A copy of a run of two steps after `change(run, last checkpoint)`, resumed for a third step."""

    def run(folder: Path) -> str:
        data, finished, wanted = finished_run()
        copy = folder / "run"
        shutil.copytree(finished, copy, symlinks=True)
        change(copy, copy / "checkpoints/step-000002")
        before = digest(data)
        earlier = (copy / "tuner.safetensors").read_bytes() if (copy / "tuner.safetensors").is_file() else None
        try:
            result, _ = commands.train("--data", str(data), "--output", str(copy), *FLAGS, "--steps", "3", "--resume")
        except Exception as error:
            check_message(error, ["checkpoint", "step-00000", str(copy)])
            now = (copy / "tuner.safetensors").read_bytes() if (copy / "tuner.safetensors").is_file() else None
            if now != earlier:
                raise Failure("the run was refused, and the tuner of the earlier run is gone") from None
            return f"refused: {' '.join(str(error).split())[:300]}"
        own = load_file(copy / "checkpoints/step-000003/tuner.safetensors")
        if own.keys() != wanted.keys() or not all(own[k].equal(wanted[k]) for k in own):
            raise Failure("the run went on to other weights than those of an undisturbed run")
        if len(result.losses) != 3:
            raise Failure(f"the run of 3 steps ends with {len(result.losses)} losses")
        if list(copy.rglob("*.part")):
            raise Failure("an unfinished part was left")
        if digest(data) != before:
            raise Failure("the pictures were changed")
        return "right"

    return Case(f"checkpoint: {title}", run)


def edit_state(edit):
    """A change of state.json that the manifest knows of, as an editor or an older version would make it."""

    def change(run: Path, last: Path) -> None:
        state = json.loads((last / "state.json").read_text())
        edit(state)
        (last / "state.json").write_text(json.dumps(state))
        (last / "files.json").unlink()

    return change


def put(name: str, content: bytes):
    def change(run: Path, last: Path) -> None:
        (last / name).write_bytes(content)

    return change


def checkpoint_cases(seed: int) -> list[Case]:
    names = ("state.json", "tuner.safetensors", "optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl",
             "random_states_0.pkl", "files.json")  # fmt: skip
    cases = [checkpoint_case("unchanged", lambda run, last: None)]
    for name in names:
        rng = random.Random(f"{seed} {name}")
        for mutation in BYTE_MUTATIONS:

            def change(run: Path, last: Path, name=name, mutation=mutation, rng=rng) -> None:
                if (last / name).exists():
                    (last / name).write_bytes(mutation((last / name).read_bytes(), rng))

            cases.append(checkpoint_case(f"{name}, {mutation.__name__}", change))
        for title, change in (
            ("is missing", lambda run, last, n=name: (last / n).unlink(missing_ok=True)),
            ("is empty", put(name, b"")),
            ("is a pickle that would run a command", put(name, pickle.dumps(Harmful()))),
        ):
            cases.append(checkpoint_case(f"{name} {title}", change))
    cases += [
        checkpoint_case(f"state.json, {title}", edit_state(edit))
        for title, edit in (
            ("step is 'a'", lambda s: s.update(step="a")), ("step is -1", lambda s: s.update(step=-1)),
            ("step is 1e9", lambda s: s.update(step=10**9)), ("step is 1.5", lambda s: s.update(step=1.5)),
            ("no step", lambda s: s.pop("step")), ("losses are a text", lambda s: s.update(losses="a")),
            ("losses are too few", lambda s: s.update(losses=[])),
            ("settings are a list", lambda s: s.update(settings=[])),
            ("heldout is a list", lambda s: s.update(heldout=[])), ("an unknown field", lambda s: s.update(more=1)),
            ("digests are a text", lambda s: s.update(digests="a")), ("tuner is null", lambda s: s.update(tuner=None)),
        )
    ]  # fmt: skip
    for title, change in (
        ("state.json is a list", lambda run, last: ((last / "state.json").write_text("[]"),
        (last / "files.json").unlink())),
        ("files.json is a list", put("files.json", b"[]")), ("files.json is null", put("files.json", b"null")),
        ("files.json holds numbers", put("files.json", b'{"state.json": 5}')),
        ("files.json names a file outside", put("files.json", b'{"../../tuner.safetensors": [1, 2]}')),
        ("files.json is a web page", put("files.json", HTML)),
        ("all checkpoints are empty folders", lambda run, last: [
            (shutil.rmtree(f), f.mkdir()) for f in last.parent.iterdir()]),
        ("the folder of checkpoints is a file", lambda run, last: (
            shutil.rmtree(last.parent), last.parent.write_text("x"))),
        ("the last checkpoint is a file", lambda run, last: (shutil.rmtree(last), last.write_text("x"))),
        ("an empty folder of a later step", lambda run, last: last.with_name("step-000009").mkdir()),
        ("a folder of a step that is no number", lambda run, last: last.with_name("step-abc").mkdir()),
        ("an unfinished part", lambda run, last: shutil.copytree(last, last.with_name(".step-000003.part"))),
        ("the last one holds another step", lambda run, last: (
            shutil.rmtree(last), shutil.copytree(last.with_name("step-000001"), last))),
        ("the tuner of the run is cut", lambda run, last: (run / "tuner.safetensors").write_bytes(b"x")),
        ("config.json is cut", lambda run, last: (run / "config.json").write_bytes(b"{")),
        ("the lock is noise", lambda run, last: (run / ".lock").write_bytes(b"\xff\xfe")),
        ("a file from another checkpoint", lambda run, last: shutil.copy(
            last.with_name("step-000001") / "optimizer.bin", last / "optimizer.bin")),
    ):  # fmt: skip
        cases.append(checkpoint_case(title, change))
    return cases


def config_cases(seed: int) -> list[Case]:
    """Odd values of flags. A run that starts must have used the value; one that does not must name the flag."""
    flags = [
        ("steps", "0"), ("steps", "-1"), ("steps", "1e3"), ("steps", "a"), ("steps", ""), ("steps", "1.5"),
        ("steps", "nan"),
        ("batch_size", "0"), ("batch_size", "1000000000"), ("batch_size", "99999999999999999999"), ("batch_size", "7"),
        ("gradient_accumulation_steps", "0"), ("learning_rate", "0"), ("learning_rate", "-1"), ("learning_rate", "nan"),
        ("learning_rate", "inf"), ("learning_rate", "1e30"), ("learning_rate", "1e-300"), ("lr_scheduler", "none"),
        ("lr_warmup_steps", "-1"), ("lr_warmup_steps", "1000000"), ("weight_decay", "nan"), ("weight_decay", "inf"),
        ("weight_decay", "1e30"), ("max_grad_norm", "-1"), ("max_grad_norm", "nan"), ("max_grad_norm", "inf"),
        ("min_snr_gamma", "nan"), ("min_snr_gamma", "inf"), ("caption_dropout", "1.5"), ("caption_dropout", "nan"),
        ("caption_dropout", "1"), ("noise_offset", "inf"), ("noise_offset", "nan"), ("noise_offset", "1e30"),
        ("resolution", "0"), ("resolution", "65"), ("resolution", "-64"), ("resolution", "72"),
        ("resolution", "1000000"),
        ("seed", "-1"), ("seed", "99999999999999999999999"), ("seed", "18446744073709551615"), ("seed", "4294967296"),
        ("checkpoint_every", "0"), ("preview_every", "-1"), ("preview_steps", "0"), ("preview_steps", "2000"),
        ("guidance_scale", "nan"), ("guidance_scale", "-1"), ("guidance_scale", "inf"), ("guidance_scale", "1e30"),
        ("mixed_precision", "fp8"), ("mixed_precision", "fp16"), ("mixed_precision", "bf16"),
        ("stop_when", "memorising"), ("stop_when", "never"), ("report_to", "nothing"),
        ("preview_prompts", ""), ("preview_prompts", "x" * 20_000), ("trigger_words", "x " * 5000),
        ("trigger_words", "\x1b[31m"), ("trigger_words", "a\nb"), ("base", ""), ("base", "/"), ("base", "x" * 5000),
        ("base", "/etc/passwd"), ("base", "~nobody-there/base"), ("base", "a\nb"), ("base", "owner/name"),
        ("data", ""), ("data", "x" * 5000), ("data", "/etc/passwd"), ("data", "~nobody-there/x"), ("data", "a\nb"),
        ("output", ""), ("output", "/proc/x"), ("output", "/etc/passwd"), ("output", "x" * 5000),
        ("output", "/dev/null"),
        ("kind", "none"), ("kind", "full"), ("kind", "res_prompt"), ("rank", "0"), ("rank", "-3"),
        ("rank", "1000000000000"),
        ("rank", "1e2"), ("num_heads", "0"), ("num_heads", "1000000000000"), ("length", "0"), ("ops", "none"),
        ("ops", ""),
        ("attn_drop", "1.5"), ("attn_drop", "nan"), ("attn_drop", "1"), ("proj_drop", "-1"), ("qkv_bias", "perhaps"),
        ("flip", "perhaps"), ("resume", "perhaps"), ("nothing", "1"), ("ffn_kind", "none"), ("push_to_hub", "no id"),
    ]  # fmt: skip

    def make_case(name: str, value: str) -> Case:
        def run(folder: Path) -> str:
            data = folder / "data"
            write_pairs(data, random.Random(name))
            given = ["--data", str(data), "--output", str(folder / "out"), *commands.SHORT]
            # the last of two equal flags counts
            call = lambda: commands.train(*given, f"--{name}={value}")  # noqa: E731

            def find_fault(found) -> str:
                result, _ = found
                used = json.loads(result.config.read_text())
                used = used["train"] | used["tuner"]
                try:
                    wrong = name in used and isinstance(used[name], (int, float)) and float(used[name]) != float(value)
                except ValueError:
                    wrong = str(used[name]) != value
                finite = all(x == x and abs(x) < float("inf") for x in result.losses)
                return f"{name} was used as {used[name]}" if wrong else "" if finite else "the losses are not finite"

            shown = value.encode("unicode_escape").decode()[:20].strip() or "''"
            return judge(call, data, [name, shown, "loss", "memory", "tuner.safetensors"], find_fault)

        return Case(f"setting: --{name} {value[:40]!r}", run)

    return [make_case(name, value) for name, value in flags]
