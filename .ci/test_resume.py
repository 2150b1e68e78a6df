"A stage that is killed, at any moment and again and again, ends with the bits of one that was left alone"
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from torch import nn

from tiny import batch, fork, lm, timeless
from rlhf_nb.core import Run, load_config, replacing
from rlhf_nb.dpo import train_dpo
from rlhf_nb.grpo import train_grpo
from rlhf_nb.models import mk_reward_model, mk_value_model
from rlhf_nb.ppo import train_ppo
from rlhf_nb.reward import train_reward
from rlhf_nb.sft import train_sft
from rlhf_nb.train import mk_accelerator

updates, every = 24, 3
sizes = [12, 25, 9, 18, 30, 14, 21, 16, 11, 28, 19]
settings = dict(updates=updates, checkpoint_every=every, batch_size=4, micro_tokens=60, lr=3e-3, eval_every=4, patience=99)
rl = dict(max_new_tokens=4, no_eos_penalty=.5)
config = load_config("demo", [f"{stage}.{k}={v}" for stage, more in dict(
    sft={}, reward=dict(center=.01), ppo=dict(rl, epochs=1, mini_batches=2, schedule="cosine"), grpo=dict(rl, group_size=3, inner=2), dpo=dict(sft_weight=.1),
).items() for k, v in (settings | more).items()])


def even(b):
    "The reward: tokens of the response with an even number"
    return ((b.responses % 2 == 0) & b.mask).float().sum(-1)


def train(stage, run=None):
    "Train the stage in the run folder; its model and its metrics rows"
    o, model, prompts = getattr(config, stage), lm(), batch(1, sizes).prompts
    unseen = lambda groups: batch(groups, sizes, longest=4, seed=1)
    last = dict(seed=3, run=run, acc=mk_accelerator(device="cpu"))
    if stage == "sft":
        rows = train_sft(model, batch(1, sizes), o, **last, dev=unseen(1))
    elif stage == "reward":
        model = mk_reward_model(model, o.head)
        rows = train_reward(model, batch(2, sizes, longest=4), o, **last, dev=unseen(2))
    elif stage == "ppo":
        model = nn.ModuleDict(dict(policy=model, value=mk_value_model(model)))
        rows = train_ppo(*model.values(), lm(), even, prompts, o, **last, dev=unseen(1).prompts)
    elif stage == "grpo":
        rows = train_grpo(model, lm(), even, prompts, o, **last, dev=unseen(1).prompts)
    else:
        rows = train_dpo(model, lm(), batch(2, sizes, longest=4), o, **last, dev=unseen(2))
    return model, rows


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    "`begin(folder)` makes it a run folder where nothing has happened yet"
    new = tmp_path_factory.mktemp("new")
    Run(new/"run", config)
    train("sft")  # forks need not import what this imports
    return lambda folder: shutil.copytree(new, folder, dirs_exist_ok=True)


def work(stage, folder):
    "What a process does"
    model, rows = train(stage, Run(folder/"run", config, resume=True))
    with replacing(folder/"done.pt") as tmp:
        torch.save(dict(weights=model.state_dict(), rows=rows), tmp)


def go(stage, folder, moment=lambda: False, pause=0.):
    "Start or resume the stage in a process of its own; SIGKILL it `pause` seconds after `moment()` is true. Was it still at work?"
    pid, late = fork(work, stage, folder), time.monotonic()+60
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if moment() or time.monotonic() > late:
            time.sleep(pause)
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(.001)
    assert time.monotonic() < late, "it hangs"
    if os.WIFSIGNALED(ended[1]):
        return os.WTERMSIG(ended[1]) == signal.SIGKILL and not (folder/"done.pt").exists()
    assert os.WEXITSTATUS(ended[1]) == 0, "it failed: see its traceback in the output"
    return False


def n_rows(log):
    return log.read_bytes().count(b"\n") if log.exists() else 0


def check(stage, folder, want):
    "The run in `folder` has ended as the one that was left alone"
    got = torch.load(folder/"done.pt")
    assert list(got["weights"]) == list(want["weights"])
    differ = [k for k, v in want["weights"].items() if not torch.equal(v, got["weights"][k])]
    assert not differ, f"other bits in {len(differ)} of {len(want['weights'])} tensors"
    assert [r["update"] for r in got["rows"]] == list(range(updates))
    assert [r["dev_update"] for r in got["rows"] if "dev_update" in r] == [0, *range(4, updates+1, 4)] and "kept" in got["rows"][-1]
    assert timeless(got["rows"]) == timeless(want["rows"])
    assert Run(folder/"run").rows(stage) == got["rows"]
    return got["rows"]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "grpo", "dpo"])
def test_killed(stage, begin, tmp_path):
    "SIGKILL at five random moments, then once while a checkpoint is being written, all in one run folder"
    rng = random.Random(f"7 {stage}")
    alone, folder = tmp_path/"alone", tmp_path/"killed"
    begin(alone)
    assert not go(stage, alone)
    want = torch.load(alone/"done.pt")
    pace = sum(v for r in want["rows"] for k, v in r.items() if "seconds" in k)/updates  # seconds of an update
    log, checkpoint = folder/"run"/"logs"/f"{stage}.jsonl", folder/"run"/"checkpoints"/f"{stage}.pt"
    part = checkpoint.with_name(f".{stage}.pt.part")
    begin(folder)

    def kill(moment, pause=0.):
        "Kill it once. A machine too busy for that lets the run end: it is checked like any other, and begun again"
        for _ in range(20):
            if go(stage, folder, moment, pause):
                return n_rows(log)
            check(stage, folder, want)
            shutil.rmtree(folder)
            begin(folder)
        raise AssertionError("it always ends before it is killed")

    kills = [0]
    for n in sorted(rng.sample(range(1, updates*2//3), 5)):
        kills.append(kill(lambda: n_rows(log) >= max(n, kills[-1]+1), rng.random()*pace))
    for _ in range(100):
        n = kill(lambda: part.exists() and checkpoint.exists())
        if part.exists():
            break
    assert part.exists(), "never killed while a checkpoint was written"
    kept = [json.loads(l) for l in log.read_text("utf-8").split("\n")[:torch.load(checkpoint)["update"]]]
    assert len(kills) == 6 and len(kept) >= every
    assert not go(stage, folder)
    rows = check(stage, folder, want)
    assert rows[:len(kept)] == kept, "done again, times and all: it did not go on from the checkpoint"
    print(f"{stage}: killed after {kills[1:]} and {n} of {updates} updates; {pace*1000:.0f} ms each")


def interrupted(stage, folder):
    "What a kill after some checkpoints leaves: the run, its log and checkpoint"
    log = folder/"run"/"logs"/f"{stage}.jsonl"
    assert go(stage, folder, lambda: n_rows(log) > 2*every)
    return Run(folder/"run"), log, folder/"run"/"checkpoints"/f"{stage}.pt"


def test_half_a_line(begin, tmp_path):
    "A last line that the kill cut short goes; one in the middle is an error that names its place"
    begin(tmp_path)
    run, log, checkpoint = interrupted("sft", tmp_path)
    start, lines = torch.load(checkpoint)["update"], log.read_text("utf-8").splitlines(keepends=True)
    log.write_text("".join(lines[:start])+lines[0][:-20], "utf-8")
    assert run.rows("sft") == [json.loads(l) for l in lines[:start]]
    _, rows = train("sft", run)
    assert [r["update"] for r in rows] == list(range(updates)) and run.rows("sft") == rows
    assert rows[:start] == [json.loads(l) for l in lines[:start]]
    log.write_text(lines[0]+lines[1][:-20]+"\n"+lines[2], "utf-8")
    with pytest.raises(ValueError, match=r"sft\.jsonl, line 2: not valid JSON"):
        train("sft", run)


def test_bad_checkpoint(begin, tmp_path):
    "A checkpoint that can't be read, or is not this stage's, is an error that names the file; nothing is written over"
    begin(tmp_path)
    run, log, checkpoint = interrupted("ppo", tmp_path)
    good, rows = checkpoint.read_bytes(), log.read_bytes()
    other = tmp_path/"other.pt"
    torch.save(dict(model={}, opt={}, update=3), other)
    for bad in (b"", good[:len(good)//2], good[:-1], b"no checkpoint", other.read_bytes()):
        checkpoint.write_bytes(bad)
        with pytest.raises(ValueError, match=r"(?s)checkpoints.ppo\.pt: not a checkpoint of this stage and model .* Remove it to start this stage again"):
            train("ppo", run)
        assert checkpoint.read_bytes() == bad and log.read_bytes() == rows
    checkpoint.write_bytes(good)
    assert [r["update"] for r in train("ppo", run)[1]] == list(range(updates))
