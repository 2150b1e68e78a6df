"""A GPU is played by the CPU (`pretend_gpu.py`): tensors on two devices at once are an error, wherever a notebook's models and data lie.
What is to be measured on a real one (`gpu_check.sh`) runs here too."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

here = Path(__file__).resolve().parent
# notebooks whose models meet on two devices; `.ci/run full` has all of them
mixing = [str(next(here.parent.glob(f"nbs/[0-9]*_{name}.ipynb"))) for name in ("train", "ppo", "dpo")]
trains = ["--only", "numbers", "train_grpo, r", "train_dpo", "train_ppo"]


def pretend(*args):
    "Run it in a process of its own, because it stands in for parts of torch; what it prints where a fault was found"
    r = subprocess.run([sys.executable, str(here/"pretend_gpu.py"), *args], capture_output=True, text=True, cwd=here.parent, timeout=600)
    return "" if r.returncode == 0 else r.stdout+r.stderr[-3000:]


@pytest.mark.parametrize("args", [
    ["selftest"],
    ["limits"],
    ["app"],
    ["resume", "--only", "sft", "reward", "ppo"],
    ["notebooks", "--quick", *mixing],
    ["training"],
    ["library"],
    ["library", "--precision", "bf16", *trains],
    ["library", "--precision", "fp16", *trains],
    ["library", "--kind", "mps"],
    ["stages", "--kind", "mps"],
    ["stages", "--precision", "fp16"]], ids=" ".join)
def test_on_a_device(args):
    assert not (said := pretend(*args)), said


def test_dry_run_of_the_check(tmp_path):
    "A line for each finding, and none of two quick parts is bad; `.ci/run full` runs them all"
    env = os.environ | {"OUT": str(tmp_path)}
    r = subprocess.run(["bash", str(here/"gpu_check.sh"), "dry", "env", "exact"], capture_output=True, text=True, env=env, timeout=900)
    rows = [json.loads(line) for line in open(tmp_path/"results.jsonl", encoding="utf-8")]
    assert r.returncode == 0 and all(o["ok"] for o in rows), r.stdout+r.stderr
    ended = {o["part"]: o["seconds"] for o in rows if o["name"] == "part"}
    assert list(ended) == ["env", "exact"]
    kept = json.loads(next(open(here.parent/"results"/"gpu.jsonl", encoding="utf-8")))
    common = ["date", "card", "commit", "torch", "transformers", "accelerate", "trl", "part", "name", "ok"]
    assert all(set(common) <= set(o) for o in (*rows, kept))     # results/gpu.jsonl takes them as they are
    assert {"python", "cuda"} <= set(rows[0]) and next(o for o in rows if "float64" in o["name"])["G8"] < 2e-4
