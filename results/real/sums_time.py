"""The same task trained by this package and by TRL's GRPOTrainer: same prompts, reward, settings, seed and machine.

    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
    python results/real/sums_time.py ours MODEL sums/1-0 --seed 0 --out times/ours-0.json
    python results/real/sums_time.py trl  MODEL sums/1-0 --seed 0 --out times/trl-0.json
    python results/real/sums_time.py table times/ours-*.json times/trl-*.json --out results/real/sums_time

Both read `grpo` of sums1.yaml. The clock stands in the reward function, which both call once an update: reward and
CPU-seconds since training began. A run ends where the mean of five updates passes .9. `trl` needs trl 1.16.
"""
import argparse,json,re,time
from pathlib import Path

import torch

from rlhf_nb.core import write_json
from rlhf_nb.settings import load_config
from rlhf_nb.text import HH,md_table

GOAL,WINDOW = .9,5
_number = re.compile(r'-?\d[\d,]*(?:\.\d+)?')

class Done(Exception): "The goal is reached"

class Clock:
    "Rewards and CPU-seconds of the updates; ends training at the goal"
    def __init__(self): self.rows,self.began = [],time.process_time()
    def __call__(self, said, answers)->list:
        "Is the last number of each answer the sum?"
        found = [_number.findall(o) for o in said]
        right = [float(bool(f) and f[-1].replace(',', '')==a) for f,a in zip(found, answers)]
        self.rows.append(dict(reward=sum(right)/len(right), cpu=time.process_time()-self.began))
        last = [r['reward'] for r in self.rows[-WINDOW:]]
        print(len(self.rows), self.rows[-1], flush=True)
        if len(last)==WINDOW and sum(last)/WINDOW>=GOAL: raise Done
        return right

def ours(a, rows, c):
    "Train with this package until the clock ends it"
    from rlhf_nb.grpo import train_grpo
    from rlhf_nb.load import load_policy
    from rlhf_nb.template import Template
    from rlhf_nb.train import mk_accelerator
    (policy,tok),(reference,_) = load_policy(a.model),load_policy(a.model)
    t,clock = Template(tok),Clock()
    def score(b):
        said = [t.text(ids) for group in b.tokens() for ids in group]
        n = b.shape[1]
        return torch.tensor(clock(said, [r['answer'] for r in b.rows for _ in range(n)])).view(-1, n)
    ids = [t.prompt(HH.ask(r['prompt'])) for r in rows]
    clock.began = time.process_time()
    try: train_grpo(policy, reference, score, ids, c.grpo, a.seed, acc=mk_accelerator(c.model.precision), rows=rows)
    except Done: pass
    return clock

def trl(a, rows, c):
    "Train with TRL until the clock ends it"
    from datasets import Dataset
    from trl import GRPOConfig,GRPOTrainer
    o,clock = c.grpo,Clock()
    def right(completions, answer, **kwargs): return clock([x[0]['content'] for x in completions], answer)
    data = Dataset.from_list([dict(prompt=[dict(role='user', content=r['prompt'])], answer=r['answer']) for r in rows])
    trainer = GRPOTrainer(a.model, right, train_dataset=data, args=GRPOConfig(
        output_dir=str(Path(a.out).with_suffix('')), use_cpu=True, seed=a.seed, max_steps=o.updates,
        learning_rate=o.lr, lr_scheduler_type=o.schedule, warmup_steps=round(o.warmup*o.updates), adam_beta2=o.beta2,
        max_grad_norm=o.max_grad_norm, beta=o.beta, temperature=o.temperature, top_k=0, top_p=1.,
        per_device_train_batch_size=o.batch_size*o.group_size, num_generations=o.group_size,
        max_completion_length=o.max_new_tokens, loss_type=o.loss_type, scale_rewards=o.scale_rewards,
        bf16=c.model.precision=='bf16', gradient_checkpointing=False, model_init_kwargs=dict(dtype=torch.float32),
        logging_steps=1, save_strategy='no', report_to='none', dataloader_num_workers=0))
    clock.began = time.process_time()
    try: trainer.train()
    except Done: pass
    return clock

def table(files, out):
    "OUT.json and OUT.md: CPU-seconds to the goal, and of an update"
    found = {}
    for f in files:
        d = json.loads(Path(f).read_text())
        found.setdefault(d['who'], []).append(d)
    rows = [['','seed','reached','updates','CPU-seconds','answers']]
    for who,ds in found.items():
        for d in sorted(ds, key=lambda d: d['seed']):
            r = d['rows']
            rows.append([who,d['seed'],'yes' if d['reached'] else 'no',len(r),f"{r[-1]['cpu']:.0f}",len(r)*d['answers']])
    write_json(f'{out}.json', found)
    Path(f'{out}.md').write_text(md_table(rows)+'\n')
    print(md_table(rows))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='what', required=True)
    for name in ('ours','trl'):
        o = sub.add_parser(name)
        o.add_argument('model')
        o.add_argument('data')
        o.add_argument('--config', default=str(Path(__file__).with_name('sums1.yaml')))
        o.add_argument('--seed', type=int, default=0)
        o.add_argument('--out', required=True)
    o = sub.add_parser('table')
    o.add_argument('files', nargs='+')
    o.add_argument('--out', required=True)
    a = p.parse_args()
    if a.what=='table': return table(a.files, a.out)
    torch.set_num_threads(1)
    rows = [json.loads(o) for o in (Path(a.data)/'train.jsonl').read_text().splitlines()]
    c = load_config(a.config)
    clock = (ours if a.what=='ours' else trl)(a, rows, c)
    last = [r['reward'] for r in clock.rows[-WINDOW:]]
    write_json(a.out, dict(who=a.what, seed=a.seed, rows=clock.rows, answers=c.grpo.batch_size*c.grpo.group_size,
                           reached=sum(last)/WINDOW>=GOAL))

if __name__=='__main__': main()
