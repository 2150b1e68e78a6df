"Models, batches and forks for the slower tests: everything small, on one thread, and a function of its seed"
import os
import shutil
import sys
import traceback
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # these tests are about the CPU

import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from rlhf_nb.core import Batch,generator,seed_all

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # else a progress bar starts a thread, and one thread is what a process can fork with
vocab, eos = 19, 2
tokens = dict(vocab_size=vocab, bos_token_id=1, eos_token_id=eos, pad_token_id=0)
small = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, intermediate_size=32, max_position_embeddings=64)
configs = {
    "gpt2": GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=64, activation_function="gelu_pytorch_tanh", **tokens),
    "llama": LlamaConfig(**small, **tokens),
    "qwen3": Qwen3Config(**small, head_dim=8, **tokens),
}


def _browser():
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _data():
    folder = Path(os.environ.get("RLHF_NB_DATA") or Path(__file__).resolve().parents[2]/"shared"/"data")
    return folder if (folder/"hh-rlhf").is_dir() else None


def require(what):
    "The path of the `browser` or of the real `data`. Without it a test is skipped; it fails where RLHF_NB_REQUIRE (names with commas between) says that this machine has it"
    found = dict(browser=_browser, data=_data)[what]()
    if not found:
        must = what in os.environ.get("RLHF_NB_REQUIRE", "").split(",")
        (pytest.fail if must else pytest.skip)(f"no {what} on this machine"+(", and RLHF_NB_REQUIRE says that there is" if must else ""))
    return found


def lm(seed=0, kind="gpt2", scale=.1):
    "A causal LM with random weights, none of them zero or one"
    seed_all(seed)
    m = AutoModelForCausalLM.from_config(configs[kind]).eval()
    for p in m.parameters():
        p.data += scale*torch.randn_like(p)
    return m


def batch(groups, sizes, longest=7, seed=0):
    "A prompt of so many tokens, with its `groups` responses of 1 to `longest` tokens, for each of `sizes`; some responses lack an EOS"
    g = generator(seed, "batch")
    ids = lambda n: torch.randint(3, vocab, (n,), generator=g).tolist()
    prompts, responses, finished = [], [], []
    for size in sizes:
        n = torch.randint(1, longest+1, (groups,), generator=g).tolist()
        end = (torch.rand(groups, generator=g) < .6).tolist()
        responses.append([ids(k-1)+[eos] if e else ids(k) for k, e in zip(n, end)])
        prompts.append(ids(size-sum(n)))
        finished.append(end)
    return Batch.from_tokens(prompts, responses, finished=torch.tensor(finished))


def timeless(rows):
    "Metrics rows without what differs from run to run"
    return [{k: v for k, v in r.items() if "seconds" not in k and k != "peak_memory"} for r in rows]


def fork(f, *args):
    "Run `f` in a process of its own, without its second of imports; what it raises is printed and makes it exit with 1"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        f(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
