"""The tasks: what is held out, and what the script that prepares them writes."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from sdtune.evaluation.tasks import read_task
from sdtune.training import dataset

ROOT = Path(__file__).parents[2]


def test_held_out_pairs_have_no_part_in_the_choice_of_the_rate(pairs, tmp_path):
    task = read_task(str(pairs), tmp_path, 128, 100)
    assert {p.name for p in task.train_part} | {p.name for p in task.validation} == {p.name for p in task.train}
    assert not {p.name for p in task.train_part} & {p.name for p in task.validation} and len(task.validation) == 1
    captions = {p.caption for p in task.train}
    assert len(task.test) == 2 and not captions & {p.caption for p in task.test}


def test_both_prepared_tasks_hold_out_the_same_concepts(tmp_path):
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "assets/tasks.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "corpus").mkdir()
    for shift, style in enumerate(script.SEEN + script.UNSEEN):
        rows = [{"style": style, "hexcode": f"{i:X}", "name": f"thing {i}", "tags": [], "colours": [[]] * 3,
                 "ground": [None] * 3} for i in range(shift, 12)]  # fmt: skip
        pictures = np.zeros((len(rows), 3, 128, 128, 3), np.uint8)
        np.savez(tmp_path / "corpus" / f"{style}.npz", pictures=pictures, rows=np.array([json.dumps(r) for r in rows]))
    folders = script.write(tmp_path, train=3, test=5)
    things = []
    for folder in folders:
        read = [dataset.read_pairs(folder, 128, split) for split in ("train", "test")]
        assert [len(pairs) for pairs in read] == [3, 5]
        things.append([p.caption.split(" of ")[1] for pairs in read for p in pairs])
    assert things[0] == things[1] and len(set(things[0])) == 8
    assert all(int(thing.split()[1]) >= 4 for thing in things[0])  # drawn by every designer
