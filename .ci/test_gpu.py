"""A GPU is played by the CPU (`pretend_gpu.py`): tensors on two devices at once are an error, wherever a notebook's models and data lie."""
import subprocess
import sys
from pathlib import Path

import pytest

here = Path(__file__).resolve().parent
trains = ["--only", "numbers", "train_grpo, r", "train_dpo", "train_ppo"]


def pretend(*args):
    "Run it in a process of its own, because it stands in for parts of torch; what it prints where a fault was found"
    r = subprocess.run([sys.executable, str(here/"pretend_gpu.py"), *args], capture_output=True, text=True, cwd=here.parent, timeout=600)
    return "" if r.returncode == 0 else r.stdout+r.stderr[-3000:]


@pytest.mark.parametrize("args", [
    ["selftest"],
    ["limits"],
    ["library"],
    ["library", "--precision", "bf16", *trains],
    ["library", "--precision", "fp16", *trains],
    ["library", "--kind", "mps", "--only", "sample"],
    ["stages", "--precision", "fp16"]], ids=" ".join)
def test_on_a_device(args):
    assert not (said := pretend(*args)), said
