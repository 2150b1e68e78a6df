"Rewards that are functions: a run of prompts and a file of Python, from the command line to the report and the page; what is wrong is one line"
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlhf_nb.core import read_rows
from rlhf_nb.desk import Desk

small = "grpo.updates=3 grpo.batch_size=4 grpo.max_new_tokens=10 ppo.updates=2 ppo.batch_size=4 ppo.max_new_tokens=10 eval.max_new_tokens=10 eval.n_prompts=6 data.max_response=10 device=cpu jobs=1".split()
functions = r'''
import re
def right(completions, answer, log_metric, log_extra, **kw):
    "In TRL's form: is the last number the answer? Nothing is said about sums that make 0"
    found = [re.findall(r"\d+", c[0]["content"]) for c in completions]
    log_extra("found", [f[-1] if f else None for f in found])
    log_metric("numbers", sum(map(len, found))/len(found))
    return [None if a=="0" else float(bool(f) and f[-1]==a) for f,a in zip(found, answer)]
def short(responses): return [-len(r)/100 for r in responses]
def wide(responses, level): return [0.]*len(responses)
def one(responses): return 1.
def fails(responses): return 1/0
def silent(responses): return [None]*len(responses)
'''


def chat_model(folder):
    "A random Llama with a token for each byte and a chat template"
    special = ["<|end|>", "<pad>", "<|user|>", "<|bot|>"]
    t = Tokenizer(BPE(vocab={o: i for i, o in enumerate(special+sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(special)
    tok = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|end|>", pad_token="<pad>")
    tok.chat_template = ("{% for m in messages %}{{ '<|user|>' if m.role=='user' else '<|bot|>' }}{{ m.content }}<|end|>{% endfor %}"
                         "{% if add_generation_prompt %}<|bot|>{% endif %}")
    torch.manual_seed(0)
    ids = dict(vocab_size=len(tok), eos_token_id=0, pad_token_id=1, bos_token_id=None)
    m = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, **ids))
    with torch.no_grad():
        for p in m.parameters():
            p += .05*torch.randn_like(p)
    m.save_pretrained(folder)
    tok.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a model, prompts with an answer each, and reward functions"
    at = tmp_path_factory.mktemp("rewards")
    chat_model(at/"tiny")
    rows = [dict(prompt=[dict(role="user", content=f"What is {a}+{b}?")], answer=str(a+b)) for a in range(10) for b in range(10)]
    rows.append(dict(prompt=[dict(role="user", content="What is "+"1+"*60+"1?")], answer="61"))
    random.Random(0).shuffle(rows)
    (at/"sums.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (at/"mine.py").write_text(functions, "utf-8")
    return at


def rlhf_nb(place, *args, sets=(), code=0):
    "The command's output; of the last line only, where it is to fail"
    sets = [o for s in sets for o in ("--set", s)]
    p = subprocess.run([sys.executable, "-m", "rlhf_nb", *args, *sets], cwd=place, env={**os.environ, "TQDM_DISABLE": "1"}, capture_output=True, text=True)
    assert p.returncode == code, p.stdout+p.stderr
    return p.stdout if code == 0 else p.stderr.strip().splitlines()[-1]


def data_of(place): return ["--data", "sums.jsonl", "--model", "tiny"]


def test_prompts_and_a_function(place):
    said = rlhf_nb(place, "run", "--out", "run", *data_of(place), sets=["grpo.reward=mine.py:right", *small])
    assert "left out: reward (the data hold no pairs), dpo (the data hold no pairs), ppo (no reward)" in said
    assert "the reference is the model as it is" in said and "100 prompts kept of 101" in said and "1 too long" in said
    run = place/"run"
    rows = read_rows(run/"logs"/"grpo.jsonl")
    assert len(rows) == 3 and all("numbers" in r for r in rows)
    noted = read_rows(run/"logs"/"extra"/"grpo.jsonl")
    assert [r["update"] for r in noted] == [i for i in range(3) for _ in range(32)] and all(set(r["extra"]) == {"found"} for r in noted)
    for f in ("summary.json", "frontier.json", "win_rates.json", "ANALYSIS.md", "failure_analysis/failures.json"):
        assert (run/"results"/f).exists(), f
    assert not (run/"reward_model").exists()
    records = json.loads((run/"output_samples"/"grpo_samples.json").read_text("utf-8"))
    assert len(records) == 6 and all(set(r["columns"]) == {"answer"} and "found" in r["extra"] for r in records)
    assert "no_eos_penalty: 0.0" in (run/"config.yaml").read_text("utf-8").split("\ngrpo:")[1]
    # later commands: the held-out prompts have their column, typed ones have none
    assert "reward 0.00" in rlhf_nb(place, "generate", "--out", "run")
    (place/"typed.txt").write_text("What is love?\n", "utf-8")
    said = rlhf_nb(place, "generate", "--out", "run", "--prompts", "typed.txt", "--to", "typed")
    assert "no rewards: the reward function right asks for 'answer'" in said and "no reward" in said


def test_page(place, monkeypatch):
    monkeypatch.chdir(place)
    desk = Desk("run").load()
    assert desk.state == "live" and desk.names() == ["reference", "grpo"]
    for prompt, known in ((desk.prompts[0], True), ("\n\nHuman: What is love?\n\nAssistant:", False)):
        for c in desk.compare(desk.ask(prompt, max_new_tokens=6)):
            pass
        assert [o["reward"] is not None for o in c["answers"].values()] == [known]*2, c


def test_several_with_ppo(place):
    rlhf_nb(place, "run", "--out", "ppo", *data_of(place), "--stages", "sft,ppo,evaluate", sets=["ppo.reward=[mine.py:right, 0.5*mine.py:short, 'checks:length(most=3)']", "ppo.eval_every=1", *small])
    row = read_rows(place/"ppo"/"logs"/"ppo.jsonl")[0]
    looked = [row[f"dev_reward/{k}"]*w for k, w in (("short", .5), ("length", 1))]  # right says nothing about some
    assert row["dev_none/short"] == 0 and "dev_numbers" in row and abs(sum(looked)-row["dev_reward"]) <= 1
    parts = [row[f"reward/{k}"]*w for k, w in (("right", 1), ("short", .5), ("length", 1))]
    assert abs(sum(parts)-row["reward"]) < 1e-5 and row["none/right"] < 1 and row["reward_std/short"] > 0


@pytest.mark.parametrize("spec, what", [
    ("mine.py:rihgt", "grpo.reward: mine.py: no function 'rihgt'; it has right, short"),
    ("no.py:f", "grpo.reward: no.py: no such file"),
    ("nowhere:right", "grpo.reward: nowhere: No module named 'nowhere'"),
    ("mine.py", "grpo.reward: expected module:function, FILE.py:function or reward_model"),
    ("mine.py:wide", "the reward function wide asks for 'level', which the data lack; their columns: answer"),
    ("mine.py:one", "the reward function one must return a list of 2"),
    ("mine.py:fails", "the reward function fails failed with ZeroDivisionError"),
    ("checks:length(mots=3)", "length has no argument 'mots'"),
])
def test_what_is_wrong_is_said_before_anything_is_trained(place, spec, what):
    said = rlhf_nb(place, "run", "--out", "bad", *data_of(place), sets=[f"grpo.reward={spec}", *small], code=2)
    assert what in said, said
    assert not (place/"bad"/"reference").exists()


def test_a_changed_function(place):
    (place/"own.py").write_text("def f(responses): return [float(len(r)) for r in responses]\n", "utf-8")
    args = ["run", "--out", "own", *data_of(place), "--stages", "sft,grpo"]
    sets = ["grpo.reward=own.py:f", *small]
    rlhf_nb(place, *args, sets=sets)
    shutil.rmtree(place/"own"/"grpo_model")
    (place/"own.py").write_text("def f(responses): return [-float(len(r)) for r in responses]\n", "utf-8")
    assert "was begun with another own.py" in rlhf_nb(place, *args, "--resume", sets=sets, code=2)
    (place/"own"/"rewards.json").unlink()  # it is meant
    rlhf_nb(place, *args, "--resume", sets=sets)
    assert (place/"own"/"grpo_model").exists() and (place/"own"/"rewards.json").exists()


def test_nothing_is_rewarded(place):
    said = rlhf_nb(place, "run", "--out", "none", *data_of(place), "--stages", "sft,grpo", sets=["grpo.reward=mine.py:silent", *small], code=2)
    assert "the reward function silent said None of all 32 answers of the first update" in said and "the first prompt: " in said, said


@pytest.mark.parametrize("stage", ("dpo", "last_token", "overoptimise"))
def test_named_stages_that_lack_pairs(place, stage):
    said = rlhf_nb(place, "run", "--out", "bad", *data_of(place), "--stages", f"sft,{stage}", sets=["grpo.reward=mine.py:right", *small], code=2)
    assert f"stage '{stage}' learns from pairs" in said and not (place/"bad"/"reference").exists()
