"""The same task trained by TRL's GRPOTrainer: same prompts, reward, seed, settings and machine, one thread.

    OMP_NUM_THREADS=1 python results/real/sums_trl.py MODEL sums/1-0 --seed 0 --out runs/trl-0.json

Needs trl 1.16. Writes reward and CPU-seconds of each update; `time_to` says when a mean of five updates first passes .9.
"""
import argparse,json,re,time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig,GRPOTrainer

_number = re.compile(r'-?\d[\d,]*(?:\.\d+)?')

def right(completions, answer, **kwargs):
    "Is the last number the answer?"
    said = [_number.findall(c[0]['content']) for c in completions]
    return [float(bool(s) and s[-1].replace(',', '')==a) for s,a in zip(said, answer)]

class Clock(TrainerCallback):
    "CPU-seconds and reward of each update"
    def __init__(self): self.rows,self.began = [],time.process_time()
    def on_log(self, args, state, control, logs=None, **kwargs):
        if 'reward' in logs: self.rows.append(dict(reward=logs['reward'], cpu=time.process_time()-self.began))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model')
    p.add_argument('data')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--updates', type=int, default=60)
    p.add_argument('--lr', type=float, default=1e-5)
    p.add_argument('--beta', type=float, default=.2)
    p.add_argument('--out', required=True)
    a = p.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(o) for o in (Path(a.data)/'train.jsonl').read_text().splitlines()]
    data = Dataset.from_list([dict(prompt=[dict(role='user', content=r['prompt'])], answer=r['answer']) for r in rows])
    clock = Clock()
    trainer = GRPOTrainer(a.model, right, train_dataset=data, callbacks=[clock], args=GRPOConfig(
        output_dir=str(Path(a.out).with_suffix('')), use_cpu=True, seed=a.seed, max_steps=a.updates,
        learning_rate=a.lr, lr_scheduler_type='constant', adam_beta2=.99, max_grad_norm=1.0, beta=a.beta,
        per_device_train_batch_size=32, num_generations=8, max_completion_length=48, temperature=1.0, top_k=0,
        loss_type='dapo', scale_rewards='none', logging_steps=1, save_strategy='no', report_to='none', bf16=False,
        gradient_checkpointing=False, model_init_kwargs=dict(dtype=torch.float32), dataloader_num_workers=0))
    trainer.train()
    Path(a.out).write_text(json.dumps(dict(seed=a.seed, rows=clock.rows)))

if __name__=='__main__': main()
