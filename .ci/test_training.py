"The gradient of an update belongs to the update: no cut into micro-batches changes it (nor a number of processes: test_processes)"
import os
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from tiny import batch, configs, lm, timeless
from rlhf_nb.core import generator
from rlhf_nb.config import DPOConfig,GRPOConfig,Optim,PPOConfig
from rlhf_nb.dpo import dpo_step,reference_log_probs
from rlhf_nb.grpo import grpo_advantages,grpo_step
from rlhf_nb.models import log_probs,mk_reward_model,mk_value_model
from rlhf_nb.ppo import ppo_advantages,ppo_step
from rlhf_nb.reward import reward_step
from rlhf_nb.sft import sft_step
from rlhf_nb.train import micro_batches,mk_accelerator,steps

# ---- accumulation

sizes = [27, 24, 28, 25, 26, 28, 24, 27]  # so alike that a budget in tokens cuts eight prompts into equal pieces
cuts = {8: 10**6, 4: 4*28, 2: 2*28, 1: 1}  # prompts in a piece: micro_tokens


def rollout(G, o, prepare):
    "A rollout as PPO and GRPO see it in a later pass: the policy has moved, far enough to be clipped on either side"
    b = batch(G, sizes, longest=5)
    noise = lambda k, s: s*torch.randn(b.shape[:k], generator=generator(0, "noise", k, s))
    now = in_whole(lm(), b, o.temperature)
    b = b.plus(old_log_probs=now+noise(3, .3)*b.mask, ref_log_probs=now+noise(3, .5)*b.mask, scores=noise(2, 1.))
    return prepare(b, o)


def in_whole(model, b, temperature=1.):
    with torch.no_grad():
        return log_probs(model, b, temperature)


def sft():
    return lm(), batch(1, sizes), sft_step


def reward(head, center):
    return head_moved(mk_reward_model(lm(), head)), batch(2, sizes), partial(reward_step, center=center)


def head_moved(m):
    "A head that is not zero lets gradients into the body"
    for p in m.parameters():
        p.data += .1*torch.randn(p.shape, generator=generator(0, "head"))
    return m


def ppo(**kw):
    o = PPOConfig(temperature=.9, **kw)
    m = nn.ModuleDict(dict(policy=lm(), value=head_moved(mk_value_model(lm(1)))))
    def prepare(b, o):
        b = ppo_advantages(b, m["value"], o)
        off = torch.randn(b.shape, generator=generator(0, "off"))
        return b.plus(values=(b.values+.3*off)*b.mask)  # the value model has moved too
    return m, rollout(1, o, prepare), partial(ppo_step, o=o)


def grpo(**kw):
    o = GRPOConfig(temperature=.9, max_new_tokens=5, **kw)
    return lm(), rollout(3, o, grpo_advantages), partial(grpo_step, o=o)


def dpo(live=False, **kw):
    o, ref, b = DPOConfig(**kw), lm(1), batch(2, sizes)
    if live:
        return lm(), b, partial(dpo_step, o=o, reference=ref)
    return lm(), b.plus(ref_sums=reference_log_probs(ref, b)), partial(dpo_step, o=o)


cases = {"sft": sft, "ppo": ppo}
cases |= {f"reward-{h}-{c}": partial(reward, h, c) for h, c in product(("last_token", "log_prob"), (0., .1))}
cases |= {f"grpo-{l}-{k}-{'masked' if t else 'all'}": partial(grpo, loss_type=l, kl_in=k, mask_truncated=t)
          for l, k, t in product(("grpo", "dr_grpo", "dapo"), ("loss", "loss_corrected", "reward"), (False, True))}
cases |= {"grpo-epsilon_high": partial(grpo, epsilon_high=.28)}
cases |= {f"grpo-{r}-{l}": partial(grpo, ratio=r, loss_type=l, baseline="leave_one_out")
          for r, l in (("token", "cispo"), ("sequence", "cispo"), ("sequence", "grpo"), ("sequence", "dapo"))}
cases |= {f"dpo-{l}-{'live' if v else 'cached'}": partial(dpo, v, loss_type=l, label_smoothing=.1*(l in ("cdpo", "robust")))
          for l, v in product(("sigmoid", "ipo", "robust", "cdpo", "simpo"), (False, True))}
cases |= {f"dpo-sft_weight-{'live' if v else 'cached'}": partial(dpo, v, sft_weight=.5) for v in (False, True)}


class Keep(torch.optim.SGD):
    "Keeps the gradients that it is given, and goes nowhere"
    def step(self, closure=None):
        self.kept = [None if p.grad is None else p.grad.clone() for g in self.param_groups for p in g["params"]]


def update(model, b, step, micro_tokens):
    "Gradients and metrics of one update of `train.steps`"
    opt = Keep([dict(params=list(model.parameters()), peak=0.)], lr=0.)
    o = Optim(micro_tokens=micro_tokens, max_grad_norm=float("inf"))
    rows = steps(model, [([b], {})], step, o, 1, opt, mk_accelerator(device="cpu"))
    row, = timeless(rows)
    return opt.kept, row


@pytest.mark.parametrize("name", cases)
def test_accumulation(name):
    """
    (8 x 1), (4 x 2), (2 x 4) and (1 x 8): prompts in a piece times pieces; all give one gradient and the same metrics. An entry of the
    gradient is a sum over some 200 tokens, and another cut adds them up in another order. Rounding, 6e-8 of a term, grows with the root
    of their number to about 1e-6, and the sum may be smaller than its terms, whose signs differ: hence 5e-6 of the tensor's largest entry
    (seen: 1.1e-6). A wrong denominator is off by more than a hundredth.
    """
    model, b, step = cases[name]()
    names = [k for k, _ in model.named_parameters()]
    want, row = update(model, b, step, cuts[8])
    largest = {k: g.abs().max().item() for k, g in zip(names, want)}
    zero = ["transformer.ln_f.bias"] if name == "reward-last_token-0.0" else []  # a difference of scores that a shift of both leaves alone
    assert [k for k, v in largest.items() if v < 1e-4] == zero, "a tensor without a gradient shows nothing"
    for k, micro_tokens in cuts.items():
        assert [len(i) for i in micro_batches(b, micro_tokens)] == [k]*(8//k)
        got, r = update(model, b, step, micro_tokens)
        off = {n: (g-w).abs().max().item()/max(largest[n], 1e-4) for n, g, w in zip(names, got, want)}
        worst = max(off, key=off.get)
        assert off[worst] <= 5e-6, f"{k} prompts in a piece: {worst} differs by {off[worst]:.1e} of its largest entry"
        assert r == pytest.approx(row, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kw", [dict(loss_type="sigmoid"), dict(loss_type="ipo"), dict(sft_weight=.5)], ids=lambda kw: "-".join(map(str, *kw.items())))
def test_cached_reference(kw):
    "The reference's log-probabilities of the whole data, computed once, in pieces and sorted by size, make the live reference's gradient"
    want, row = update(*dpo(live=True, **kw), cuts[2])
    got, r = update(*dpo(live=False, **kw), cuts[4])
    assert r == pytest.approx(row, rel=1e-5, abs=1e-6)
    assert all((g-w).abs().max() <= 5e-6*w.abs().max() for g, w in zip(got, want))


def test_rollout_in_pieces():
    "Values, advantages and returns of a rollout do not depend on the pieces in which the value model reads it"
    value, b = head_moved(mk_value_model(lm(1))), batch(1, sizes)
    b = b.plus(old_log_probs=in_whole(lm(), b), ref_log_probs=in_whole(lm(1), b), scores=torch.arange(8.)[:, None])
    want, *others = (ppo_advantages(b, value, PPOConfig(micro_tokens=t)) for t in cuts.values())
    for got in others:
        for k in ("values", "advantages", "returns"):
            torch.testing.assert_close(got.fields[k], want.fields[k], rtol=1e-5, atol=1e-5)


def test_each_update_anew():
    "No gradient is left over for the next update, be it one of the same step's mini-batches or a later step"
    model, b, step = sft()
    opt = Keep([dict(params=list(model.parameters()), peak=0.)], lr=0.)
    kept = []
    for row in steps(model, [([b], {}), ([b, b], {})], step, Optim(micro_tokens=cuts[4]), 2, opt, mk_accelerator(device="cpu")):
        kept.append(opt.kept)
    assert row["steps"] == 2 and all(torch.equal(g, w) for g, w in zip(*kept))


def test_accumulation_sees():
    "The rollouts are clipped on both sides, some responses are cut, and lengths differ: a count of the piece's own would show"
    for make in (ppo, grpo):
        m, b, _ = make()
        ratio = (in_whole(m["policy"] if make is ppo else m, b, .9)-b.old_log_probs).exp()[b.mask]
        assert (ratio < .8).any() and (ratio > 1.28).any() and ((ratio > .8) & (ratio < 1.2)).any()
        assert b.finished.any() and not b.finished.all() and len(b.lengths.unique()) == 5
    model, b, step = sft()
    own = lambda net, b, n: step(net, b, {**n, "tokens": 8*len(b)*b.mask.sum().item()/64})
    (w, *_), _ = update(model, b, own, cuts[8])
    (g, *_), _ = update(model, b, own, cuts[2])
    assert (g-w).abs().max() > .05*w.abs().max()


# ---- bfloat16

def plain(model, b):
    "Log-probabilities of a batch, one plain call of the model for each response"
    out = torch.zeros(b.shape)
    for i, (p, rs) in enumerate(zip(b.prompts, b.tokens())):
        for j, r in enumerate(rs):
            z = model(torch.tensor([p+r]), use_cache=False).logits[0, len(p)-1:-1].float().log_softmax(-1)
            out[i, j, :len(r)] = z.gather(-1, b.responses[i, j, :len(r), None])[:, 0]
    return out


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("kind", configs)
def test_bfloat16(kind):
    "A model in bfloat16: what the grouped forward makes of it is as close to float32 as what plain calls make of it"
    b = batch(3, sizes*8)
    with torch.no_grad():
        exact = plain(lm(kind=kind), b)
        low = lm(kind=kind).bfloat16()
        want, got = plain(low, b), log_probs(low, b)
    off = lambda x: rms((x-exact)[b.mask])
    assert 1e-4 < off(want) < .1, "bfloat16 rounds, and not too much"
    assert off(got) < 1.25*off(want), f"grouped {off(got):.1e}, plain {off(want):.1e}"
    sums = lambda x: rms((x-exact).sum(-1))
    assert sums(got) < 1.25*sums(want), f"grouped {sums(got):.1e}, plain {sums(want):.1e}"


@pytest.mark.parametrize("kind", configs)
def test_bfloat16_gradient(kind):
    "Under autocast, as in training: the same for the gradient of a loss"
    b = batch(3, sizes*4)
    adv = torch.randn(b.shape, generator=generator(0, "advantages"))
    def grads(f, low):
        model = lm(kind=kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = (f(model, b)*adv).sum()
        loss.backward()
        return [p.grad for p in model.parameters()]
    exact = grads(plain, False)
    off = lambda gs: rms(torch.stack([(g-e).norm()/e.norm() for g, e in zip(gs, exact)]))  # each tensor counts the same
    want, got = off(grads(plain, True)), off(grads(log_probs, True))
    assert 1e-4 < want < .1, "bfloat16 rounds, and not too much"
    assert got < 1.25*want, f"grouped {got:.1e}, plain {want:.1e}"


many_shapes = """
import torch
from rlhf_nb.parallel import keep_memory,resident
if {kept}: keep_memory()
torch.set_num_threads(1)
w = torch.randn(256, 256, dtype=torch.bfloat16, requires_grad=True)
before = resident()
for n in range(64, 64+150):
    torch.nn.functional.linear(torch.randn(n, 256, dtype=torch.bfloat16, requires_grad=True), w).sum().backward()
print(resident()-before)
"""


def test_kernels_are_forgotten():
    "A bfloat16 layer that meets 150 numbers of rows holds the kernels of a few dozen; without `keep_memory` those of all"
    env = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
    grown = [int(subprocess.run([sys.executable, "-c", many_shapes.format(kept=o)], env=env, capture_output=True, check=True).stdout) for o in (True, False)]
    assert grown[0] < 2**27 and (grown[0] < grown[1]/2 or grown[1] < 2**26)
