"""Preferences of people and a real chat model: two halves of the pairs, a reward model of each, tested on the other.

    python results/real/chat.py data PAIRS hh                      # hh/a and hh/b: train is one half, test is the other
    rlhf_nb run --config results/real/chat.yaml --model MODEL --data hh/a --out runs/hh-a
    rlhf_nb run --config results/real/chat.yaml --model MODEL --data hh/b --out runs/hh-b --stages sft reward
    python results/real/chat.py reward runs/hh-a runs/hh-b --out results/real/chat_reward
    rlhf_nb run --config results/real/chat.yaml ... --out runs/hh-a200 --set data.n_pairs=200 --stages sft reward      # and 400
    python results/real/chat.py curve runs/hh-a200 runs/hh-a400 runs/hh-a --out results/real/chat_curve
    rlhf_nb run --config results/real/chat.yaml ... --out runs/hh-a1 --set seed=1 --stages sft dpo                     # and seed 2
    python results/real/chat.py implicit runs/hh-a runs/hh-a1 runs/hh-a2 --out results/real/chat_dpo
    python results/real/chat.py policies runs/hh-a --other runs/hh-b --out results/real/chat
    rlhf_nb run --config results/real/chat.yaml ... --out runs/hh-r16 --set model.lora.r=16 \\
        --set reward.lr=2e-4 --set dpo.lr=5e-5 --stages sft reward dpo                                                 # and r = 8
    python results/real/chat.py ranks runs/hh-a runs/hh-r16 runs/hh-r8 --out results/real/chat_lora                    # full first

`PAIRS` is a file of pairs, such as 1,800 of Anthropic's HH-RLHF. A prompt lies in one half, by its hash. Intervals are 95%,
clustered by prompt. The rule that is measured beside everything is "shorter wins", in tokens.
"""
import argparse,json
from pathlib import Path

import torch

from rlhf_nb.core import Batch,child_seed,write_json
from rlhf_nb.data import load_preferences
from rlhf_nb.gauge import pair_rewards
from rlhf_nb.line import Line
from rlhf_nb.load import load_reward_model
from rlhf_nb.models import log_probs,scores
from rlhf_nb.run import Run,read_samples
from rlhf_nb.stats import clustered_mean,clustered_share,mean_ci,share_ci,win_rate
from rlhf_nb.text import interval,md_table
from rlhf_nb.train import in_pieces

# The data

def write_halves(source, folder):
    "Two folders, each with its own half as train and the other as test"
    pairs = load_preferences(source).pairs
    keys = 'prompt','chosen','rejected'
    def half(p): return child_seed(0, 'half', p['prompt'])%2
    halves = [[{k:p[k] for k in keys} for p in pairs if half(p)==i] for i in (0,1)]
    for name,(train,test) in dict(a=halves, b=halves[::-1]).items():
        f = Path(folder)/name
        f.mkdir(parents=True, exist_ok=True)
        for split,rows in (('train',train),('test',test)):
            (f/f'{split}.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows), encoding='utf-8')


# The measures

def points(d)->torch.Tensor:
    "1 where a difference is positive, a half where there is none"
    return (d>0).double()+.5*(d==0).double()

def beside_length(d, pairs, line)->dict:
    "How often differences (n,) of chosen and rejected are right, and the rule beside them, pair by pair"
    shorter = -(lengths(pairs, line) @ torch.tensor([1.,-1.]))
    keys = [p['prompt'] for p in pairs]
    right,rule = points(d),points(shorter)
    longer = shorter<0                                # the chosen answer is the longer one
    return dict(
        right=right.tolist(),
        rule=rule.tolist(),
        longer=longer.tolist(),
        prompts=keys)

def lengths(pairs, line)->torch.Tensor:
    "(n,2) tokens of chosen and rejected"
    said = [o.size for k in ('chosen','rejected') for o in line.template.responses([p[k] for p in pairs])]
    return torch.tensor(said, dtype=torch.float32).view(2, -1).T

def summary(ds)->dict:
    "Several measures of pairs as one: accuracy, the rule, their difference, and by which answer is longer"
    right,rule,longer = (torch.tensor([x for d in ds for x in d[k]]) for k in ('right','rule','longer'))
    keys = [k for d in ds for k in d['prompts']]
    def some(at): return clustered_share(right[at], [k for k,o in zip(keys, at.tolist()) if o])
    return dict(
        accuracy=clustered_share(right, keys),
        shorter_wins=clustered_share(rule, keys),
        difference=clustered_mean(right-rule, keys),
        chosen_longer=some(longer),
        chosen_not_longer=some(~longer))

def by_reward_model(line)->dict:
    "A run's reward model on its held-out half"
    pairs = line.held()
    with line.acc.autocast():
        s,_,_ = pair_rewards(*load_reward_model(line.run.made('reward')), pairs, micro_tokens=4096)
    return beside_length(s[:,0]-s[:,1], pairs, line)

def reward_models(runs, out):
    "Each run's reward model on its held-out half, and both together"
    ds = [by_reward_model(Line(Run(r))) for r in runs]
    report({**{Path(r).name:[d] for r,d in zip(runs, ds)}, 'both':ds}, out)

def curve(runs, out):
    "Reward models of more and more pairs, on the same held-out half"
    lines = [Line(Run(r)) for r in runs]
    report({str(len(o.splits.train)):[by_reward_model(o)] for o in lines}, out)

def ranks(runs, out):
    "Full fine-tuning, first, and adapters on the same held-out half: reward models and DPO's implicit rewards"
    lines = {_rank(o):o for o in (Line(Run(r)) for r in runs)}
    by = {'reward model':{k:by_reward_model(o) for k,o in lines.items()}, 'DPO':implicit_rewards(lines)}
    found,beside = {},{}
    for what,ds in by.items():
        full = torch.tensor(next(iter(ds.values()))['right'])
        for k,d in ds.items():
            found[f'{what}, {k}'] = [d]
            beside[f'{what}, {k}'] = clustered_mean(torch.tensor(d['right'])-full, d['prompts'])
    report(found, out, less_full=beside)

def _rank(line)->str:
    "How a run's models learned"
    r = line.config.model.lora.r
    return f'r = {r}' if r else 'full'

def answer_log_probs(model, b)->torch.Tensor:
    "(n,2) log-probability of chosen and rejected, in float32: what DPO moves is little, and rounding would cover it"
    with torch.no_grad(): return in_pieces(lambda o: log_probs(model, o).sum(-1), b, 4096)

def implicit(runs, out):
    "DPO's implicit reward on held-out pairs: how much likelier has the policy made the chosen answer?"
    found = implicit_rewards({f'seed {o.config.seed}':o for o in (Line(Run(r)) for r in runs)})
    # the same pairs in each: a prompt's pairs of all seeds belong together
    report({**{k:[d] for k,d in found.items()}, 'all':list(found.values())}, out)

def implicit_rewards(lines)->dict:
    "{name: measures of pairs}; all runs began with the same chat model"
    out,before = {},None
    for name,line in lines.items():
        pairs = line.held()
        b = line.pairs(pairs)
        if before is None: before = answer_log_probs(line.model('sft'), b)
        d = answer_log_probs(line.model('dpo'), b)-before
        out[name] = beside_length(d[:,0]-d[:,1], [pairs[i] for i in b.index.tolist()], line)
    return out

def as_written(rm, rs, line)->torch.Tensor:
    "(N) scores of samples as training gives them: an answer that was cut has no end"
    def tokens(r):
        ids = line.template.response(r['response'])
        return ids if r['finished'] else ids[:-1]
    b = Batch.from_tokens([line.template.prompt(r['prompt']) for r in rs], [[tokens(r)] for r in rs])
    return in_pieces(lambda o: scores(rm, o), b, 4096)[:,0]

def as_if_finished(rm, tok, rs)->torch.Tensor:
    "(N) the same with an end behind every answer, so that only what it says counts"
    texts = [f" {r['response']}" for r in rs]
    pairs = [dict(prompt=r['prompt'], chosen=t, rejected=t) for r,t in zip(rs, texts)]
    return pair_rewards(rm, tok, pairs, micro_tokens=4096)[0][:,0]

def policies(run, other, out):
    "Every policy's answers against the reference's, by the reward model that trained them and by the other half's"
    recs,line = read_samples(run),Line(Run(run))
    judges = {k:load_reward_model(Run(r).made('reward')) for k,r in dict(own=run, other=other).items()}
    def of(name):
        "{judge, how: (N) scores}"
        with line.acc.autocast():
            return {(k,how):as_written(rm, recs[name], line) if how=='written' else as_if_finished(rm, tok, recs[name])
                    for k,(rm,tok) in judges.items() for how in ('written','finished')}
    start = of('reference')
    found = {'reference':of_answers(recs['reference'])}
    for name in recs:
        if name=='reference': continue
        wins = {f'{k}_{how}':win_rate(s, start[k,how]) for (k,how),s in of(name).items()}
        found[name] = {**wins, **of_answers(recs[name])}
    heads = dict(own_written='its own reward model', other_written="the other half's", own_finished='its own, as if finished',
                 other_finished="the other's, as if finished", kl='KL, nats', tokens='tokens', finished='finished')
    rows = [['policy',*heads.values(),'n']]
    rows += [[name,*(interval(d[k]) if k in d else '' for k in heads),d['kl']['n']] for name,d in found.items()]
    write_json(f'{out}.json', found)
    Path(f'{out}.md').write_text(md_table(rows)+'\n')
    print(md_table(rows))

def of_answers(rs)->dict:
    "How far, how long, how often finished"
    def mean(k): return mean_ci(torch.tensor([r[k] for r in rs], dtype=torch.float64))
    return dict(kl=mean('kl'), tokens=mean('n_tokens'), finished=share_ci(torch.tensor([float(r['finished']) for r in rs])))


# The tables

def report(found, out, **beside):
    "OUT.json and OUT.md: {name: measures of pairs}, and further measures by name"
    d = {k:summary(ds)|{m:by[k] for m,by in beside.items()} for k,ds in found.items()}
    keys = 'accuracy','shorter_wins','difference','chosen_longer','chosen_not_longer',*beside
    rows = [['',*(k.replace('_', ' ') for k in keys),'n']]
    rows += [[k,*(interval(o[key], '.3f') for key in keys),o['accuracy']['n']] for k,o in d.items()]
    write_json(f'{out}.json', d)
    Path(f'{out}.md').write_text(md_table(rows)+'\n')
    print(md_table(rows))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='what', required=True)
    o = sub.add_parser('data')
    o.add_argument('source')
    o.add_argument('folder')
    for name in ('reward','curve','implicit','ranks'):
        o = sub.add_parser(name)
        o.add_argument('runs', nargs='+')
        o.add_argument('--out', required=True)
    o = sub.add_parser('policies')
    o.add_argument('run')
    o.add_argument('--other', required=True)
    o.add_argument('--out', required=True)
    a = p.parse_args()
    if a.what=='data': write_halves(a.source, a.folder)
    elif a.what=='reward': reward_models(a.runs, a.out)
    elif a.what=='curve': curve(a.runs, a.out)
    elif a.what=='implicit': implicit(a.runs, a.out)
    elif a.what=='ranks': ranks(a.runs, a.out)
    else: policies(a.run, a.other, a.out)

if __name__=='__main__': main()
