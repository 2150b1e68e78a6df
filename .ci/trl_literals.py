"""Reference losses, computed by TRL's own trainers: prints JSON with the inputs, the losses and their gradients.

The tests of notebooks 21, 29 and 30 hold these numbers as literals, so nothing here runs in CI. To compute them again, in an
environment of its own (not the project's: TRL is not one of its requirements):

    pip install 'trl==1.16.0' 'transformers==5.23.0' 'torch==2.13.0'
    python .ci/trl_literals.py > literals.json

Each number comes out of the public `compute_loss` of a real trainer. Only the model's forward pass is replaced, by one that
returns the log-probabilities or scores given below, so that no weights are needed to repeat a number. Log-probabilities are
(prompts, responses, tokens); what lies beyond a response's length is padding and is given as 0.
"""
import contextlib
import json
import os
import sys
import tempfile
from importlib.metadata import version
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast, logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

logging.set_verbosity_error()
PROMPT = 2  # tokens of each prompt
words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(9)]
tok = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0")),
    pad_token="<pad>", eos_token="<eos>", unk_token="w0")
tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
size = dict(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=len(words), pad_token_id=0, eos_token_id=1, bos_token_id=1)
pairs = Dataset.from_list([dict(prompt="w1 w2", chosen=" w3 w4", rejected=" w5")] * 4)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def mk(trainer, config, kind=GPT2LMHeadModel, data=pairs, kw=(), **args):
    "A TRL trainer with a two-layer GPT-2"
    kind(GPT2Config(**size, num_labels=1)).save_pretrained(folder)  # on disk, where trainers look for their reference
    config = config(output_dir=folder, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, **args)
    return trainer(model=kind.from_pretrained(folder), args=config, train_dataset=data, processing_class=tok, **dict(kw))


def result(loss, *wrt):
    return dict(loss=loss.item(), grad=[g.tolist() for g in torch.autograd.grad(loss, wrt)] if len(wrt) > 1
                else torch.autograd.grad(loss, wrt)[0].tolist())


def masks(lengths, n):
    return torch.arange(n) < torch.tensor(lengths)[..., None]


# Reward model
def reward():
    chosen, rejected, margin = [1.25, -0.4, 0.3], [0.5, 0.7, -2.1], [0.2, 0.0, 1.5]
    out = dict(chosen=chosen, rejected=rejected, margin=margin, cases={})
    for name, center, extra in (("plain", None, {}), ("margin", None, dict(margin=tensor(margin))),
                                ("center_0.01", 0.01, {}), ("margin_center_0.01", 0.01, dict(margin=tensor(margin)))):
        tr = mk(RewardTrainer, RewardConfig, GPT2ForSequenceClassification, center_rewards_coefficient=center)
        w, l = tensor(chosen).requires_grad_(), tensor(rejected).requires_grad_()
        stub = lambda **kw: SimpleNamespace(logits=torch.cat([w, l])[:, None])
        out["cases"][name] = result(tr.compute_loss(stub, dict(attention_mask=torch.ones(6, 4), **extra)), w, l)
    return out


# DPO and its family
def preferences():
    lengths = [[4, 3], [2, 4], [3, 1]]
    lp = tensor([[[-0.41, -1.32, -0.77, -2.05], [-1.93, -0.28, -1.14, 0]], [[-0.66, -1.81, 0, 0], [-0.92, -2.44, -0.35, -1.27]],
                 [[-1.58, -0.19, -0.84, 0], [-3.02, 0, 0, 0]]])
    ref = tensor([[[-0.93, -1.21, -1.49, -1.88], [-1.02, -0.61, -0.87, 0]], [[-0.71, -1.09, 0, 0], [-1.33, -1.96, -0.58, -2.11]],
                  [[-1.24, -0.72, -0.95, 0], [-1.45, 0, 0, 0]]])
    return lengths, lp, ref


def dpo():
    lengths, lp0, ref = preferences()
    mask = masks(lengths, lp0.shape[-1])
    B, _, R = lp0.shape
    out = dict(lengths=lengths, log_probs=lp0.tolist(), ref_log_probs=ref.tolist(), cases={})
    stack = lambda x: torch.cat([x[:, 0], x[:, 1]])                       # TRL's order: all chosen, then all rejected
    prompt = lambda x, n: torch.cat([torch.zeros(len(x), n, dtype=x.dtype), x], 1)

    def loss(tr, lp, rows=slice(None)):
        tokens, m = prompt(stack((lp*mask)[rows]), PROMPT - 1), stack(mask[rows]).long()
        zero = torch.zeros_like(tokens)
        stub = lambda **kw: SimpleNamespace(log_probs=tokens, entropy=zero, mean_logits=zero, is_top1=zero.bool())
        sums = (ref*mask)[rows].sum(-1)
        ids = torch.full((len(m), PROMPT + R), 2)
        tr.precompute_ref_logps = True                                    # the reference's sums come with the batch
        return tr.compute_loss(stub, dict(input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=prompt(m, PROMPT),
                                          ref_chosen_logps=sums[:, 0], ref_rejected_logps=sums[:, 1]))

    def case(name, each=False, **args):
        tr = mk(DPOTrainer, DPOConfig, **args)
        lp = lp0.clone().requires_grad_()
        total = sum(loss(tr, lp, slice(i, i+1)) for i in range(B))/B if each else loss(tr, lp)
        out["cases"][name] = dict(args, **result(total, lp))

    case("sigmoid", loss_type=["sigmoid"], beta=0.2)
    case("ipo", loss_type=["ipo"], beta=0.2)
    case("robust", loss_type=["robust"], beta=0.2, label_smoothing=0.1)
    # cDPO: TRL's `sigmoid` ignores label_smoothing, but its `aot` sorts over the batch, and so is cDPO on one pair at a time
    case("cdpo", each=True, loss_type=["aot"], beta=0.2, label_smoothing=0.1)
    case("sigmoid_sft", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.2)
    simpo(out["cases"], lengths, lp0, mask)
    return out


def simpo(cases, lengths, lp0, mask):
    "SimPO is a loss type of CPOTrainer, which computes log-probabilities from logits itself"
    args = dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)
    tr = mk(CPOTrainer, CPOConfig, max_length=16, **args)
    lp = lp0.clone().requires_grad_()
    B, _, R = lp.shape
    tokens = torch.cat([lp[:, 0], lp[:, 1]])
    target, V = 2, len(words)
    rest = (-torch.expm1(tokens)/(V - 1)).clamp(min=1e-30).log()          # every other token has an equal share of what is left
    logits = rest[..., None].expand(-1, -1, V).clone()
    logits[..., target] = tokens
    logits = torch.cat([torch.zeros(2*B, PROMPT - 1, V), logits, torch.zeros(2*B, 1, V)], 1)  # position t predicts token t+1
    batch = {}
    for k, name in enumerate(("chosen", "rejected")):
        m = torch.cat([torch.zeros(B, PROMPT, dtype=bool), mask[:, k]], 1)
        ids = torch.full((B, PROMPT + R), target)
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": torch.ones_like(ids), f"{name}_labels": ids.masked_fill(~m, -100)}
    stub = lambda *a, **kw: SimpleNamespace(logits=logits)
    cases["simpo"] = dict(args, **result(tr.compute_loss(stub, batch), lp))


# GRPO
def grpo():
    lengths = [[4, 2, 3], [1, 4, 3]]                                      # two prompts, three responses each
    n, R = 6, 4
    mask = masks(lengths, R)
    lp0 = tensor([[[-0.52, -1.31, -0.88, -2.10], [-0.95, -0.43, 0, 0], [-1.72, -0.64, -1.05, 0]],
                  [[-0.83, 0, 0, 0], [-1.16, -0.27, -1.94, -0.59], [-0.70, -1.48, -0.36, 0]]])
    old = lp0 + tensor([[[0.05, -0.24, -0.40, 0.31], [0.12, -0.35, 0, 0], [-0.07, 0.44, -0.26, 0]],
                        [[-0.23, 0, 0, 0], [0.29, -0.02, -0.50, 0.18], [-0.26, 0.36, 0.01, 0]]])
    ref = lp0 + tensor([[[-0.30, 0.21, 0.65, -0.12], [0.47, -0.09, 0, 0], [0.15, -0.55, 0.33, 0]],
                        [[0.28, 0, 0, 0], [-0.41, 0.06, 0.72, -0.19], [0.08, 0.37, -0.63, 0]]])
    old, ref = old.round(decimals=2), ref.round(decimals=2)
    adv = [[1.1, -0.6, -0.5], [0.9, 0.4, -1.3]]
    limit = 8
    out = dict(lengths=lengths, log_probs=lp0.tolist(), old_log_probs=old.tolist(), ref_log_probs=ref.tolist(), advantages=adv,
               max_completion_length=limit, cases={}, advantage_cases={})
    prompts = Dataset.from_list([dict(prompt="w1 w2")] * 2)

    def trainer(f=lambda completions, **kw: [0.0]*len(completions), **args):
        return mk(GRPOTrainer, GRPOConfig, data=prompts, kw=dict(reward_funcs=f), num_generations=3, steps_per_generation=1,
                  per_device_train_batch_size=n, gradient_accumulation_steps=1, max_completion_length=limit, **args)

    def case(name, mask=mask, **args):
        tr = trainer(**args)
        tr.current_gradient_accumulation_steps = 1                        # what Trainer's loop would set
        lp = lp0.clone().requires_grad_()
        flat, m = lp.view(n, R), mask.view(n, R).long()
        tr._get_per_token_logps_and_entropies = lambda *a, **kw: (flat, torch.zeros(n, R), None)
        ids = torch.full((n, R), 2)
        loss = tr.compute_loss(tr.model, dict(prompt_ids=ids[:, :PROMPT], prompt_mask=torch.ones(n, PROMPT, dtype=torch.long),
            completion_ids=ids, completion_mask=m, advantages=tensor(adv).view(n), old_per_token_logps=old.view(n, R),
            ref_per_token_logps=ref.view(n, R), num_items_in_batch=m.sum()))
        out["cases"][name] = dict(args, **result(loss, lp))

    for kind in ("grpo", "dr_grpo", "dapo"):
        for high in (0.2, 0.28):
            args = dict(loss_type=kind, epsilon=0.2, epsilon_high=high)
            case(f"{kind}_high{high}_beta0", beta=0.0, **args)
            case(f"{kind}_high{high}_beta0.1", beta=0.1, use_bias_correction_kl=False, **args)
            case(f"{kind}_high{high}_beta0.1_corrected", beta=0.1, use_bias_correction_kl=True, **args)
        without = mask.clone()
        without[0, 2] = False                                             # as TRL masks a truncated completion
        case(f"{kind}_truncated", mask=without, loss_type=kind, epsilon=0.2, beta=0.1, use_bias_correction_kl=False)
    for beta in (0.0, 0.1):
        plain = dict(beta=beta, use_bias_correction_kl=False)
        case(f"cispo_beta{beta}", loss_type="cispo", epsilon_high=1.28, **plain)  # TRL's is the bound itself, and the only one
        case(f"sequence_beta{beta}", loss_type="grpo", importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.1, **plain)

    rewards = [[1.0, 0.25, -0.5], [2.0, 2.0, 3.5]]
    out["rewards"] = rewards
    flat = [r for o in rewards for r in o]
    for scale in ("group", "batch", "none"):
        tr = trainer(lambda completions, **kw: flat, scale_rewards=scale, beta=0.0)
        tr._generate = lambda prompts: ([[2, 3]]*n, [[4, 1]]*n, None, ["w2"]*n, None, {}, None, None)
        a = tr._generate_and_score_completions([dict(prompt="w1 w2")]*n)["advantages"]
        out["advantage_cases"][scale] = a.view(2, 3).tolist()
    other = [10.0, 30.0, 20.0, 0.0, None, 50.0]                           # a second source, which says nothing about one answer
    tr = trainer([lambda completions, **kw: flat, lambda completions, **kw: other], reward_weights=[2.0, 0.5],
                           multi_objective_aggregation="normalize_then_sum", beta=0.0)
    tr._generate = lambda prompts: ([[2, 3]]*n, [[4, 1]]*n, None, ["w2"]*n, None, {}, None, None)
    a = tr._generate_and_score_completions([dict(prompt="w1 w2")]*n)["advantages"]
    out["advantage_cases"]["normalise_each"] = a.view(2, 3).tolist()
    return out


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        out = dict(versions={o: version(o) for o in ("trl", "transformers", "torch")}, reward=reward(), dpo=dpo(), grpo=grpo())
    print(json.dumps(out, indent=1))
