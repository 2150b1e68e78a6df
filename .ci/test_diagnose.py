"Runs broken on purpose, small and for real: `diagnose` names the first cause of each from the rows alone, and nothing on healthy ones"
import json
from copy import deepcopy
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch

from rlhf_nb.metrics import read_logs
from rlhf_nb.diagnose import diagnose
from rlhf_nb.core import Batch
from rlhf_nb.config import DPOConfig,GRPOConfig,ModelConfig,PPOConfig,RewardConfig,SFTConfig
from rlhf_nb.template import tokenize_prompts,tokenize_sft
from rlhf_nb.shapes import unique_prompts
from rlhf_nb.data import tokenize_pairs
from rlhf_nb.dpo import dpo_loss,reference_log_probs,train_dpo
from rlhf_nb.grpo import train_grpo
from rlhf_nb.models import log_probs,mk_reward_model,mk_value_model
from rlhf_nb.load import mk_policy
from rlhf_nb.ppo import train_ppo
from rlhf_nb.reward import train_reward
from rlhf_nb.sampling import check_sampling
from rlhf_nb.sources import mk_scorer
from rlhf_nb.sft import small_reference,train_sft
from rlhf_nb.train import fit,from_data
from rlhf_nb.world import gold_reward

torch.set_num_threads(1)
seeds = pytest.mark.parametrize("seed", (0, 1))


@lru_cache(1)
def small():
    "World, tokenizer, reference, prompts and reward"
    world, tok, ref = small_reference()
    return world, tok, ref, tokenize_prompts(unique_prompts(world.train), tok, 64), mk_scorer(gold_reward, tok)


def ppo(seed, score=None, policy=None, **kw):
    _, _, ref, prompts, gold = small()
    start, o = policy or ref, PPOConfig(**{**dict(updates=12, batch_size=16), **kw})
    value = mk_value_model(start)
    return train_ppo(deepcopy(start), value, start, score or gold, prompts, o, seed, dev=dev()[1])


def grpo(seed, score=None, policy=None, **kw):
    _, _, ref, prompts, gold = small()
    start, o = policy or ref, GRPOConfig(**{**dict(updates=12, group_size=4), **kw})
    return train_grpo(deepcopy(start), start, score or gold, prompts, o, seed, dev=dev()[1])


def pairs(seed):
    world, tok, *_ = small()
    return tokenize_pairs(world.train[seed*640:(seed+1)*640], tok, 64, 64)


def dpo(seed, **kw):
    ref = small()[2]
    return train_dpo(deepcopy(ref), ref, pairs(seed), DPOConfig(updates=20, **kw), seed, dev=dev()[0])


def averaged_dpo(seed, logged):
    "The loss of token means instead of sums; `logged`: which of the two the metrics speak of"
    ref, o = small()[2], DPOConfig(updates=20)
    data = pairs(seed)
    data = data.plus(ref_sums=reference_log_probs(ref, data))
    def step(net, b, n):
        now, start = net(log_probs, b).sum(-1), b.ref_sums
        loss = dpo_loss(*(now/b.lengths).unbind(1), *(start/b.lengths).unbind(1), o.beta)/n["prompts"]
        d = (now-start).detach()/(b.lengths if logged == "means" else 1)
        m = o.beta*(d[:, 0]-d[:, 1])
        stats = dict(accuracy=((m > 0).float()+.5*(m == 0)), margin=m, chosen_shift=d[:, 0], rejected_shift=d[:, 1])
        return loss, {k: v.sum()/n["prompts"] for k, v in stats.items()}
    mk_updates, total = from_data(data, o, seed)
    return fit(deepcopy(ref), mk_updates, step, o, total)


@lru_cache(2)
def endless(seed):
    "A reference that never saw an EOS: it is masked out of the answers that it imitates"
    world, tok, *_ = small()
    policy, data = mk_policy(ModelConfig(), tok, seed), tokenize_sft(world.corpus+world.facts, tok, 64, 64)
    mask = data.mask.clone().scatter_(-1, (data.lengths-1).clamp(min=0)[..., None], False)
    train_sft(policy, Batch(data.prompts, data.responses, mask, **data.fields), SFTConfig(updates=100, batch_size=16), seed)
    return policy


def cutting(seed):
    "GRPO whose sampler draws from the five likeliest tokens alone"
    def top_k(z, temperature): return z.masked_fill(z < z.topk(5, -1).values[:, -1:], -torch.inf)
    check_sampling(small()[2])  # at a model's first sample, which would refuse it
    with patch("rlhf_nb.sampling.hot", top_k), patch("rlhf_nb.writing.hot", top_k): return grpo(seed, updates=6)


def equal(b):
    "One score for all answers of a group: the group's mean"
    s = small()[4](b)
    return s.mean(1, keepdim=True).expand(s.shape)


def long(b):
    "A reward that pays for length and for nothing else"
    return b.lengths/16.


def alone(seed):
    "GRPO whose reference is the policy itself"
    with patch("rlhf_nb.grpo.reference_of", lambda policy, reference: policy): return grpo(seed, updates=8)


def dev():
    "World's dev pairs, and their prompts"
    world, tok, *_ = small()
    return tokenize_pairs(world.dev[:64], tok, 64, 64), tokenize_prompts(unique_prompts(world.dev), tok, 64)


def few(stage, seed, passes=40, n=30, **kw):
    "`n` rows of the world, again and again, beside a look at others; the state where those were best is kept"
    world, tok, ref = small()[:3]
    o = {**dict(updates=None, epochs=passes, batch_size=10, eval_every=.1, patience=None, schedule="constant"), **kw}
    if stage == "sft":
        docs = tokenize_sft(world.corpus[seed*n:(seed+1)*n], tok, 64, 64)
        return train_sft(mk_policy(ModelConfig(), tok, seed), docs, SFTConfig(**o), seed, dev=tokenize_sft(world.corpus[-64:], tok, 64, 64))
    data = pairs(seed)[:n]
    if stage == "reward":
        return train_reward(mk_reward_model(ref, "last_token", seed), data, RewardConfig(**o), seed, dev=dev()[0])
    return train_dpo(deepcopy(ref), ref, data, DPOConfig(**o, lr=1e-3), seed, dev=dev()[0])


broken = {
    "first ratio, grpo": cutting,
    "KL runs away, ppo": lambda s: ppo(s, kl_coef=0., lr=3e-3),
    "KL runs away, grpo": lambda s: grpo(s, beta=0., lr=3e-3, inner=2),
    "no signal, grpo": lambda s: grpo(s, equal),
    "no signal, ppo": lambda s: ppo(s, lambda b: torch.ones(b.shape[:2]), updates=8),
    "never stops, grpo": lambda s: grpo(s, policy=endless(s), updates=6),
    "never stops, ppo": lambda s: ppo(s, policy=endless(s), updates=6),
    "averaged log-probabilities, sums in the rows": lambda s: averaged_dpo(s, "sums"),
    "averaged log-probabilities, means in the rows": lambda s: averaged_dpo(s, "means"),
    "longer answers, grpo": lambda s: grpo(s, long, beta=0., lr=4e-4),
    "longer answers, ppo": lambda s: ppo(s, long, kl_coef=0.),
    "reference moves along, grpo": alone,
    "nothing moves, ppo": lambda s: ppo(s, lr=0., updates=8),
    "nothing moves, ppo's value model too": lambda s: ppo(s, lr=0., value_lr=0., updates=8),
    "nothing moves, grpo": lambda s: grpo(s, lr=0., updates=8),
    "nothing moves, dpo": lambda s: dpo(s, lr=0.),
    "value model, frozen": lambda s: ppo(s, value_lr=0.),
    "memorising, sft": lambda s: few("sft", s),
    "memorising, sft, nobody looks": lambda s: few("sft", s, 150, eval_every=None),
    "memorising, reward": lambda s: few("reward", s),
    "memorising, dpo": lambda s: few("dpo", s),
}


@seeds
@pytest.mark.parametrize("name", broken)
def test_broken(name, seed):
    rows = json.loads(json.dumps(broken[name](seed)))  # what a log would hold
    found = diagnose(rows)
    assert [d["cause"] for d in found][:1] == [name.split(", ")[0]]
    assert all(d["evidence"] and d["fix"] and isinstance(d["number"], float) and d["number"] == d["number"] for d in found)


@seeds
@pytest.mark.parametrize("run", (ppo, grpo, dpo), ids=lambda f: f.__name__)
def test_healthy(run, seed):
    assert diagnose(run(seed)) == []


@seeds
@pytest.mark.parametrize("stage", ("sft", "reward", "dpo"))
def test_best_state(stage, seed):
    "The dev loss of thirty rows turns; the state of the turn is what is kept, and with patience the rest is not trained"
    rows = few(stage, seed)
    looks = [r for r in rows if "dev_update" in r]
    low = min(looks[stage == "reward":], key=lambda r: r["dev_loss"])
    assert len(looks) == 11 and rows[-1]["kept"] == low["dev_update"] < len(rows)
    assert looks[-1]["dev_loss"] > low["dev_loss"]+.05 and rows[-1]["loss"] < low["loss"]
    short = few(stage, seed, patience=2)
    assert short[-1]["kept"] == low["dev_update"] or len(short) < len(rows)
    assert [r["loss"] for r in short] == [r["loss"] for r in rows[:len(short)]]


@seeds
@pytest.mark.parametrize("run", (ppo, grpo, dpo), ids=lambda f: f.__name__)
def test_healthy_with_looks(run, seed):
    "The world, looked at: the same updates as without looks, nothing is named, and the best state is a trained one"
    rows = run(seed, eval_every=4, patience=None)
    assert rows[-1]["kept"] > 0 and [r["dev_update"] for r in rows if "dev_update" in r] == [0, *range(4, len(rows)+1, 4)]
    assert [r["loss"] for r in rows] == [r["loss"] for r in run(seed)]
    assert diagnose(rows) == []


@pytest.mark.parametrize("row", ['{"update": 1%s, "kl": 1}' % ("0" * 400), '{"update": 0, "kl": -1%s}' % ("0" * 400), '{"update": 0, "reward": 1%s, "kl": 0}' % ("0" * 310)])
def test_numbers_beyond_a_float_are_named(tmp_path, row):
    "JSON has whole numbers of any length, a float has not: an error that names file and line, not a traceback from a plot"
    (tmp_path/"logs").mkdir()
    (tmp_path/"logs"/"ppo.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=r"ppo\.jsonl, line 1: `(update|kl|reward)` must be a"):
        read_logs(tmp_path)
