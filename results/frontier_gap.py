"""What stands between PPO, GRPO, DPO and best-of-n on the embedded world: one run, other settings, the same yardstick.

    export OMP_NUM_THREADS=1
    rlhf_nb run --config demo --set jobs=1 --stages sft reward dpo ppo grpo --seed 0 --out three/seed0
    python results/frontier_gap.py three/seed0 --out results/frontier_gap.json

Each row trains a policy, lets it answer dev prompts (test prompts are for reports), and compares it with best-of-n at
its KL (notebook 31). A row that is in the file already is kept; `--only` takes some, by the beginnings of their names.
"""
import argparse,time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from rlhf_nb.core import *
from rlhf_nb.data import *
from rlhf_nb.dpo import *
from rlhf_nb.evaluate import *
from rlhf_nb.frontier import *
from rlhf_nb.grpo import *
from rlhf_nb.line import *
from rlhf_nb.models import *
from rlhf_nb.ppo import *
from rlhf_nb.run import *
from rlhf_nb.sampling import *
from rlhf_nb.shapes import *
from rlhf_nb.sources import *
from rlhf_nb.stats import *
from rlhf_nb.template import tokenize_prompts
from rlhf_nb.text import interval
from rlhf_nb.world import truth_and_tone

PROMPTS,ANSWERS = 128,4

def grpo(line, score, **kw):
    "GRPO from the reference, with other settings than the demo's"
    policy,o = line.model('sft'),replace(line.config.grpo, **kw)
    train_grpo(policy, line.model('sft'), score, line.prompts(line.learned('grpo')), o, line.config.seed)
    return policy

def ppo(line, score, **kw):
    "PPO from the reference, with other settings than the demo's"
    policy,reference,o = line.model('sft'),line.model('sft'),replace(line.config.ppo, **kw)
    value = mk_value_model(reference, line.model('reward') if o.value_from=='reward' else None)
    train_ppo(policy, value, reference, score, line.prompts(line.learned('ppo')), o, line.config.seed)
    return policy

def own_pairs(line, score, policy, prompts, n, round):
    "The best and the worst of a policy's answers to each prompt, by the reward model"
    b = sample(policy, tokenize_prompts(prompts, line.template, line.config.data.max_prompt), n,
               line.config.eval.max_new_tokens, seed=child_seed(line.config.seed, 'own pairs', round))
    r,said = score(b),texts(b, line.template)[1]
    best,worst = r.argmax(1).tolist(),r.argmin(1).tolist()
    return [dict(prompt=p, chosen=o[i], rejected=o[j])
            for p,o,i,j in zip(prompts, said, best, worst, strict=True) if o[i]!=o[j]]

def on_own_answers(line, score, name='dpo', rounds=1, n=4, n_prompts=400, updates=40, lr=1e-4):
    "A trained policy goes on: DPO on pairs of its own answers, labelled by the reward model, in rounds"
    policy,o = line.model(name),replace(line.config.dpo, updates=updates, lr=lr)
    prompts = unique_prompts(line.learned('dpo'))
    for k in range(rounds):
        pairs = own_pairs(line, score, policy, prompts[k*n_prompts:(k+1)*n_prompts], n, k)
        train_dpo(policy, line.model('sft'), line.pairs(pairs), o, line.config.seed)
    return policy

def kept(name):
    "A policy as the demo leaves it"
    return lambda line, score: line.model(name)

# name -> what makes the policy; none of them is chosen on test prompts
trials = {
    'PPO, as the demo':kept('ppo'),
    'GRPO, as the demo':kept('grpo'),
    'DPO, as the demo':kept('dpo'),
    'PPO, 3 times the updates, a third of the learning rate':partial(ppo, updates=108, lr=1e-4),
    'GRPO, 3 times the updates':partial(grpo, updates=120),
    'GRPO, 3 times the updates, a third of the learning rate':partial(grpo, updates=120, lr=1e-4),
    'GRPO, 3 times the updates, KL weight .3':partial(grpo, updates=120, beta=.3),
    'GRPO, 10 times the updates, a third of the learning rate, KL weight .3':
        partial(grpo, updates=400, lr=1e-4, beta=.3),
    'GRPO, groups of 4':partial(grpo, group_size=4, batch_size=16),
    'GRPO, groups of 16':partial(grpo, group_size=16, batch_size=4),
    'GRPO, KL k1 in the reward':partial(grpo, kl_in='reward'),
    'DPO, then a round on its own answers':on_own_answers,
    'DPO, then a round on its own answers, eight to a prompt':partial(on_own_answers, n=8),
    'DPO, then three rounds on its own answers':partial(on_own_answers, rounds=3),
    'DPO, then three rounds on its own answers, eight to a prompt':partial(on_own_answers, rounds=3, n=8),
    'PPO, then a round of DPO on its own answers':partial(on_own_answers, name='ppo'),
    'PPO, then three rounds of DPO on its own answers':partial(on_own_answers, name='ppo', rounds=3),
    'GRPO, then a round of DPO on its own answers':partial(on_own_answers, name='grpo'),
}

def yardstick(line, score, prompts, ids):
    "Rewards and true rewards of the reference's answers, 64 to each prompt"
    b = sample(line.model('sft'), ids, max(best_ns), line.config.eval.max_new_tokens,
               seed=child_seed(line.config.seed, 'dev frontier'))
    b = b.plus(rows=[dict(prompt=p) for p in prompts])
    return score(b),line.gold(b)

def right_about(r, g):
    "Of the policy's answers to one prompt, how often does the reward model put a pair in the true order?"
    points,keys = [],[]
    for k,(a,b) in enumerate(zip(r.tolist(), g.tolist())):
        for i in range(len(a)):
            for j in range(i):
                if b[i]==b[j]: continue
                points.append(.5 if a[i]==a[j] else float((a[i]>a[j])==(b[i]>b[j])))
                keys.append(k)
    return clustered_share(points, keys)

def measure(line, score, policy, prompts, ids, proxy, gold):
    "The policy beside best-of-n, and what the reward model knows about its answers"
    both = sample_with_kl(dict(reference=line.model('sft'), policy=policy), ids, ANSWERS,
                          line.config.eval.max_new_tokens, seed=child_seed(line.config.seed, 'dev'))
    b = both['policy'].plus(rows=[dict(prompt=p) for p in prompts])
    r,g = score(b),line.gold(b)
    said = zip(prompts, texts(b, line.template)[1])
    read = [[truth_and_tone(dict(prompt=p, response=o)) for o in os] for p,os in said]
    parts = {k:sum(o[k] for os in read for o in os)/b.lengths.numel() for k in ('truth','tone')}
    return dict(against_best_of_n(proxy, gold, dict(kl=b.kl.sum(-1), reward=r, gold=g)),
                right=right_about(r, g), tokens=b.lengths.double().mean().item(), **parts)

def of_reference(proxy, gold):
    "What the reward model knows about the reference's answers, and about the four of 64 that it likes best"
    top = proxy.topk(ANSWERS).indices
    return dict(reference=right_about(proxy[:,:ANSWERS], gold[:,:ANSWERS]),
                top=right_about(proxy.gather(1, top), gold.gather(1, top)))

def main():
    "Fill the file, row by row"
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('run')
    p.add_argument('--out', default='results/frontier_gap.json')
    p.add_argument('--only', nargs='*')
    a = p.parse_args()
    torch.set_num_threads(1)
    line = Line(Run(a.run))
    seed,out = str(line.config.seed),Path(a.out)
    found = read_json(out) if out.exists() else dict(prompts=PROMPTS, answers=ANSWERS, split='dev', seeds={})
    mine = found['seeds'].setdefault(seed, dict(rows={}))
    score = line.scorer()
    prompts = unique_prompts(line.splits.dev)[:PROMPTS]
    ids = tokenize_prompts(prompts, line.template, line.config.data.max_prompt)
    began = time.process_time()
    proxy,gold = yardstick(line, score, prompts, ids)
    if 'best_of_n' not in mine:
        mine.update(best_of_n=best_of_n(proxy, gold), gibbs=gibbs(proxy, gold), right=of_reference(proxy, gold),
                    seconds=time.process_time()-began)
        write_json(out, found)
    for name,make in trials.items():
        left_out = a.only and not any(name.startswith(o) for o in a.only)
        if name in mine['rows'] or left_out: continue
        began = time.process_time()
        policy = make(line, score)
        took = time.process_time()-began
        row = dict(measure(line, score, policy, prompts, ids, proxy, gold), train_seconds=took)
        mine['rows'][name] = row
        write_json(out, found)
        said = ', '.join(f"{k} {interval(row[k]['share'])}" for k in ('reward','gold'))
        print(f"{name}: {took:.0f} CPU-s, KL {row['kl']:.2f}, share of best-of-n's gain in {said}", flush=True)

if __name__=='__main__': main()
