"Several processes make what one process makes: gradients, samples, models, reports; each does its share; one that dies takes all along"
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from tiny import batch, fork, lm, timeless
import rlhf_nb.sampling
import rlhf_nb.train
from rlhf_nb.adapters import adapt
from rlhf_nb.config import DPOConfig,GRPOConfig,LoraConfig,PPOConfig,RewardConfig,SFTConfig
from rlhf_nb.parallel import together
from rlhf_nb.dpo import train_dpo
from rlhf_nb.grpo import train_grpo
from rlhf_nb.models import log_probs,mk_reward_model,mk_value_model,scores
from rlhf_nb.ppo import train_ppo
from rlhf_nb.reward import train_reward
from rlhf_nb.sft import train_sft
from rlhf_nb.stats import ratio_of
from rlhf_nb.parallel import add_gradients
from rlhf_nb.train import mk_accelerator

root = Path(__file__).resolve().parent.parent
sizes = [12, 25, 9, 18, 30, 14, 21, 16, 11, 28, 19]  # odd, and of unequal length
updates = 10
common = dict(updates=updates, batch_size=7, micro_tokens=60, lr=3e-3, eval_every=5, patience=None)
rl = dict(common, max_new_tokens=6)


def even(b):
    "The reward: tokens of the response with an even number"
    return ((b.responses % 2 == 0) & b.mask).float().sum(-1)


def train(stage, lora):
    "Train a stage: its model, its rows, and what its policy has said in the first update"
    seen, model = [], lm()
    reference = None if lora else lm()
    if lora:
        model = adapt(model, LoraConfig(r=4))
    last = dict(seed=3, acc=mk_accelerator(device="cpu"))
    prompts, dev = batch(1, sizes).prompts, batch(1, sizes[:2], seed=1).prompts
    def score(b):
        seen.append(b.tokens())
        return even(b)
    if stage == "sft":
        rows = train_sft(model, batch(1, sizes), SFTConfig(**common), **last, dev=batch(1, sizes[:2], seed=1))
    elif stage == "reward":
        model = mk_reward_model(model, "last_token")
        rows = train_reward(model, batch(2, sizes, longest=4), RewardConfig(**common), **last, dev=batch(2, sizes[:5], longest=4, seed=1))
    elif stage.startswith("dpo"):
        o = DPOConfig(sft_weight=.1, cache_reference=stage == "dpo", **common)
        rows = train_dpo(model, reference, batch(2, sizes, longest=4), o, **last, dev=batch(2, sizes[:5], longest=4, seed=1))
    elif stage == "ppo":
        model = nn.ModuleDict(dict(policy=model, value=mk_value_model(model)))
        rows = train_ppo(*model.values(), reference, score, prompts, PPOConfig(epochs=2, mini_batches=2, value_warmup=2, **rl), **last, dev=dev)
    else:
        # a copy in less than float32 answers other processes otherwise, to its rounding
        copy = "float32" if stage == "grpo-copy" else None
        o = GRPOConfig(group_size=3, inner=2, resample_silent=3, sampler_dtype=copy, **rl)
        rows = train_grpo(model, reference, score, prompts, o, **last, dev=dev)
    return model, rows, seen


def says(stage, model):
    "Log-probabilities of some answers, or scores"
    with torch.no_grad():
        return scores(model, batch(2, sizes, seed=5)) if stage == "reward" else log_probs(model["policy"] if stage == "ppo" else model, batch(2, sizes, seed=5))


stages = [(s, lora) for s in ("sft", "reward", "dpo", "dpo-live", "ppo", "grpo", "grpo-copy") for lora in (False, True)]


def all_stages():
    "What each stage leaves in this process, the first gradient and the tokens read for training and written"
    out = {}
    clip, pieces_of, steps = nn.utils.clip_grad_norm_, rlhf_nb.train.own_pieces, rlhf_nb.sampling.from_steps
    for stage, lora in stages:
        grads, count = [], dict(read=0, written=0)
        def clipped(parameters, most):
            ps = list(parameters)
            grads.append([p.grad.clone() for p in ps if p.grad is not None])
            return clip(ps, most)
        def counted_pieces(*a):
            pieces = pieces_of(*a)
            count["read"] += sum(sum(b.sizes) for b in pieces)
            return pieces
        def counted_steps(prompts, said, stop_ids):
            b = steps(prompts, said, stop_ids)
            if stop_ids:  # a check of the model has none, and is each process's own
                count["written"] += int(b.mask.sum())
            return b
        with patch.object(nn.utils, "clip_grad_norm_", clipped), patch.object(rlhf_nb.train, "own_pieces", counted_pieces), \
                patch.object(rlhf_nb.sampling, "from_steps", counted_steps):
            model, rows, seen = train(stage, lora)
        out[stage, lora] = dict(grad=torch.cat([g.flatten() for g in grads[0]]), rows=timeless(rows), seen=seen, says=says(stage, model), count=count,
                                weights={k: v.clone() for k, v in model.state_dict().items()})
    return out


def in_processes(k, f, folder):
    "`f()` in k processes, forks of this one: what each of them returns"
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    def work(r):
        os.environ |= dict(WORLD_SIZE=str(k), RANK=str(r), LOCAL_RANK=str(r), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        AcceleratorState._reset_state(reset_partial_state=True)  # a fork inherits what its parent knew: one process
        GradientState._reset_state()
        torch.save(f(), folder/f"{r}.pt")
    pids = [fork(work, r) for r in range(k)]
    assert [os.waitpid(p, 0)[1] for p in pids] == [0]*k, "a process failed: see its traceback in the output"
    return [torch.load(folder/f"{r}.pt", weights_only=False) for r in range(k)]


@pytest.fixture(scope="module")
def one():
    return all_stages()


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def several(request, one, tmp_path_factory):
    return in_processes(request.param, all_stages, tmp_path_factory.mktemp("several"))


@pytest.mark.parametrize("stage", stages, ids=lambda o: o[0]+"+lora"*o[1])
def test_update(stage, one, several):
    "The first gradient, the samples, ten updates and their metrics, the looks at dev data, and the same bits in all processes"
    want = one[stage]
    for got in (o[stage] for o in several):
        off = (got["grad"]-want["grad"]).norm()/want["grad"].norm()
        assert off <= 1e-6, f"the first gradient is off by {off:.1e}"
        assert got["seen"][:1] == want["seen"][:1]
        assert (got["says"]-want["says"]).abs().max() <= 1e-4
        assert len(got["rows"]) == len(want["rows"]) == updates
        for r, w in zip(got["rows"], want["rows"]):
            # DPO begins where all margins are 0, and rounding says who is ahead
            tossed = {"accuracy"} if stage[0].startswith("dpo") and r["update"] == 0 else set()
            assert {k: v for k, v in r.items() if k not in tossed} == pytest.approx({k: v for k, v in w.items() if k not in tossed}, rel=1e-3, abs=1e-4)
        first = several[0][stage]
        assert all(torch.equal(v, first["weights"][k]) for k, v in got["weights"].items()), "models part"
    assert several[0][stage]["rows"] == several[-1][stage]["rows"]


@pytest.mark.parametrize("stage", stages, ids=lambda o: o[0]+"+lora"*o[1])
def test_shares(stage, one, several):
    "Together the processes read and write what one process does, and none much more than its share"
    k, want = len(several), one[stage]["count"]
    for what, n in want.items():
        each = [o[stage]["count"][what] for o in several]
        assert sum(each) == pytest.approx(n, rel=.01), what
        # of 7 prompts or of the 2 that are looked at, 3 processes cannot have a third each
        assert not n or max(each) <= 1.6*n/k, f"{what}: {each}"


def test_nobody(tmp_path):
    "A gradient that one process alone has is everyone's; one that nobody has stays away, so that no optimizer moves its parameter"
    def work():
        ps = [nn.Parameter(torch.ones(2)) for _ in range(3)]+[nn.Parameter(torch.ones(1), requires_grad=False)]
        r = int(os.environ["RANK"])
        ps[0].grad = torch.full((2,), r+1.)
        if r:
            ps[1].grad = torch.full((2,), 5.)
        with together():
            add_gradients(ps)
        return [p.grad if p.grad is None else p.grad.tolist() for p in ps]
    assert in_processes(2, work, tmp_path) == [[[3., 3.], [5., 5.], None, None]]*2


# ---- the command line

tiny = """world.n_corpus=300 world.n_facts=50 world.n_pairs=60 world.n_dev=12 world.n_test=12 world.n_ood=8 model.n_layer=1 model.n_embd=16
    model.n_head=2 data.max_prompt=100 device=cpu jobs=1 sft.updates=8 sft.batch_size=7 reward.updates=8 reward.batch_size=8 reward.n_normalise=16
    dpo.updates=4 dpo.batch_size=7 ppo.updates=3 ppo.batch_size=5 ppo.mini_batches=2 ppo.max_new_tokens=8 grpo.updates=3 grpo.batch_size=5
    grpo.group_size=3 grpo.max_new_tokens=8 eval.n_prompts=7 eval.max_new_tokens=12 eval.batch_size=4""".split()
lora = ["model.lora.r=4", "dpo.eval_every=2", "grpo.eval_every=2"]
whole = "sft reward dpo ppo grpo frontier evaluate judge failures analyze".split()
env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def command(k, *args, sets=(), program=("-m", "rlhf_nb")):
    "The command line of a run in `k` processes"
    if program[0] != "-m" or k > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(k), *program]
    else:
        start = [sys.executable, *program]
    return [*start, *map(str, args), *(o for s in (*tiny, *sets) for o in ("--set", s))]


def run(*args, **kw):
    return subprocess.run(command(*args, **kw), env=env, capture_output=True, text=True, timeout=600)


def share_of(o):
    "The share of best-of-n's gain that the two gains make, with Fieller's interval; as JSON has it, an end that is not there is null"
    turned = dict(o["short"], low=-o["short"]["high"], high=-o["short"]["low"])
    return {k: v if math.isfinite(v) else None for k, v in ratio_of(o["gain"], o["best_gain"], turned).items()}


def differences(a, b, where=""):
    "What differs in two results by more than rounding"
    if isinstance(a, dict) and isinstance(b, dict):
        # paths, what is made of them, and a p, which comes of differences that are nothing but rounding
        left = {"command", "report_command", "config", "samples", "peak_memory", "seconds", "costs", "base", "mark", "p", "p_holm"}
        if "best_gain" in a and "best_gain" in b:
            # a share of next to nothing may be anything: it must be that of the numbers beside it, which are compared
            left.add("share")
            for o in (a, b):
                yield from differences(o["share"], share_of(o), f"{where}.share")
        for k in {*a, *b}:
            if k not in left and "seconds" not in k:
                yield from differences(a.get(k), b.get(k), f"{where}.{k}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for x, y in zip(a, b):
            yield from differences(x, y, where)
    elif isinstance(a, float) and isinstance(b, float):
        if not math.isclose(a, b, rel_tol=2e-3, abs_tol=2e-3):
            yield f"{where}: {a} and {b}"
    elif a != b:
        yield f"{where}: {str(a)[:80]} and {str(b)[:80]}"


def compare(a, b):
    "Two run folders hold the same files, samples and numbers"
    files = [{f.relative_to(o) for f in o.rglob("*") if f.is_file()} for o in (a, b)]
    assert files[0] == files[1]
    read = lambda f: [json.loads(l) for l in f.read_text("utf-8").splitlines()] if f.suffix == ".jsonl" else json.loads(f.read_text("utf-8"))
    for f in sorted(files[0]):
        if f.suffix in (".json", ".jsonl") and f.name not in ("seconds.json", "cpu_seconds.json", "config.json", "adapter_config.json"):
            assert not list(differences(read(a/f), read(b/f))), f


@pytest.mark.parametrize("k,sets,stages", [(3, [], whole), (2, lora, whole[:-1])], ids=["three", "two-lora"])
def test_line(k, sets, stages, tmp_path):
    "Every stage from the command line; the first process alone speaks"
    a, b = (tmp_path/str(n) for n in (1, k))
    for n, out in ((1, a), (k, b)):
        p = run(n, "run", "--out", out, "--stages", *stages, sets=sets)
        assert p.returncode == 0, p.stdout+p.stderr
        said = p.stdout.splitlines()
        assert [sum(l.startswith(f"[{out}] {s}: ") for l in said) for s in stages] == [1]*len(stages)
        assert sum("Everything is in" in l for l in said) == 1
    compare(a, b)
    assert not [f for f in b.rglob("*") if f.name.endswith((".part", ".old")) or f.name == ".lock"]


def workers(pid):
    "The processes that torchrun has started, by their number"
    out = {}
    for p in Path("/proc").glob("[0-9]*"):
        try:
            parent, set_ = int((p/"stat").read_text().rsplit(")", 1)[1].split()[1]), (p/"environ").read_bytes()
        except OSError:
            continue
        if parent == pid and (rank := re.search(rb"\0RANK=(\d+)\0", set_)):
            out[int(rank[1])] = int(p.name)
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rank,after", [(0, 3), (1, 1)], ids=["first", "second"])
def test_killed(rank, after, tmp_path):
    "SIGKILL of one process ends all soon; `--resume` goes on, in as many processes as one likes, and ends as the run that was left alone"
    sets = ["sft.updates=40", "sft.checkpoint_every=3", "sft.eval_every=10"]
    alone, out = tmp_path/"alone", tmp_path/"killed"
    assert run(1, "train", "sft", "--out", alone, sets=sets).returncode == 0
    log = out/"logs"/"sft.jsonl"
    p = subprocess.Popen(command(2, "train", "sft", "--out", out, sets=sets), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    late = time.monotonic()+300
    while not (log.exists() and log.read_bytes().count(b"\n") >= 5) and p.poll() is None:
        assert time.monotonic() < late
        time.sleep(.01)
    os.kill(workers(p.pid)[rank], signal.SIGKILL)
    said, _ = p.communicate(timeout=60)
    assert p.returncode and "SIGKILL" in said, said
    assert not (out/"reference").exists()
    p = run(after, "train", "sft", "--out", out, "--resume", sets=sets)
    assert p.returncode == 0, p.stdout+p.stderr
    compare(alone, out)


def test_too_many(tmp_path):
    "More processes than prompts: one line, with the number and the setting, and nothing is written"
    p = run(3, "run", "--out", tmp_path/"run", "--stages", "sft", "dpo", sets=["dpo.batch_size=2"])
    told = [l for l in p.stderr.splitlines() if l.startswith("rlhf_nb: ")]
    assert p.returncode and len(told) == 1 and "dpo.batch_size: 2 prompts" in told[0] and "3 processes" in told[0], p.stderr
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_error(rank, tmp_path):
    "What one process alone finds wrong ends all, with its message"
    program = tmp_path/"one_fails.py"
    program.write_text(f"""
import os,rlhf_nb.train as t
from rlhf_nb.__main__ import command
own_pieces,calls = t.own_pieces,[]
def third_fails(*a):
    calls.append(1)
    if os.environ['RANK']=='{rank}' and len(calls)==3: raise ValueError('the third update of process {rank}')
    return own_pieces(*a)
t.own_pieces = third_fails
command()
""")
    began = time.monotonic()
    p = run(2, "train", "sft", "--out", tmp_path/"run", program=(str(program),))
    assert p.returncode and p.stderr.count(f"rlhf_nb: the third update of process {rank}\n") == 1, p.stderr
    assert time.monotonic()-began < 240 and not (tmp_path/"run"/"reference").exists()


def test_other_commands(tmp_path):
    "A command that shares nothing is the first process's"
    p = run(2, "config", "demo", program=("-m", "rlhf_nb"), sets=())
    assert p.returncode == 0 and len(re.findall("^sft:", p.stdout, re.M)) == 1, p.stderr
