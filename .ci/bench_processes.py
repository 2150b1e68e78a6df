"""One update of GRPO in several processes: answers per second, tokens of each process, and what is not shared.

    torchrun --nproc_per_node N .ci/bench_processes.py [--tiny] [--updates 3]

once for each N, one thread (or one GPU) each, on a machine with nothing else to do; the first process prints a line of JSON. One process also
predicts the seconds of several: what is shared falls to the largest share, the optimizer's step stays; the sum of the gradients comes to that.
"""
import argparse
import json
import time
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from rlhf_nb import sampling,train
from rlhf_nb.config import GRPOConfig
from rlhf_nb.core import generator,is_main,seed_all
from rlhf_nb.grpo import train_grpo
from rlhf_nb.parallel import everyones,processes,shares,together

p = argparse.ArgumentParser()
p.add_argument("--tiny", action="store_true", help="a model of two layers: a count of tokens, no measurement")
p.add_argument("--updates", type=int, default=3)
p.add_argument("--prompts", type=int, default=16)
p.add_argument("--device", default="auto")
a = p.parse_args()

shape = dict(n_layer=2, n_embd=64, n_head=2, vocab_size=512) if a.tiny else dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257)  # GPT-2 124M
seed_all(0)
policy, reference = (AutoModelForCausalLM.from_config(GPT2Config(n_positions=512, bos_token_id=None, eos_token_id=0, **shape)).eval() for _ in range(2))
reference.load_state_dict(policy.state_dict())
g = generator(0, "prompts")
prompts = [torch.randint(1, shape["vocab_size"], (int(n),), generator=g).tolist() for n in torch.randint(16, 128, (a.prompts,), generator=g)]
o = GRPOConfig(batch_size=a.prompts, group_size=8, max_new_tokens=32, updates=a.updates, eval_every=None, beta=.04)
count = dict(read=0, written=0)
apart = dict(optimizer=0., sum=0.)  # seconds of what no number of processes makes less


def counted_pieces(*args):
    pieces = own_pieces(*args)
    count["read"] += sum(sum(b.sizes) for b in pieces)
    return pieces


def counted_steps(prompts, steps, stop_ids):
    b = from_steps(prompts, steps, stop_ids)
    count["written"] += int(b.mask.sum()) if stop_ids else 0
    return b


def timed(f, name):
    "`f`, whose seconds are counted"
    def call(*args, **kw):
        began = time.perf_counter()
        out = f(*args, **kw)
        if acc.device.type == "cuda":
            torch.cuda.synchronize()
        apart[name] += time.perf_counter()-began
        return out
    return call


def even(b):
    return ((b.responses % 2 == 0) & b.mask).float().sum(-1)


own_pieces, from_steps = train.own_pieces, sampling.from_steps
with together():
    acc = train.mk_accelerator("auto" if a.device != "cpu" else "fp32", a.device)
    policy.to(acc.device)
    with patch.object(train, "own_pieces", counted_pieces), patch.object(sampling, "from_steps", counted_steps), \
            patch.object(torch.optim.AdamW, "step", timed(torch.optim.AdamW.step, "optimizer")), \
            patch.object(torch.distributed, "all_reduce", timed(torch.distributed.all_reduce, "sum")):
        rows = train_grpo(policy, reference, even, prompts, o, acc=acc)
    own = {k: v/len(rows) for k, v in apart.items()}
    rows = rows[1:] or rows  # the first one warms up
    parts = {k: sum(r[k] for r in rows)/len(rows) for k in ("sample_seconds", "score_seconds", "train_seconds")}
    update = sum(parts.values())
    line = dict(processes=processes(), device=str(acc.device), precision=acc.precision, update_seconds=update, answers_per_second=a.prompts*o.group_size/update,
                **parts, **{f"{k}_seconds": v for k, v in own.items()}, each=everyones(count))
    if processes() == 1:
        size = [len(q)+o.group_size*o.max_new_tokens for q in prompts]
        largest = {k: max(sum(size[i] for i in s) for s in shares(size, k))/sum(size) for k in (2, 3, 4, 8)}
        line["predicted_seconds"] = {k: own["optimizer"]+x*(update-own["optimizer"]) for k, x in largest.items()}
    if is_main():
        print(json.dumps(line))
