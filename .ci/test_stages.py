"A method is a row of the table of stages and a notebook: one is added to a copy of the package, and trained, evaluated, judged and reported like the others"
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
row = "    Stage('rloo', 'rloo_model', 'rloo:rloo_stage', ('reward',), settings='grpo', policy='rloo', label='RLOO', colour='#cc78bc'),\n"
module = '''
"Each answer against the mean of the other answers to the same prompt (Ahmadian et al. 2024)"
from rlhf_nb.core import child_seed
from rlhf_nb.grpo import grpo_step
from rlhf_nb.rollout import n_rollouts,rollouts
from rlhf_nb.train import fit

def leave_one_out(b):
    "Advantages of a rollout, (B,G)"
    n = b.scores.shape[1]
    return b.plus(advantages=(b.scores-b.scores.mean(1, keepdim=True))*n/(n-1))

def train_rloo(policy, reference, score, prompts, o, seed, run, watch, acc, dev, rows, dev_rows):
    "Dev data are not looked at"
    def mk_updates(start):
        return rollouts(policy, reference, score, prompts, o, leave_one_out, o.group_size, 1, 1, child_seed(seed, 'rloo'), start, watch, acc, rows)
    return fit(policy, mk_updates, lambda net,b,n: grpo_step(net, b, n, o), o, n_rollouts(o, len(prompts)), run, 'rloo', acc=acc)

def rloo_stage(line):
    parts = line.rl_parts('rloo')
    train_rloo(**parts)
    line.save(parts['policy'], 'rloo')
'''
tiny = """world.n_corpus=300 world.n_facts=50 world.n_pairs=60 world.n_dev=12 world.n_test=12 world.n_ood=8 model.n_layer=1 model.n_embd=16 model.n_head=2 data.max_prompt=100 device=cpu jobs=1
    sft.updates=8 sft.batch_size=8 reward.updates=8 reward.batch_size=8 reward.n_normalise=16 dpo.updates=4 dpo.batch_size=8
    grpo.updates=3 grpo.batch_size=4 grpo.group_size=3 grpo.max_new_tokens=8 eval.n_prompts=8 eval.max_new_tokens=12 eval.batch_size=8""".split()


@pytest.fixture
def package(tmp_path):
    "A folder with a copy of the package that has the row and the module"
    shutil.copytree(root/"rlhf_nb", tmp_path/"rlhf_nb", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path/"rlhf_nb"/"rloo.py").write_text(module, "utf-8")
    table = tmp_path/"rlhf_nb"/"run.py"
    rows, end, after = table.read_text("utf-8").partition("]\ntrained = ")
    table.write_text(rows+row+end+after, "utf-8")
    return tmp_path


def test_new_stage(package):
    def rlhf_nb(*args):
        p = subprocess.run([sys.executable, "-m", "rlhf_nb", *args], cwd=package, env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True, text=True)
        assert p.returncode == 0, p.stdout+p.stderr
        return p.stdout
    sets = [o for s in tiny for o in ("--set", s)]
    rlhf_nb("run", "--out", "run", "--stages", "sft", "reward", "dpo", *sets)
    rlhf_nb("train", "rloo", "--out", "run", *sets)
    said = rlhf_nb("run", "--out", "run", "--resume", "--stages", "evaluate", "judge", "failures", "analyze", *sets)
    run = package/"run"
    assert len((run/"logs"/"rloo.jsonl").read_text("utf-8").splitlines()) == 3 and (run/"rloo_model"/"config.json").exists()
    assert "RLOO" in said, said          # by its label
    read = lambda name: json.loads((run/name).read_text("utf-8"))
    assert len(read("output_samples/rloo_samples.json")) == 8
    (found,) = read("results/summary.json")["seeds"].values()
    assert list(found["models"]) == ["reference", "dpo", "rloo"]
    for judge, rates in read("results/win_rates.json")["seeds"]["0"].items():
        assert set(rates) >= {"dpo", "rloo"}, judge
    assert "rloo" in (run/"results"/"ANALYSIS.md").read_text("utf-8").lower()
