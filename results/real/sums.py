"""Sums: a task whose reward is a fact. Makes the data, and measures what runs on them have learned.

    python results/real/sums.py data sums/1-0 --digits 1 --seed 0
    rlhf_nb run --config results/real/sums1.yaml --model MODEL --data sums/1-0 --set seed=0 --out runs/sums1-0
    python results/real/sums.py measure runs/sums1-0 --data sums/1-0
    python results/real/sums.py table runs/sums1-0 runs/sums1-1 runs/sums1-2 --out results/real/sums1

A sum and its swap (3 + 4 and 4 + 3) lie in the same split, so no held-out sum has been seen the other way round. All
intervals are 95%, and what is counted as independent is the unordered pair, not the answer.
"""
import argparse,json,random,time
from dataclasses import replace
from pathlib import Path

import torch

from rlhf_nb.checks import exact_number,last_number
from rlhf_nb.core import Batch,child_seed,read_json,write_json
from rlhf_nb.evaluate import sample_with_kl
from rlhf_nb.line import Line
from rlhf_nb.run import Run
from rlhf_nb.sampling import sample
from rlhf_nb.sft import train_sft
from rlhf_nb.stats import clustered_mean,clustered_share
from rlhf_nb.text import HH,interval,md_table

N = 8              # sampled answers to each held-out prompt
LOOKS = 32         # of the reference, for how often it is right before training
HELD = 100         # held-out prompts, at most


# The data

def carries(a:int, b:int)->bool:
    "Does a column of the sum pass nine?"
    return any(a//k%10+b//k%10>=10 for k in (1,10))

def row(a:int, b:int)->dict:
    "A prompt with the columns that the reward and the measures read"
    return dict(prompt=f'What is {a} + {b}?', answer=str(a+b), carry=carries(a, b), pair=f'{min(a, b)}+{max(a, b)}')

def splits(digits:int, seed:int)->dict:
    "{train, dev, test}: rows, split by unordered pair; one digit has 55 pairs, two digits have 4,095"
    low,high = (0,9) if digits==1 else (10,99)
    pairs = [(a, b) for a in range(low, high+1) for b in range(a, high+1)]
    random.Random(seed).shuffle(pairs)
    n_test,n_dev,n_train = (18,7,30) if digits==1 else (50,25,1000)
    cut = dict(test=pairs[:n_test], dev=pairs[n_test:n_test+n_dev], train=pairs[n_test+n_dev:][:n_train])
    def both(a, b): return [row(a, b)] if a==b else [row(a, b),row(b, a)]
    return {k:[r for p in ps for r in both(*p)] for k,ps in cut.items()}

def write_data(folder, digits, seed):
    "A folder with a file for each split"
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name,rows in splits(digits, seed).items():
        lines = [json.dumps(r)+'\n' for r in rows]
        (Path(folder)/f'{name}.jsonl').write_text(''.join(lines))


# The measures

def right(b:Batch, line)->torch.Tensor:
    "(B,n): is the last number of the answer the sum?"
    said = [line.template.text(ids) for group in b.tokens() for ids in group]
    answers = [r['answer'] for r in b.rows for _ in range(b.shape[1])]
    return torch.tensor(exact_number(said, answers), dtype=torch.float64).view(b.shape[:2])

def by_pair(x, rows)->torch.Tensor:
    "Means of (B,n) or (B,) over the answers to a sum and its swap, (pairs,)"
    x = torch.as_tensor(x, dtype=torch.float64).reshape(len(rows), -1).mean(1)
    at = {}
    for i,r in enumerate(rows): at.setdefault(r['pair'], []).append(i)
    return torch.stack([x[i].mean() for i in at.values()])

def first(rows)->list:
    "Of each pair the row that comes first, in the order of `by_pair`"
    at = {}
    for r in rows: at.setdefault(r['pair'], r)
    return list(at.values())

def names(rows)->list:
    "The unordered pairs"
    return [r['pair'] for r in first(rows)]

def majority(b:Batch, ok, line)->torch.Tensor:
    "(B,): is the answer that most of the n samples give the sum? Ties share"
    out = []
    for group,good in zip(b.tokens(), ok.tolist()):
        last = [last_number(line.template.text(ids)) for ids in group]
        votes = {w:last.count(w) for w in last if w not in (None,'')}
        best = [w for w,n in votes.items() if n==max(votes.values())]
        out.append(sum(good[last.index(w)] for w in best)/len(best) if best else 0.)
    return torch.tensor(out)

def binary_kl(p, q):
    "KL(p || q) of being right or not, nats; the least that any policy with accuracy p pays where the reference has q"
    return (p*(p/q).log()).nan_to_num(0.)+((1-p)*((1-p)/(1-q)).log()).nan_to_num(0.)

def reference_rates(line, ids, rows, most)->torch.Tensor:
    "(B,) how often the reference is right, from `LOOKS` samples each, a half added to both counts (Jeffreys)"
    b = sample(line.model('sft'), ids, LOOKS, most, seed=child_seed(line.config.seed, 'looks'))
    return (right(b.plus(rows=rows), line).sum(1)+.5)/(LOOKS+1)

def own_right_answers(line, rows, most, n_answers:int):
    "The reference fine-tuned on its own right answers: as many are drawn as GRPO draws, and the right ones are kept"
    o = line.config.sft
    model,n = line.model('sft'),8
    some = [rows[i%len(rows)] for i in range(n_answers//n)]
    b = sample(model, prompts(line, some), n, most, seed=child_seed(line.config.seed, 'own answers')).plus(rows=some)
    ok = right(b, line)>0
    kept = [(p,[r]) for p,group,good in zip(b.prompts, b.tokens(), ok.tolist()) for r,g in zip(group, good) if g]
    if not kept: raise ValueError(f'none of {n_answers} answers of the reference is right: there is nothing to learn from')
    data = Batch.from_tokens(*map(list, zip(*kept)))
    train_sft(model, data, replace(o, lr=1e-5, epochs=2, updates=None, batch_size=16, eval_every=None, skip=False),
              line.config.seed, acc=line.acc)
    return model,len(kept)

def prompts(line, rows)->list:
    "Their token ids"
    return [line.template.prompt(HH.ask(r['prompt'])) for r in rows]

def measure(run_folder, data, own=True):
    """Every policy of a run on the held-out sums; sums.json in its folder. What stands there already is kept. Without `own` none
    is fine-tuned on its own right answers"""
    line,began = Line(Run(run_folder)),time.process_time()
    path = Path(run_folder)/'sums.json'
    done = read_json(path) if path.exists() else dict(models={}, kl_at={}, measure_cpu_seconds=0)
    held = [json.loads(o) for o in (Path(data)/'test.jsonl').read_text().splitlines()][:HELD]
    train = [json.loads(o) for o in (Path(data)/'train.jsonl').read_text().splitlines()]
    ids,most,c = prompts(line, held),line.config.eval.max_new_tokens,line.config
    models = line.models
    drawn = c.grpo.updates*c.grpo.batch_size*c.grpo.group_size
    if not own or 'own answers' in done['models']: kept = done.get('kept')
    else: models['own answers'],kept = own_right_answers(line, train, most, drawn)
    models = {k:m for k,m in models.items() if k=='reference' or k not in done['models']}
    before = reference_rates(line, ids, held, most)
    sampled = sample_with_kl(models, ids, N, most, seed=child_seed(c.seed, 'held out'))
    out,kl_at = done['models'],done['kl_at']
    examples = done.get('examples', [{k:r[k] for k in ('prompt','answer')} for r in first(held)[:6]])
    for name,b in sampled.items():
        b = b.plus(rows=held)
        greedy = sample(models[name], ids, 1, most, temperature=0., seed=0).plus(rows=held)
        ok = right(b, line)
        after = ((ok.sum(1)+.5)/(N+1)).clamp(min=before)
        per = dict(
            greedy=right(greedy, line),
            sampled=ok,
            pass8=ok.amax(1),
            majority=majority(b, ok, line),
            finished=b.finished,
            length=b.lengths,
            kl=b.kl.sum(-1),
            least_kl=binary_kl(after, before))
        out[name] = {k:by_pair(v, held).tolist() for k,v in per.items()}
        texts = {r['prompt']:line.template.text(group[0]) for r,group in zip(held, b.tokens())}
        for e in examples: e[name] = texts[e['prompt']]
        kl_at[name] = (b.kl.sum((0, 1))/b.lengths.numel()).tolist()    # they add up to the KL of an answer
    write_json(path, dict(
        models=out, kl_at=kl_at, examples=examples, kept=kept, drawn=drawn, prompts=len(held), pairs=names(held), carry=[r['carry'] for r in first(held)],
        seed=c.seed, measure_cpu_seconds=done['measure_cpu_seconds']+round(time.process_time()-began)))


# The table

def pooled(runs)->dict:
    "{model: {measure: mean, low, high}} over all runs that have it, clustered by pair, and what each seed has"
    ds = [read_json(Path(r)/'sums.json') for r in runs]
    return dict(
        models={name:over_seeds(name, [d for d in ds if name in d['models']]) for name in ds[0]['models']},
        seeds=[d['seed'] for d in ds], prompts=[d['prompts'] for d in ds], pairs=[len(d['pairs']) for d in ds],
        examples=next((d['examples'] for d in ds if d['examples']), []),
        drawn=ds[0]['drawn'], kept=[d['kept'] for d in ds if d['kept']])

def over_seeds(name, ds)->dict:
    "A model of several runs; a pair that is held out in two of them counts once"
    keys,carry = ([x for d in ds for x in d[k]] for k in ('pairs','carry'))
    def all_of(k): return [x for d in ds for x in d['models'][name][k]]
    def share(k, keep=None):
        "Of all sums, or of those with or without a carry"
        some = [(x,p) for x,p,c in zip(all_of(k), keys, carry) if keep in (None,c)]
        return clustered_share(*map(list, zip(*some)))
    shares = {k:share(k) for k in ('greedy','sampled','pass8','majority','finished')}
    shares |= {'carry':share('sampled', True), 'no carry':share('sampled', False)}
    means = {k:clustered_mean(all_of(k), keys) for k in ('length','kl','least_kl')}
    of = [d['models'][name] for d in ds]
    by_seed = {k:[sum(o[k])/len(o[k]) for o in of] for k in ('sampled','greedy','kl','least_kl')}
    at = torch.tensor([d['kl_at'][name] for d in ds]).mean(0).tolist()
    return shares|means|dict(by_seed=by_seed, kl_at=at, seeds=[d['seed'] for d in ds])

def write_table(runs, out):
    "OUT.json and OUT.md"
    d = pooled(runs)
    keys = 'greedy','sampled','pass8','majority','carry','no carry','finished','length','kl','least_kl'
    rows = [['measure',*d['models']]]
    for k in keys: rows.append([k.replace('_',' '),*(interval(m[k]) for m in d['models'].values())])
    rows.append(['seeds',*(len(m['seeds']) for m in d['models'].values())])
    rows.append(['sampled, by seed',*(', '.join(f'{x:.2f}' for x in m['by_seed']['sampled']) for m in d['models'].values())])
    write_json(f'{out}.json', d)
    Path(f'{out}.md').write_text(md_table(rows)+'\n')
    print(md_table(rows))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='what', required=True)
    o = sub.add_parser('data')
    o.add_argument('folder')
    o.add_argument('--digits', type=int, choices=(1,2), default=1)
    o.add_argument('--seed', type=int, default=0)
    o = sub.add_parser('measure')
    o.add_argument('run')
    o.add_argument('--data', required=True)
    o.add_argument('--no-own', action='store_true', help='without fine-tuning on own right answers')
    o = sub.add_parser('table')
    o.add_argument('runs', nargs='+')
    o.add_argument('--out', required=True)
    a = p.parse_args()
    if a.what=='data': write_data(a.folder, a.digits, a.seed)
    elif a.what=='measure': measure(a.run, a.data, not a.no_own)
    else: write_table(a.runs, a.out)

if __name__=='__main__': main()
