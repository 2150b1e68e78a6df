"A stage that is killed, at any moment and again and again, ends with the bits of one that was left alone"
import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tiny import batch, fork, lm, timeless
import rlhf_nb.report  # noqa: F401 forks need not import it
from rlhf_nb.cli import main
from rlhf_nb.core import replacing
from rlhf_nb.config import LoraConfig
from rlhf_nb.settings import load_config
from rlhf_nb.run import Run
from rlhf_nb.dpo import train_dpo
from rlhf_nb.grpo import train_grpo
from rlhf_nb.models import mk_reward_model,mk_value_model
from rlhf_nb.adapters import adapt
from rlhf_nb.ppo import train_ppo
from rlhf_nb.reward import train_reward
from rlhf_nb.sft import train_sft
from rlhf_nb.train import mk_accelerator

updates, every = 24, 3
sizes = [12, 25, 9, 18, 30, 14, 21, 16, 11, 28, 19]
settings = dict(updates=updates, checkpoint_every=every, batch_size=4, micro_tokens=60, lr=3e-3, eval_every=4, patience=99)
rl = dict(max_new_tokens=4, no_eos_penalty=.5)
config = load_config("demo", [f"{stage}.{k}={v}" for stage, more in dict(
    sft={}, reward=dict(center=.01), ppo=dict(rl, epochs=1, mini_batches=2, schedule="cosine", value_warmup=5),
    grpo=dict(rl, group_size=3, inner=2, loss_type="cispo", baseline="leave_one_out", resample_silent=3, eval_samples=2), dpo=dict(sft_weight=.1),
).items() for k, v in (settings | more).items()])


def even(b):
    "The reward: tokens of the response with an even number"
    return ((b.responses % 2 == 0) & b.mask).float().sum(-1)


def train(stage, run=None):
    "Train the stage in the run folder, `+lora`: adapters on one base, `+low`: a copy in bfloat16 samples; its model and its metrics rows"
    stage, *more = stage.split("+")
    lora = "lora" in more
    o, model, prompts = getattr(config, stage), lm(), batch(1, sizes).prompts
    if "low" in more:
        o = replace(o, sampler_dtype="bfloat16")
    reference = None if lora else lm()
    if lora:
        model = adapt(model, LoraConfig(r=4, dropout=.1))
    unseen = lambda groups: batch(groups, sizes, longest=4, seed=1)
    last = dict(seed=3, run=run, acc=mk_accelerator(device="cpu"))
    if stage == "sft":
        rows = train_sft(model, batch(1, sizes), o, **last, dev=unseen(1))
    elif stage == "reward":
        model = mk_reward_model(model, o.head)
        rows = train_reward(model, batch(2, sizes, longest=4), o, **last, dev=unseen(2))
    elif stage == "ppo":
        model = nn.ModuleDict(dict(policy=model, value=mk_value_model(model)))
        rows = train_ppo(*model.values(), reference, even, prompts, o, **last, dev=unseen(1).prompts)
    elif stage == "grpo":
        rows = train_grpo(model, reference, even, prompts, o, **last, dev=unseen(1).prompts)
    else:
        rows = train_dpo(model, reference, batch(2, sizes, longest=4), o, **last, dev=unseen(2))
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
    assert Run(folder/"run").rows(stage.partition("+")[0]) == got["rows"]
    return got["rows"]


@pytest.mark.parametrize("stage", [s+more for s in ("sft", "reward", "ppo", "grpo", "dpo") for more in ("", "+lora")]+["ppo+low", "grpo+lora+low"])
def test_killed(stage, begin, tmp_path):
    "SIGKILL at five random moments, then once while a checkpoint is being written, all in one run folder"
    rng = random.Random(f"7 {stage}")
    alone, folder = tmp_path/"alone", tmp_path/"killed"
    begin(alone)
    assert not go(stage, alone)
    want, kind = torch.load(alone/"done.pt"), stage.partition("+")[0]
    pace = sum(v for r in want["rows"] for k, v in r.items() if "seconds" in k)/updates  # seconds of an update
    log, checkpoint = folder/"run"/"logs"/f"{kind}.jsonl", folder/"run"/"checkpoints"/f"{kind}.pt"
    part = checkpoint.with_name(f".{kind}.pt.part")
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


# The whole command, in a run folder of its own: killed at random moments, started twice, on a full disk

tiny = """world.n_corpus=300 world.n_facts=50 world.n_pairs=60 world.n_dev=12 world.n_test=12 world.n_ood=8 model.n_layer=1 model.n_embd=16 model.n_head=2 data.max_prompt=100 device=cpu
    sft.updates=8 sft.batch_size=8 sft.checkpoint_every=3 reward.updates=8 reward.batch_size=8 reward.checkpoint_every=3 reward.n_normalise=16
    dpo.updates=8 dpo.batch_size=8 dpo.checkpoint_every=3 ppo.updates=6 ppo.batch_size=6 ppo.max_new_tokens=8 ppo.checkpoint_every=2
    grpo.updates=6 grpo.batch_size=4 grpo.group_size=3 grpo.max_new_tokens=8 grpo.checkpoint_every=2 eval.n_prompts=8 eval.max_new_tokens=12 eval.batch_size=8""".split()
everything = ["--stages", "sft", "reward", "dpo", "ppo", "grpo", "last_token", "frontier", "evaluate", "judge", "failures", "analyze"]
kills_in_all = 200 if os.environ.get("RLHF_NB_FULL") else 20
two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: stages never run side by side")


def command(folder, *args, sets=(), before=lambda: None):
    "`rlhf_nb run --out run` in the folder, in a process and a group of its own; what it says is in said.txt there"
    def f():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a script that put the tests in the background had it ignored
        os.chdir(folder)
        before()
        said = os.open("said.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = open(said, "w", buffering=1, encoding="utf-8")
        sys.argv = ["rlhf_nb", "run"]
        flags = [o for s in (*tiny, *sets) for o in ("--set", s)]
        main(["run", "--config", "demo", *flags, "--out", "run", *args])

    def coded():  # what sys.exit says becomes the code; anything else is printed, and 1
        try:
            f()
        except SystemExit as e:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(e.code or 0)
    return fork(coded)


def ended(pid, seconds=0.):
    "The exit code of a process that ends within so many seconds (a negative one: the signal); None: it is still at work"
    late = time.monotonic()+seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > late:
            return None
        time.sleep(.005)


def working(pid):
    "Does the process run? One that has ended and that nobody has waited for does not"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid):
    try:
        return [int(o) for o in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def until(f, seconds=20.):
    late = time.monotonic()+seconds
    while not f() and time.monotonic() < late:
        time.sleep(.01)
    return f()


def kept(folder):
    "What a run leaves, without times and the base's place: bytes of weights and tables, rows of logs, what JSON says"
    def clean(o):
        if isinstance(o, dict):
            return {k: clean(v) for k, v in o.items() if not any(w in k for w in ("second", "peak_memory", "jobs", "command", "base"))}
        return [clean(v) for v in o] if isinstance(o, list) else o
    out = {}
    for f in sorted(folder.rglob("*")):
        name = f.relative_to(folder).as_posix()
        if not f.is_file() or name.startswith("checkpoints/") or f.suffix in (".png", ".md") or name in ("results/seconds.json", "results/cpu_seconds.json", "config.yaml") or "training_analysis" in name:
            continue
        if f.suffix == ".jsonl":
            out[name] = clean([json.loads(l) for l in f.read_text("utf-8").splitlines()])
        elif f.suffix == ".json":
            out[name] = clean(json.loads(f.read_text("utf-8")))
        else:
            out[name] = f.read_bytes()
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "`alone(*sets)`: what a run leaves that nobody disturbed, and how long it took"
    @functools.cache
    def made(*sets):
        folder = tmp_path_factory.mktemp("alone")
        t = time.monotonic()
        assert ended(command(folder, *everything, sets=["jobs=1", *sets]), 300) == 0, (folder/"said.txt").read_text()
        return kept(folder/"run"), time.monotonic()-t
    return made


def same(folder, want):
    got = kept(folder/"run")
    assert sorted(got) == sorted(want)
    assert not [k for k in want if got[k] != want[k]]
    assert not [o for o in (folder/"run").rglob(".*")], "left behind"


def survive(folder, rng, sets, victim, n, seconds, want):
    "Kill the run n times, parent or child, each time while it goes on where it was; then let it end"
    for i in range(n):
        pid = command(folder, *everything, "--resume", sets=sets)
        if victim == "child":
            until(lambda: children(pid) or not working(pid), 60)
        time.sleep(rng.random()*min(seconds, 2.5))
        kids = children(pid)
        hit = rng.choice(kids) if victim == "child" and kids else pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(hit, signal.SIGKILL)
        code = ended(pid, 60)
        assert code in ((-9, 0) if hit == pid else (2, 0)), (folder/"said.txt").read_text()[-2000:]
        if hit == pid and rng.random() < .5:  # half of the time the next start is at once
            assert until(lambda: not any(map(working, kids)), 5), "orphans"
    code = ended(command(folder, *everything, "--resume", sets=sets), 300)
    assert code == 0, (folder/"said.txt").read_text()[-2000:]
    assert "Traceback" not in (folder/"said.txt").read_text()
    same(folder, want)


@pytest.mark.parametrize("jobs, victim, more", [(1, "parent", ()), (1, "parent", ("model.lora.r=2",)),
                                                pytest.param(2, "parent", (), marks=two_cores), pytest.param(2, "child", (), marks=two_cores)])
def test_command_killed(jobs, victim, more, alone, tmp_path):
    "kill -9 at random moments of all stages, of the run or of one of its two stages: it resumes to the bits of a run that was left alone"
    rng = random.Random(f"5 {jobs} {victim} {more}")
    n = -(-kills_in_all//3)
    want, seconds = alone(*more)
    for i in range(-(-n//7)):
        (folder := tmp_path/str(i)).mkdir()
        survive(folder, rng, [f"jobs={jobs}", *more], victim, min(7, n-7*i), seconds/4, want)
        shutil.rmtree(folder)


@two_cores
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_children_end(sign, tmp_path):
    "Whatever ends the run, its two stages end with it"
    pid = command(tmp_path, "--stages", "sft", "reward", "dpo", sets=["jobs=2", "dpo.updates=20000", "reward.updates=20000"])
    assert until(lambda: all(n_rows(tmp_path/"run"/"logs"/f"{s}.jsonl") > 3 for s in ("reward", "dpo")), 60)
    kids = children(pid)
    assert len(kids) == 2
    os.kill(pid, sign)
    try:
        assert ended(pid, 10) == (130 if sign == signal.SIGINT else -sign)
        assert until(lambda: not any(map(working, kids)), 3), "orphans"
    finally:
        for k in filter(working, kids):
            os.kill(k, signal.SIGKILL)


def test_second_writer(tmp_path):
    "Ten starts beside a run at work are refused in one line that says who is there, since when; it is not disturbed"
    first = command(tmp_path, "--stages", "sft", sets=["sft.updates=20000", "jobs=1"])
    log = tmp_path/"run"/"logs"/"sft.jsonl"
    assert until(lambda: n_rows(log) > 3, 60)
    (tmp_path/"said.txt").write_text("")
    others = [command(tmp_path, "--stages", "sft", "--resume", sets=["sft.updates=20000", "jobs=1"]) for _ in range(10)]
    assert [ended(p, 60) for p in others] == [2]*10
    said = [l for l in (tmp_path/"said.txt").read_text().splitlines() if "rlhf_nb: " in l]   # the first one's progress stands there too
    assert len(said) == 10 and all(f"run is being written by process {first} of " in l and "s ago" in l for l in said), said
    n = n_rows(log)
    assert until(lambda: n_rows(log) > n) and working(first)
    os.kill(first, signal.SIGKILL)
    ended(first, 10)
    rows = [json.loads(l)["update"] for l in log.read_text().split("\n")[:-1]]
    assert rows == list(range(len(rows)))


def test_two_starts_at_once(tmp_path):
    "Of two starts in the same moment one works and the other is refused, ten times of ten"
    for i in range(10):
        (folder := tmp_path/str(i)).mkdir()
        both = [command(folder, "--stages", "sft", sets=["sft.updates=20000", "jobs=1"]) for _ in range(2)]
        assert until(lambda: n_rows(folder/"run"/"logs"/"sft.jsonl") > 1, 60)
        codes = {}
        assert until(lambda: any(codes.setdefault(p, c) is not None for p in both if p not in codes and (c := ended(p)) is not None) or codes, 20), "two at work"
        assert list(codes.values()) == [2], (folder/"said.txt").read_text()
        winner = next(p for p in both if p not in codes)
        assert f"is being written by process {winner} of " in (folder/"said.txt").read_text() and working(winner)
        os.kill(winner, signal.SIGKILL)
        ended(winner, 10)


@pytest.mark.parametrize("size", [100, 1000, 12000, 40000])
def test_full_disk(size, alone, tmp_path):
    "No file can be larger than so many bytes, as on a disk that is full: one line that names the file; what was there is there, and with space again the run ends as it should"
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    (tmp_path/"said.txt").write_text("")
    code = ended(command(tmp_path, *everything, sets=["jobs=1"], before=limit), 120)
    said = (tmp_path/"said.txt").read_text()
    if code is not None and size > 100:  # the line itself has to fit into said.txt
        assert code == 2 and "Traceback" not in said and ": not written: " in said.splitlines()[-1], said
    assert code not in (0, None)
    assert not [o for o in (tmp_path/"run").rglob("*.part")] if (tmp_path/"run").exists() else True
    assert ended(command(tmp_path, *everything, "--resume", sets=["jobs=1"]), 300) == 0, (tmp_path/"said.txt").read_text()[-2000:]
    same(tmp_path, alone()[0])
