"""The figures of a run of the harness, as Markdown."""

from collections import Counter

from .cases import Outcome
from .kills import Trial


def write(seed: int, commit: str, outcomes: list[Outcome], trials: list[Trial], killed: float, seconds: float) -> str:
    kinds = list(dict.fromkeys(o.title.partition(":")[0] for o in outcomes))
    rows = []
    for kind in kinds:
        counts = Counter(o.result for o in outcomes if o.title.partition(":")[0] == kind)
        rows.append((kind, counts.total(), counts["right"], counts["refused"], counts["failure"]))
    total = [sum(row[i] for row in rows) for i in range(1, 5)]
    rows.append(("all", *total))
    table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    kills = [place for t in trials for place in t.kills]
    during = sum("during a write" in place for place in kills)
    by_settings = Counter()
    for t in trials:
        by_settings[t.settings] += len(t.kills)
    settings = "\n".join(
        f"| `{name}` | {count} | {sum(bool(t.fault) for t in trials if t.settings == name)} |"
        for name, count in by_settings.items()
    )
    failures = [f"- {o.title}: {o.text}" for o in outcomes if o.result == "failure"]
    failures += [f"- `{t.settings}`, killed {'; '.join(t.kills)}: {t.fault}" for t in trials if t.fault]
    return f"""# Bad inputs and killed runs

```sh
python -m tests.reliability --seed {seed} --report assets/results/reliability.md
```

Commit {commit}, seed {seed}, one CPU core, {seconds / 60:.0f} minutes. Another seed tries other inputs and moments.

## Bad inputs

Each input is made or changed by the seed, and goes through the real entry point: `train_anime.py`, `load_tuner`,
`load_base`, `--resume`, or the page's functions. *Right*: it was accepted, and the result agrees with an independent
reading of the input. *Refused*: by an error of ours that names it. A *failure* is any other exception, a result that is
silently wrong, an input file that was changed, a crash of the process, or more than 60 s.

| input | tried | right | refused | failures |
| --- | ---: | ---: | ---: | ---: |
{table}

## Killed runs

{len(kills)} runs of `train_anime.py` were killed (SIGKILL) at random times, {during} of them while a file was being
written, and continued with `--resume` (with the same command where there was no checkpoint yet). Each ended with the
weights and losses of an undisturbed run, bit for bit; after each kill all checkpoints were whole, and a finished result
beside the run was unchanged. This part took {killed / 60:.0f} minutes.

| settings of the run (6 steps) | kills | failures |
| --- | ---: | ---: |
{settings}

## Failures

{chr(10).join(failures) or "None."}
"""
