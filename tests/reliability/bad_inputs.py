"""Runs the cases, each in an empty folder, in a worker process that loads the base once.

A worker that dies (a crash in a library, no memory) is a failure of the case that ran; another goes on after it.
"""

import contextlib
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

from . import adapter_files, bases, commands, page, pictures, runs
from .cases import Case, Outcome, run_case

MEMORY = 4 << 30  # bytes of address space that a worker may take beyond what it has at its start


def all_cases(seed: int) -> list[Case]:
    return [
        *pictures.picture_cases(seed), *pictures.caption_cases(seed), *pictures.table_cases(seed),
        *adapter_files.tuner_cases(seed), *adapter_files.lora_cases(seed), *bases.base_cases(seed),
        *runs.checkpoint_cases(seed), *runs.config_cases(seed), *page.page_cases(seed),
    ]  # fmt: skip


def run_all(seed: int, share: float = 1.0, only: str = "") -> list[Outcome]:
    """The outcomes of all cases, or of an even share of them, or of those with `only` in their titles."""
    with tempfile.TemporaryDirectory(prefix="sdtune-reliability-") as folder:
        outcomes: dict[int, Outcome] = {}
        count, done = None, False
        while not done:
            log = Path(folder, f"log-{len(outcomes)}.jsonl")
            pid = os.fork()
            if pid == 0:
                _work(seed, share, only, set(outcomes), Path(folder), log)
            _, status = os.waitpid(pid, 0)
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            running = None
            for line in lines:
                if "start" in line:
                    running = line
                elif "count" in line:
                    count = line["count"]
                else:
                    outcomes[line["number"]], running = Outcome(line["title"], line["result"], line["text"]), None
            if running:
                text = f"the process died with status {status}"
                outcomes[running["start"]] = Outcome(running["title"], "failure", text)
            if count is None or not lines:
                raise RuntimeError(f"the worker died with status {status} before its first case")
            done = len(outcomes) == count
        return [outcomes[number] for number in sorted(outcomes)]


def _work(seed: int, share: float, only: str, done: set[int], folder: Path, log: Path) -> None:
    """Runs the cases that are not done, and writes a line before and after each. Does not return."""
    code = 1
    try:
        torch.set_num_threads(1)
        os.chdir(folder)
        commands.loaded_base()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        cases = [c for c in all_cases(seed) if only in c.title]
        cases = [c for i, c in enumerate(cases) if int(i * share) != int((i - 1) * share)] if share < 1 else cases
        with open(log, "a", buffering=1) as file:
            file.write(json.dumps({"count": len(cases)}) + "\n")
            for number, case in enumerate(cases):
                if number in done:
                    continue
                file.write(json.dumps({"start": number, "title": case.title}) + "\n")
                started = time.monotonic()
                outcome = run_case(case, folder / f"case-{number}")
                print(
                    f"{time.monotonic() - started:5.1f} s  {outcome.result:8} {outcome.title}  {outcome.text[:160]!r}",
                    flush=True,
                )
                file.write(json.dumps({"number": number, **vars(outcome)}) + "\n")
                shutil.rmtree(folder / f"case-{number}", ignore_errors=True)
        code = 0
    finally:
        with contextlib.suppress(Exception):
            if code:
                import traceback

                traceback.print_exc()
        os._exit(code)
