#!/usr/bin/env python3
"""What only a GPU can tell about rlhf_nb; gpu_check.sh calls it. Each part is a process of its own with a time limit, and each finding a
line of OUT/results.jsonl, written at once: date, card, commit, versions, part, name, ok, then numbers, or the error.

  python .ci/gpu_check.py --out $OUT --budget 520 [--parts env exact ...]
  python .ci/gpu_check.py --out $OUT --budget 900 --device cpu --size tiny     the dry run
Models have random weights: of GPT-2's shape, or tiny. Prompts have the lengths of HH-RLHF (median 94 tokens, longest 254).
"""
import argparse
import contextlib
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from copy import deepcopy
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg",
                  TRL_EXPERIMENTAL_SILENCE="1", TRANSFORMERS_VERBOSITY="error", CUBLAS_WORKSPACE_CONFIG=":4096:8")

# part: seconds at most, the most important first
limits = dict(env=40, exact=80, stages_bf16=80, decode=110, adapters=80, plain_peft=40, tokens=50, demo=80, four_bits=60, demo_fp16=60,
              library=60, stages_fp16=60, trl=110, determinism=60, stages_fp32=60, t4=110)
packages = "torch", "transformers", "accelerate", "trl", "peft", "bitsandbytes"


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def emit(a, part, name, **found):
    "A finding, on the disk before anything else happens"
    def plain(v):
        if isinstance(v, float):
            return round(v, 6) if math.isfinite(v) else str(v)
        return v if isinstance(v, (int, type(None))) else str(v)[:1000]
    row = dict(date=str(date.today()), card=a.card, commit=a.commit, **{p: installed(p) for p in packages}, part=part, name=name)
    row |= {k: plain(v) for k, v in found.items()}
    with open(a.out/"results.jsonl", "a") as f:
        f.write(json.dumps(row)+"\n")
        f.flush()
        os.fsync(f.fileno())
    return row


def run_parts(a):
    "One part after another, each with the time that is left for it; were all findings good?"
    began = time.time()
    with open(a.out/"log.txt", "a") as log:
        for part in a.parts or limits:
            left = a.budget-(time.time()-began)
            limit = min(limits[part]*a.slack, left-5)
            if limit < 12:
                emit(a, part, "skipped", ok=False, error=f"no time: {left:.0f} s left of {a.budget:.0f}")
                continue
            print(f"\n===== {part} (at most {limit:.0f} s)", file=log, flush=True)
            t = time.time()
            here = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--limit", str(limit)]
            child = subprocess.Popen(here, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                rc = child.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                rc = "time limit"
            emit(a, part, "part", ok=rc == 0, rc=rc, seconds=round(time.time()-t, 1))
            print(f"{part}: rc {rc}, {time.time()-t:.0f} s; {time.time()-began:.0f} s gone", flush=True)
    rows = [json.loads(line) for line in open(a.out/"results.jsonl")]
    print(table(rows))
    return all(r["ok"] for r in rows)


def table(rows, most=11000):
    "A line for each finding, as long as fits: a device machine sends back the end of the output"
    def short(v):
        return f"{v:.4g}" if isinstance(v, float) else str(v)
    def line(r):
        at = list(r).index("name")
        numbers = ", ".join(f"{k} {short(v)}" for k, v in list(r.items())[at+1:] if k not in ("ok", "took"))
        return f'{"" if r["ok"] else "FAIL "}{r["part"]} {r["name"]}: {numbers}'
    lines = [line(r) for r in rows if r["name"] != "part" or not r["ok"]]
    each = max(60, most//max(1, len(lines))-1)
    return "\n".join(o[:each] for o in lines)


class Kit:
    "What every part uses: a device, models, batches, a clock"
    def __init__(self, a):
        self.a, self.part, self.began, self.made = a, a.part, time.time(), {}
        self.cuda, self.tiny = a.device == "cuda", a.size == "tiny"
        self.dev = torch.device("cuda:0" if self.cuda else "cpu")
        self.half = (torch.bfloat16, torch.float16) if self.cuda else (torch.bfloat16,)
        self.P, self.R, self.new = (24, 12, 8) if self.tiny else (256, 128, 96)    # tokens: prompt, response, sampled
        if not self.cuda:
            torch.set_num_threads(1)

    def emit(self, name, **found):
        print(json.dumps(emit(self.a, self.part, name, **found)), flush=True)

    def check(self, name, f, need=3):
        "Run `f`; a dictionary that it returns is written, an error too"
        if self.a.limit-(time.time()-self.began) < need:
            return self.emit(name, ok=False, error="no time left in this part")
        t = time.time()
        try:
            r = f()
            self.sync()
            self.emit(name, **{"ok": True, **(r if isinstance(r, dict) else {}), "took": round(time.time()-t, 2)})
        except Exception as e:
            traceback.print_exc()
            tb = traceback.extract_tb(e.__traceback__)
            at = ([o for o in tb if "rlhf_nb" in o.filename] or tb)[-1]
            self.emit(name, ok=False, error=f"{type(e).__name__}: {str(e)[:400]}", at=f"{Path(at.filename).name}:{at.lineno}")
        finally:
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def clock(self, f, n=5, warm=1):
        "Median seconds of `f()`"
        ts = []
        for _ in range(warm+n):
            self.sync()
            t = time.perf_counter()
            f()
            self.sync()
            ts.append(time.perf_counter()-t)
        return statistics.median(ts[warm:])

    def fresh(self):
        "The peak of memory is counted from here on"
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        return dict(peak_gb=torch.cuda.max_memory_allocated()/1e9) if self.cuda else {}

    def acc(self, precision):
        return mk_accelerator("bf16" if precision == "fp16" and not self.cuda else precision, self.dev.type)

    def lm(self, seed=0, kind="gpt2", **sizes):
        "A causal LM on the device; made once"
        key = seed, kind, *sizes.items()
        if key not in self.made:
            torch.manual_seed(seed)
            ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
            gpt2 = dict(n_layer=2, n_embd=64, n_head=4, n_positions=512) if self.tiny else dict(n_positions=1024)
            llama = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
            off = dict(resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., activation_function="gelu_pytorch_tanh")
            made = dict(gpt2=lambda: GPT2Config(**{"vocab_size": self.vocab, **gpt2, **sizes}, **off, **ends),
                        llama=lambda: LlamaConfig(**{"vocab_size": 601, **llama, **sizes}, max_position_embeddings=512, **ends))
            self.made[key] = AutoModelForCausalLM.from_config(made[kind]()).eval()
        return deepcopy(self.made[key]).to(self.dev)

    @property
    def vocab(self):
        return 601 if self.tiny else 50258

    def prompts(self, n, vocab=None):
        "Random tokens, as long as prompts of HH-RLHF are"
        g = generator(0, "prompts")
        of = statistics.NormalDist(4.54, .62).inv_cdf
        sizes = [max(3, int(min(254., math.exp(of((i+.5)/n)))*(.1 if self.tiny else 1))) for i in range(n)]
        return [ids(sizes[i], g, vocab or self.vocab) for i in torch.randperm(n, generator=g).tolist()]

    def batch(self, B, G, P, R, vocab=None):
        "B prompts of P random tokens, with G responses of R each"
        g = generator(0, "batch")
        vocab = vocab or self.vocab
        return Batch.from_tokens([ids(P, g, vocab) for _ in range(B)], [[ids(R, g, vocab) for _ in range(G)] for _ in range(B)])

    def folder(self):
        "A model, a classifier and rows in a temporary folder, as `rlhf_nb bench` makes them: (folder, tokenizer)"
        if "folder" not in self.made:
            world = make_world(WorldConfig(n_corpus=2000, n_pairs=600))
            tok = world_tokenizer(world)
            self.kept = tempfile.TemporaryDirectory()
            prepare(Path(self.kept.name), "tiny" if self.tiny else "gpt2", world.train, tok, 64)
            self.made["folder"] = Path(self.kept.name), tok
        return self.made["folder"]

    def updates(self, acc, model, b, step, o, opt=None, n=4):
        "Milliseconds and tokens of an update on the same batch, the first two left out"
        self.fresh()
        it = steps(model, (([b], {}) for _ in range(n+2)), step, o, n+2, acc=acc, opt=opt)
        rows = [next(it) for _ in range(2)]
        s = self.clock(lambda: rows.append(next(it)), n, 0)
        it.close()
        acc.free_memory()
        tokens = sum(b.sizes)
        return dict(ms=1e3*s, tokens=tokens, tokens_per_s=tokens/s, loss=rows[-1]["loss"], grad_norm=rows[-1].get("grad_norm"), **self.peak())


def env(k):
    "The card, and its ceilings"
    more = {p: installed(p) for p in ("fastcore", "pydantic", "datasets", "triton")}
    k.check("versions", lambda: dict(python=sys.version.split()[0], cuda=torch.version.cuda, **more))
    def gpu():
        p = torch.cuda.get_device_properties(0)
        return dict(gpu=p.name, gb=p.total_memory/1e9, sms=p.multi_processor_count, capability=f"{p.major}.{p.minor}", free_gb=torch.cuda.mem_get_info()[0]/1e9)
    if k.cuda:
        k.check("gpu", gpu)
    n, m = (1 << 28, 8192) if k.cuda else (1 << 20, 256)
    def copy():
        x = torch.ones(n, device=k.dev)
        y = torch.empty_like(x)
        return dict(tb_per_s=8*n/k.clock(lambda: y.copy_(x), 9)/1e12)
    k.check("copy bandwidth", copy)
    def product(dtype, tf32):
        x, y = (torch.randn(m, m, device=k.dev).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return dict(tflops=2*m**3/k.clock(lambda: x@y, 7, 2)/1e12)
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("fp16", torch.float16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)):
        if k.cuda or name == "fp32":
            k.check(f"matmul {name}", lambda: product(dtype, tf32))
    def launches():
        x = torch.zeros(64, device=k.dev)
        def us(f, n=200):
            return k.clock(lambda: [f() for _ in range(n)])/n*1e6
        d = dict(eager_us_per_op=us(lambda: x.add_(1)), item_us=us(lambda: x[0].item()), host_to_device_us=us(lambda: torch.tensor([1.], device=k.dev)))
        if k.cuda:
            g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g):
                for _ in range(1000):
                    x.add_(1)
            d["graph_us_per_op"] = k.clock(g.replay)*1e3
        return d
    k.check("launch overhead", launches)


def gradient(model, step, b, micro=10**6):
    "Of all that learns, on the CPU in float64; of micro-batches of so many tokens"
    net, n = Net(model), counts(b)
    net.zero_grad()
    for i in micro_batches(b, micro):
        step(net, b[i].to(next(model.parameters()).device), n)[0].backward()
    return torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.requires_grad])


def off(x, y):
    "How far apart, relative to the second"
    return ((x-y).norm()/y.norm()).item()


def ids(n, g, vocab=601):
    return torch.randint(3, vocab, (n,), generator=g).tolist()


def exact_numbers(k, kind, m):
    "Log-probabilities, gradients and heads against float64 and the CPU, for groups of three sizes"
    g = generator(0, "exact")
    mixed = {G: Batch.from_tokens([ids(n, g) for n in (9, 30, 3, 70)], [[ids(1+(7*i+5*j) % 23, g) for j in range(G)] for i in range(4)]) for G in (1, 2, 8)}
    m64, cpu = deepcopy(m).cpu().double(), deepcopy(m).cpu()
    def farthest(f, most=math.inf):
        "The largest difference by group size, within the bound if there is one"
        out = {f"G{G}": f(b).abs().max().item() for G, b in mixed.items()}
        return {**out, "ok": max(out.values()) < most}
    def plain(b):
        want = torch.zeros(b.shape, dtype=torch.float64)
        for i, (p, rs) in enumerate(zip(b.prompts, b.tokens())):
            for j, r in enumerate(rs):
                lp = m64(torch.tensor([p+r])).logits[0, len(p)-1:-1].log_softmax(-1)
                want[i, j, :len(r)] = lp.gather(-1, torch.tensor(r)[:, None])[:, 0]
        return want
    k.check(f"{kind} log_probs against float64 plain", lambda: farthest(lambda b: log_probs(m, b.to(k.dev)).cpu()-plain(b), 2e-4))
    for dtype in k.half:
        def auto(b):
            with torch.autocast(k.dev.type, dtype=dtype):
                low = log_probs(m, b.to(k.dev))
            return low.float()-log_probs(m, b.to(k.dev))
        k.check(f"{kind} {str(dtype)[6:]} autocast log_probs against float32", lambda: farthest(auto))
    @torch.enable_grad()
    def grads():
        want = gradient(cpu, sft_step, mixed[8])
        d = dict(whole=off(gradient(m, sft_step, mixed[8]), want), cut=off(gradient(m, sft_step, mixed[8], 150), want))
        return {**d, "ok": max(d.values()) < 1e-4}
    k.check(f"{kind} gradient against the CPU (relative)", grads)
    @torch.enable_grad()
    def trained():
        "On the device, and on the CPU"
        b = Batch.from_tokens([ids(n, g) for n in (9, 30, 3, 70)*4], [[ids(20, g)] for _ in range(16)])
        both = deepcopy(m), deepcopy(cpu)
        o = SFTConfig(updates=5, batch_size=8, lr=1e-3)
        losses = [[r["loss"] for r in train_sft(x, b, o, 0, None, mk_accelerator("fp32", x.device.type))] for x in both]
        d = max((x.cpu()-y).abs().max().item() for x, y in zip(*(x.parameters() for x in both)))
        return dict(weights=d, losses=max(abs(x-y) for x, y in zip(*losses)), ok=d < 1e-3)
    k.check(f"{kind} five updates of SFT against the CPU", trained)
    def heads():
        b, out = mixed[2], {}
        for name, make, f in (("last_token", mk_reward_model, scores), ("value", mk_value_model, values)):
            x = make(m)
            x.score.weight.data = torch.randn(x.score.weight.shape, generator=generator(0, name)).to(k.dev)
            out[name] = (f(x, b.to(k.dev)).cpu()-f(deepcopy(x).cpu(), b)).abs().max().item()
        out["exact_kl self"] = exact_kl(m, m, b.to(k.dev)).abs().max().item()
        return {**out, "ok": max(out.values()) < 1e-3}
    k.check(f"{kind} heads against the CPU", heads)


def exact_samples(k, kind, m):
    "Answers in any order and alone, and what the float32 forward thinks of them; greedy ones against plain transformers"
    ps = [ids(n, generator(n, "exact")) for n in (9, 30, 3, 70, 12, 45)]
    def company(x, G):
        def answers(m, ps):
            return sample(m, ps, G, 32, 1., 3).tokens()
        b = sample(x, ps, G, 32, 1., 3)
        def parted(other):
            return sum(u != v for o, q in zip(b.tokens(), other) for u, v in zip(o, q))
        gap = (b.old_log_probs-log_probs(m, b)).abs()[b.mask]
        d = dict(answers=6*G, parted_reversed=parted(answers(x, ps[::-1])[::-1]), parted_alone=parted([answers(x, [p])[0] for p in ps]))
        d |= dict(gap=gap.max().item(), mean_gap=gap.mean().item())
        if x is not m:
            return d
        # in other company the last digit of a probability differs, and seldom (2e-9 beside the noise was seen) a token with it
        good = d["parted_reversed"]+d["parted_alone"] <= 1 and d["gap"] < 2e-4
        if k.cuda:
            d["parted_from_cpu"] = parted(answers(deepcopy(m).cpu(), ps))     # rounding may part some
        return {**d, "ok": good}
    for G in (1, 4, 8, 20):
        k.check(f"{kind} the same answer in any company, n={G}", lambda: company(m, G))
    for dtype in k.half:
        k.check(f"{kind} {str(dtype)[6:]} copy: company and gap to float32", lambda: company(deepcopy(m).to(dtype), 8))
    def greedy():
        def plain(p):
            t = torch.tensor([p], device=k.dev)
            return m.generate(t, attention_mask=torch.ones_like(t), max_new_tokens=24, do_sample=False)[0, len(p):].tolist()
        differ = sum(sample(m, [p], 1, 24, 0.).tokens()[0][0] != plain(p) for p in ps)
        return dict(differ=differ, ok=differ == 0)
    k.check(f"{kind} greedy against generate", greedy)


def exact(k):
    "Numbers and samples of two kinds of models"
    torch.set_grad_enabled(False)
    for kind, sizes in dict(gpt2=dict(n_layer=4, n_embd=128, n_head=4, n_positions=512, vocab_size=601), llama={}).items():
        m = k.lm(kind=kind, **sizes)
        for i, p in enumerate(m.parameters()):
            p.data += .05*torch.randn(p.shape, generator=generator(i, "x")).to(k.dev)
        k.check(f"{kind} check_forward", lambda: check_forward(m))
        exact_numbers(k, kind, m)
        exact_samples(k, kind, m)


def rollout(policy, b, method):
    "A batch, on the policy's device, with what an update of PPO or GRPO reads: half of the prompts were answered well, half badly"
    b = b.to(policy.device)
    lp = in_pieces(lambda x: log_probs(policy, x), b, 4096)
    z = torch.zeros_like(lp)
    sign = torch.ones_like(lp)*torch.tensor([1., -1.], device=lp.device)[torch.arange(len(b), device=lp.device) % 2][:, None, None]
    b = b.plus(old_log_probs=lp, ref_log_probs=lp-.1)
    return b.plus(advantages=sign[..., 0]) if method == "grpo" else b.plus(values=z, returns=sign, advantages=sign)


def stages(k, precision):
    "Time and memory of an update of each stage of `full`, and of what reads and samples between them"
    c, acc = load_config("full"), k.acc(precision)
    sizes = dict(sft=(10, 1, k.R), reward=(8, 2, k.R), dpo=(8, 2, k.R), grpo=(4, 8, k.new), ppo=(11, 1, k.new))
    def update(stage):
        B, G, R = sizes[stage]
        b, lm = k.batch(B, G, k.P, R).to(k.dev), k.lm()
        if stage in ("sft", "reward"):
            model, step = (lm, sft_step) if stage == "sft" else (mk_reward_model(lm), reward_step)
            return k.updates(acc, model, b, step, getattr(c, stage))
        other = k.lm()                                       # the reference has its place too
        if stage == "dpo":
            return k.updates(acc, lm, b.plus(ref_sums=torch.zeros(B, 2, device=k.dev)), lambda net, x, n: dpo_step(net, x, n, c.dpo), c.dpo)
        b = rollout(lm, b, stage)
        if stage == "grpo":
            return k.updates(acc, lm, b, lambda net, x, n: grpo_step(net, x, n, c.grpo), c.grpo)
        del other
        value = mk_value_model(lm)
        opt = mk_optimizer(dict(policy=(lm, 1e-6), value=(value, 1e-6)), c.ppo)
        return k.updates(acc, torch.nn.ModuleDict(dict(policy=lm, value=value)), b, lambda net, x, n: ppo_step(net, x, n, c.ppo), c.ppo, opt)
    for stage in sizes:
        k.check(f"{stage} update, full preset", lambda: update(stage))
    def reading(f, m):
        b = k.batch(2 if k.tiny else 8, 8, k.P, k.new).to(k.dev)
        k.fresh()
        with acc.autocast():
            s = k.clock(lambda: in_pieces(lambda x: f(m, x), b, 8192), 3)
        return dict(ms=1e3*s, tokens=sum(b.sizes), **k.peak())
    k.check("scores of a GRPO rollout", lambda: reading(scores, mk_reward_model(k.lm())))
    k.check("log_probs of a GRPO rollout", lambda: reading(log_probs, k.lm()))
    if precision != "bf16":
        return
    def writing(f):
        k.fresh()
        return dict(seconds=k.clock(f, 1, 0), **k.peak())
    def compared(ps):
        models = {x: k.lm(i % 2) for i, x in enumerate(("reference", "ppo", "grpo", "dpo"))}
        return writing(lambda: sample_with_kl(models, ps, 1, k.new))
    n, longest = (6, 24) if k.tiny else (64, 254)
    k.check("comparison of four models, prompts of the real lengths", lambda: compared(k.prompts(n)), 8)
    k.check("comparison of four models, longest prompts", lambda: compared(k.batch(n, 1, longest, 1).prompts), 8)
    ps = k.batch(4 if k.tiny else 100, 1, longest, 1).prompts
    k.check("frontier: 100 prompts, 32 answers each", lambda: writing(lambda: sample(k.lm(), ps, 6 if k.tiny else 32, k.new, stop_ids=())), 10)


def stages_bf16(k):
    stages(k, "bf16")


def stages_fp16(k):
    stages(k, "fp16")


def stages_fp32(k):
    stages(k, "fp32")


def decode(k):
    "Tokens a second: ours, and plain `generate`"
    m = k.lm()
    many = k.prompts(3 if k.tiny else 64)
    def speed(f, answers):
        f(2)
        k.fresh()
        s = k.clock(lambda: f(k.new), 1 if k.tiny else 2)
        return dict(seconds=s, tokens_per_s=answers*k.new/s, ms_per_step=1e3*s/k.new, **k.peak())
    def plain(x, ps, n):
        T = max(map(len, ps))
        ids = torch.tensor([[2]*(T-len(p))+p for p in ps for _ in range(n)], device=k.dev)
        mask = (torch.arange(T, device=k.dev) >= T-torch.tensor([len(p) for p in ps for _ in range(n)], device=k.dev)[:, None]).long()
        how = dict(attention_mask=mask, do_sample=True, top_k=0, top_p=1., pad_token_id=2)
        return lambda new: x.generate(ids, min_new_tokens=new, max_new_tokens=new, **how)
    for dtype in (torch.float32, torch.bfloat16):
        x = deepcopy(m).to(dtype)
        for ps, n in ((many, 8), (many[:32], 1), (many[:1], 1)):
            name = f"{len(ps)} x {n} {str(dtype)[6:]}"
            k.check(f"{name} ours", lambda: speed(lambda new: sample(x, ps, n, new, stop_ids=()), len(ps)*n), 5)
            k.check(f"{name} generate", lambda: speed(plain(x, ps, n), len(ps)*n), 8)
    stops = tuple(range(3, 3+k.vocab//60))
    k.check("an answer ends after 60 tokens on average", lambda: dict(seconds=k.clock(lambda: sample(m, many, 8, k.new, stop_ids=stops), 2)), 5)


def adapted(k, checkpointing=False, device=None, **base):
    "A policy with adapters of rank 16 that are not zero, as after some training"
    folder, _ = k.folder()
    m, _ = load_policy(str(folder/"lm"), device=device or k.dev, lora=LoraConfig(r=16), gradient_checkpointing=checkpointing, **base)
    for i, o in enumerate(m.pairs.values()):
        o.B.data += .02*torch.randn(o.B.shape, generator=generator(i, "B")).to(o.B.device)
    return m


def learner(k, method, policy):
    "What PPO or GRPO trains, the step, its settings"
    o = getattr(load_config("full"), method)
    if method == "grpo":
        return policy, lambda net, x, n: grpo_step(net, x, n, o), o
    value = mk_value_model(policy)
    value.score.weight.data = .02*torch.randn(value.score.weight.shape, generator=generator(0, "head")).to(value.score.weight.device)
    return torch.nn.ModuleDict(dict(policy=policy, value=value)), lambda net, x, n: ppo_step(net, x, n, o), o


def adapters(k):
    "An update of GRPO and of PPO where adapters learn, with and without gradient checkpointing; gradients against the CPU's"
    vocab = len(k.folder()[1])
    small = k.batch(4, 2, 12, 8, vocab)
    for method, (B, G) in dict(grpo=(4, 8), ppo=(11, 1)).items():
        b = rollout(adapted(k, device="cpu"), small, method)
        want = gradient(*learner(k, method, adapted(k, device="cpu"))[:2], b)
        for on in (False, True):
            how = f'{method}, rank 16{", checkpointing" if on else ""}'
            def same():
                d = off(gradient(*learner(k, method, adapted(k, on))[:2], b), want)
                return dict(off=d, ok=d < 1e-4)
            k.check(f"{how}: gradient against the CPU (relative)", same)
            for precision in ("bf16", "fp32"):
                def update():
                    policy = adapted(k, on)
                    model, step, o = learner(k, method, policy)
                    return k.updates(k.acc(precision), model, rollout(policy, k.batch(B, G, k.P, k.new, vocab), method), step, o)
                k.check(f"{how}: update {precision}", update)


def four_bits(k):
    "The base in four bits: what it takes, how far its log-probabilities are, an update on it, a decoding"
    if not find_spec("bitsandbytes") or not k.cuda:
        return k.emit("not run", ok=True, installed=find_spec("bitsandbytes") is not None, note="needs bitsandbytes and a GPU")
    vocab = len(k.folder()[1])
    b = k.batch(4, 8, k.P, k.new, vocab).to(k.dev)
    full, low = adapted(k), adapted(k, quantize="4bit", dtype="bfloat16")
    def apart():
        with torch.no_grad():
            d = (log_probs(low, b)-log_probs(full, b)).abs()
        size = {x: sum(p.numel()*p.element_size() for p in m.base.parameters())/1e9 for x, m in (("gb", low), ("gb_fp32", full))}
        return dict(**size, gap=d.max().item(), mean_gap=d.mean().item(), ok=d.mean().item() < 1)
    k.check("log_probs against the float32 base", apart)
    def update():
        policy = adapted(k, True, quantize="4bit", dtype="bfloat16")
        model, step, o = learner(k, "grpo", policy)
        r = k.updates(k.acc("bf16"), model, rollout(policy, b, "grpo"), step, o)
        return {**r, "ok": (r["grad_norm"] or 0) > 0}
    k.check("grpo, rank 16, checkpointing: update bf16", update)
    ps = k.prompts(8, vocab)
    k.check("64 answers", lambda: dict(seconds=k.clock(lambda: sample(low, ps, 8, k.new, stop_ids=()), 2)))


def plain_peft(k):
    "An adapter that we saved, read by plain peft on the device, and ours read again"
    if not find_spec("peft"):
        return k.emit("not run", ok=True, installed=False, note="needs peft")
    import peft
    folder, tok = k.folder()
    m = adapted(k)
    save_model(m, tok, folder/"adapter")
    ids = torch.tensor(k.batch(3, 1, 20, 1, len(tok)).prompts, device=k.dev)
    with torch.no_grad():
        want, base = m(ids).logits, bare(m)(ids).logits
    def read(load):
        with torch.no_grad():
            d = (load().eval()(ids).logits-want).abs().max().item()
        # the bound says something only where the adapter changes more than that
        changed = (base-want).abs().max().item()
        return dict(off=d, adapter_changes=changed, ok=d < 1e-3 < changed)
    k.check("peft.AutoPeftModelForCausalLM", lambda: read(lambda: peft.AutoPeftModelForCausalLM.from_pretrained(folder/"adapter").to(k.dev)))
    k.check("load_policy", lambda: read(lambda: load_policy(str(folder/"adapter"), device=k.dev)[0]))


def tokens(k):
    "Launches, synchronisations and busy time of a decoded token and of an update, by the profiler"
    waits = "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"
    launches = "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"
    kinds = [torch.profiler.ProfilerActivity.CPU]+[torch.profiler.ProfilerActivity.CUDA]*k.cuda
    def counted(f):
        "What the host asked for, and how long the device was busy; on a CPU operations alone, as PyTorch counts them"
        k.sync()
        with torch.profiler.profile(activities=kinds) as p:
            f()
        host = [e.name for e in p.events() if e.device_type == torch.autograd.DeviceType.CPU]
        device = [e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        def n(names):
            return sum(o in names for o in host)
        d = dict(operations=sum(o.startswith("aten::") for o in host))
        if not k.cuda:
            return d
        asked = dict(launches=n(launches), graphs=n(["cudaGraphLaunch"]), synchronisations=n(waits), copies=n(["cudaMemcpyAsync"]))
        return {**d, **asked, "kernels": len(device), "busy_ms": sum(e.time_range.elapsed_us() for e in device)/1e3}
    def a_token(m, ps, n):
        "Of a long decoding what a short one has not, by token: that leaves out the prompts and what is recorded once"
        short, more = (4, 4) if k.tiny else (24, 32)
        def write(new):
            return lambda: sample(m, ps, n, new, stop_ids=())
        write(short)()
        few, many = counted(write(short)), counted(write(short+more))
        ms = 1e3*(k.clock(write(short+more), 3)-k.clock(write(short), 3))/more
        return {"ms": ms, **{x: (many[x]-few[x])/more for x in few}}
    few = k.prompts(3 if k.tiny else 64)
    for dtype in (torch.float32, torch.bfloat16):
        m = k.lm().to(dtype)
        for ps, n in ((few, 8), (few[:1], 1)):
            k.check(f"a decoded token, {len(ps)} x {n}, {str(dtype)[6:]}", lambda: a_token(m, ps, n), 8)
    ps = k.prompts(3 if k.tiny else 8, len(k.folder()[1]))
    k.check(f"a decoded token, {len(ps)} x 8, adapters", lambda: a_token(adapted(k), ps, 8), 8)
    def update(precision):
        acc, policy = k.acc(precision), k.lm()
        model, step, o = learner(k, "grpo", policy)
        b = rollout(policy, k.batch(4, 8, k.P, k.new), "grpo")
        it = steps(model, (([b], {}) for _ in range(3)), step, o, 3, acc=acc)
        next(it), next(it)
        r = counted(lambda: next(it))
        it.close()
        acc.free_memory()
        return r
    for precision in ("bf16", "fp32"):
        k.check(f"an update of one micro-batch, GRPO, {precision}", lambda: update(precision))


def demo_of(k, precision, command=False):
    "Every stage of a run, tiny, in one process; then the command"
    with tempfile.TemporaryDirectory() as d:
        c = pretend_gpu.tiny_config("bf16" if precision == "fp16" and not k.cuda else precision, k.dev.type)
        line = Line(Run(f"{d}/run", c))
        def stage(s):
            k.fresh()
            run_stages(line, [s], lambda x: None)
            rows = line.run.rows(s) if s in ("sft", "reward", "dpo", "ppo", "grpo") else []
            losses = dict(first=rows[0]["loss"], last=rows[-1]["loss"], skipped=sum(r.get("skipped", 0) for r in rows)) if rows else {}
            return dict(ok=bool(line.done(s)), **losses, **k.peak())
        for s in ("sft", "reward", "dpo", "ppo", "grpo", "frontier", "evaluate", "judge", "failures", "last_token", "analyze"):
            k.check(f"{precision} {s}", lambda: stage(s))
        if k.cuda:
            k.check(f"{precision}: left on the device", lambda: dict(gb=torch.cuda.memory_allocated()/1e9))
        if not command:
            return
        sets = "sft.updates=4", "world.n_corpus=300", "world.n_facts=40", "world.n_pairs=120", "world.n_dev=24", "world.n_test=24", "world.n_ood=12"
        def run():
            args = ["run", "--out", f"{d}/cmd", "--device", k.dev.type, "--stages", "sft", *(o for s in sets for o in ("--set", s))]
            r = subprocess.run([sys.executable, "-m", "rlhf_nb", *args], capture_output=True, text=True)
            return dict(rc=r.returncode, said=r.stderr[-300:] if r.returncode else "", ok=r.returncode == 0)
        k.check("python -m rlhf_nb run", run, 15)


def demo(k):
    demo_of(k, "fp32", command=True)


def demo_fp16(k):
    demo_of(k, "fp16")


def library(k):
    "The cases of the pretend GPU on a real one: models and data of a notebook on either device"
    pretend_gpu.PretendGPU = lambda *a, **kw: contextlib.nullcontext()
    pretend_gpu._attempt = lambda name, f, faults: k.check(name, lambda: (f(), {})[1])
    pretend_gpu.library(argparse.Namespace(kind=k.dev.type, capability=(8, 0), precision="fp32", only=None))


def trl(k):
    "The jobs of `rlhf_nb bench` with both sides on the device, in the precision that trains there: milliseconds of a step, memory"
    if not find_spec("trl"):
        return k.emit("not run", ok=True, installed=False, note="needs trl")
    folder, _ = k.folder()
    real = peers._TRL.args
    peers._TRL.args = lambda t, cls, **kw: real(t, lambda **o: cls(**{**o, "use_cpu": not k.cuda}), **kw)
    peers.mk_accelerator = lambda precision, device: k.acc(precision)
    peers.load_policy = lambda *a, **kw: load_policy(*a, device=k.dev, **kw)
    def side(what, r, name, n=3 if k.tiny else 6):
        job = dict(peers.PLAIN, what=what, r=r, folder=str(folder), steps=n, prompts=2 if k.tiny else 8, rows="rows.json", side=name)
        if k.cuda:
            job["precision"] = "bf16"
        ends = []
        def turn(**kw):
            k.sync()
            ends.append(time.perf_counter())
        k.fresh()
        (peers.ours_steps if name == "ours" else peers.trl_steps)(job, turn)
        # the first turn is no step, and the first step is warm-up
        return dict(ms=1e3*statistics.median(y-x for x, y in zip(ends[1:], ends[2:])), precision=job["precision"], **k.peak())
    for what, r in (("reward", 0), ("dpo", 0), ("grpo", 0), ("grpo", 16)):
        for name in ("ours", "TRL"):
            k.check(f'{what}{f", rank {r}" if r else ""} {name}', lambda: side(what, r, name), 10)


def determinism(k):
    "The same updates three times, and a run that was interrupted"
    small = dict(n_layer=4, n_embd=128, n_head=4, n_positions=512, vocab_size=601)
    def weights(m):
        return torch.cat([p.detach().flatten() for p in m.parameters()])
    def again(precision, step, G, o, sure, **more):
        ws = []
        for _ in range(3):
            acc, m, b = k.acc(precision), k.lm(**small), k.batch(6, G, 40, 20, 601).to(k.dev).plus(**more)
            torch.use_deterministic_algorithms(sure)
            try:
                list(steps(m, (([b], {}) for _ in range(3)), step, o, 3, acc=acc))
            finally:
                torch.use_deterministic_algorithms(False)
            ws.append(weights(m))
            acc.free_memory()
        return dict(equal=all(torch.equal(ws[0], w) for w in ws[1:]), difference=max((ws[0]-w).abs().max().item() for w in ws[1:]))
    sft, dpo = SFTConfig(updates=3, lr=1e-3), DPOConfig(updates=3, lr=1e-3)
    for precision in ("fp32", "bf16"):
        for sure in (False, True):
            how = f'{precision}{", deterministic algorithms" if sure else ""}'
            k.check(f"SFT, three times, {how}", lambda: again(precision, sft_step, 1, sft, sure))
            k.check(f"SFT on groups of 8, three times, {how}", lambda: again(precision, sft_step, 8, sft, sure))
            k.check(f"DPO, three times, {how}", lambda: again(precision, lambda net, b, n: dpo_step(net, b, n, dpo), 2, dpo, sure, ref_sums=torch.zeros(6, 2, device=k.dev)))
    def train(folder, precision, resume=False, stop=None):
        o = GRPOConfig(updates=6, batch_size=4, group_size=4, max_new_tokens=12, checkpoint_every=3, lr=1e-3)
        acc, m, seen = k.acc(precision), k.lm(**small), []
        def watch(b):
            seen.append(b)
            if len(seen) == stop:
                raise KeyboardInterrupt
            return torch.zeros(b.shape[:2], device=b.device)
        def score(b):
            return ((b.responses % 7 == 0) & b.mask).float().sum(-1)
        prompts = [list(range(5+i % 3, 25)) for i in range(8)]
        with contextlib.suppress(KeyboardInterrupt):
            train_grpo(m, k.lm(**small), score, prompts, o, 0, Run(folder, load_config(), resume), dict(w=watch), acc)
        acc.free_memory()
        return weights(m)
    def resumed(precision):
        with tempfile.TemporaryDirectory() as d:
            whole, same = train(f"{d}/a", precision), train(f"{d}/b", precision)
            train(f"{d}/c", precision, stop=5)
            rest = train(f"{d}/c", precision, resume=True)
        return dict(again_equal=torch.equal(whole, same), resumed_equal=torch.equal(whole, rest), resumed_difference=(whole-rest).abs().max().item())
    for precision in ("fp32", "bf16", "fp16"):
        k.check(f"GRPO resumed at update 3 of 6, {precision}", lambda: resumed(precision))


def t4(k):
    "The first cells of the tutorial for a T4, to where GRPO has trained; then updates of its model's shape, beside what was planned"
    if lacks := [o for o in ("IPython", "matplotlib", "pandas") if not find_spec(o)]:
        return k.emit("not run", ok=True, installed=False, note=f"needs {', '.join(lacks)}")
    nb = json.loads((Path(__file__).resolve().parent.parent/"nbs"/"tutorials"/"t4_lora.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(o["source"]) for o in nb["cells"] if o["cell_type"] == "code"]
    last = next(i for i, s in enumerate(cells) if "timed('grpo'" in s)
    ns = {}
    for i, s in enumerate(cells[:last+1]):
        k.check(f"t4_lora, cell {i}", lambda: exec(s, ns))
    c, planned = ns["t4"], {o.stage: o.peak/1e9 for o in ns["needs"]}
    qwen = Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=601) if k.tiny else ns["qwen"]
    def update(stage):
        acc, o = k.acc("fp16"), getattr(c, stage)
        lm = AutoModelForCausalLM.from_config(qwen).eval().to(k.dev, torch.float16 if k.cuda else torch.bfloat16)
        policy = adapt(lm, c.model.lora)
        # as many tokens as the settings allow
        G, R = (o.group_size, o.max_new_tokens) if stage == "grpo" else (2, c.data.max_response)
        b = k.batch(2 if k.tiny else o.batch_size, G, k.P, k.new if k.tiny else R, 601)
        if stage == "grpo":
            r = k.updates(acc, policy, rollout(policy, b, stage), lambda net, x, n: grpo_step(net, x, n, o), o)
        else:
            b = b.to(k.dev).plus(ref_sums=torch.zeros(len(b), 2, device=k.dev))
            r = k.updates(acc, policy, b, lambda net, x, n: dpo_step(net, x, n, o), o)
        return {**r, "planned_gb": planned[stage]}
    for stage in planned:
        k.check(f"{stage}, an update of the planned shape", lambda: update(stage))


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--size", default="gpt2", choices=["gpt2", "tiny"])
    p.add_argument("--budget", type=float, default=520, help="seconds for everything")
    p.add_argument("--slack", type=float, default=1., help="factor on the limits of the parts")
    p.add_argument("--parts", nargs="+", choices=list(limits))
    p.add_argument("--card", default="cpu")
    p.add_argument("--commit", default="")
    p.add_argument("--part", choices=list(limits), help=argparse.SUPPRESS)
    p.add_argument("--limit", type=float, default=math.inf, help=argparse.SUPPRESS)
    return p.parse_args()


a = options()
if not a.part:
    a.out.mkdir(parents=True, exist_ok=True)
    sys.exit(0 if run_parts(a) else 1)

import pretend_gpu
import torch
from transformers import AutoModelForCausalLM,GPT2Config,LlamaConfig,Qwen2Config

from rlhf_nb import peers
from rlhf_nb.adapters import adapt,bare
from rlhf_nb.benchmark import prepare
from rlhf_nb.config import DPOConfig,GRPOConfig,LoraConfig,SFTConfig,WorldConfig
from rlhf_nb.core import Batch,generator
from rlhf_nb.dpo import dpo_step
from rlhf_nb.evaluate import sample_with_kl
from rlhf_nb.grpo import grpo_step,train_grpo
from rlhf_nb.line import Line
from rlhf_nb.load import load_policy,save_model
from rlhf_nb.models import check_forward,exact_kl,log_probs,mk_reward_model,mk_value_model,scores,values
from rlhf_nb.pipeline import run_stages
from rlhf_nb.ppo import ppo_step
from rlhf_nb.reward import reward_step
from rlhf_nb.run import Run
from rlhf_nb.sampling import sample
from rlhf_nb.settings import load_config
from rlhf_nb.sft import sft_step,train_sft
from rlhf_nb.train import Net,counts,in_pieces,micro_batches,mk_accelerator,mk_optimizer,steps
from rlhf_nb.world import make_world,world_tokenizer

globals()[a.part](Kit(a))
