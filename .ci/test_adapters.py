"Models on one base are what they would be on bases of their own: sampled, trained, saved, run"
import json
import os
import re
import shutil
from contextlib import chdir
from copy import deepcopy

import peft
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

from tiny import batch, configs, lm, timeless
from rlhf_nb.core import Batch,generator,seed_all
from rlhf_nb.config import LoraConfig
from rlhf_nb.settings import load_config
from rlhf_nb.run import Run
from rlhf_nb.forward import checkpoint_layers
from rlhf_nb.models import log_probs,mk_reward_model,mk_value_model,scores,values
from rlhf_nb.folders import is_adapter
from rlhf_nb.modelcard import CARD,card_head
from rlhf_nb.adapters import Adapted,adapt,bare
from rlhf_nb.load import load_policy,load_reward_model,save_model
from rlhf_nb.train import mk_accelerator
from rlhf_nb.sampling import decode,sample
from rlhf_nb.sft import train_sft
from rlhf_nb.reward import train_reward
from rlhf_nb.dpo import train_dpo
from rlhf_nb.grpo import train_grpo
from rlhf_nb.ppo import train_ppo
from rlhf_nb.line import Line
from rlhf_nb.desk import Desk
from rlhf_nb.cli import main

kinds = pytest.mark.parametrize("kind", configs)
sizes = [12, 25, 9, 18, 30, 14]
rl = dict(updates=4, batch_size=3, micro_tokens=60, max_new_tokens=4, lr=1e-2)
config = load_config("demo", [f"{s}.{k}={v}" for s in ("ppo", "grpo") for k, v in rl.items()]
                     + [f"{s}.{k}={v}" for s in ("sft", "reward", "dpo") for k, v in rl.items() if k != "max_new_tokens"])
last = dict(seed=3, acc=mk_accelerator(device="cpu"))


def learned(handle, seed=1):
    "As after some training: no B is zero"
    for i, o in enumerate(handle.pairs.values()):
        o.B.data.normal_(0, .1, generator=generator(seed, i))
    return handle


def even(b):
    "The reward: tokens of the response with an even number"
    return ((b.responses % 2 == 0) & b.mask).float().sum(-1)


@kinds
def test_interleaved(kind):
    "Four handles of one base, each asked for a token in turns, write what four models write"
    first, prompts = adapt(lm(kind=kind), LoraConfig(r=4)), batch(1, sizes).prompts
    handles = [learned(deepcopy(first), i) for i in range(3)]+[bare(first)]
    alone = [sample(o, prompts, 2, 8, seed=i, stop_ids=()) for i, o in enumerate(handles)]
    assert len({str(b.tokens()) for b in alone}) == 4
    running = [decode(o, prompts, 2, 8, seed=i, stop_ids=()) for i, o in enumerate(handles)]
    steps = list(zip(*running))
    assert len(steps) == 8
    for i, want in enumerate(alone):
        assert torch.equal(torch.stack([s[i].ids for s in steps], 2), want.responses)
        torch.testing.assert_close(torch.stack([s[i].log_probs for s in steps], 2), want.old_log_probs, atol=1e-6, rtol=0)


@kinds
@pytest.mark.parametrize("recomputed", [False, True])
def test_ppo_on_one_base(kind, recomputed):
    "PPO with policy, value, reference and reward on one base has the rows, and ends with the weights, of PPO with four bases"
    ends = []
    for shared in (True, False):
        base = lm(kind=kind)
        new = lambda: adapt(base if shared else lm(kind=kind), LoraConfig(r=4))
        if recomputed and shared:
            checkpoint_layers(base)
        policy, value = learned(new()), learned(mk_value_model(new()), 2)
        rm = learned(mk_reward_model(new()), 3)
        rows = train_ppo(policy, value, learned(new()), lambda b: scores(rm, b)+even(b), batch(1, sizes).prompts, config.ppo, **last)
        ends.append((rows, [*policy.parameters(), *value.parameters()]))
    (rows, one), (others, four) = ends
    for a, b in zip(timeless(rows), timeless(others)):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for a, b in zip(one, four):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_reference_is_the_base():
    "None is a frozen copy of the base, in DPO, GRPO and PPO; the base stays as it was"
    for stage in ("dpo", "grpo", "ppo"):
        ends = []
        for reference in (None, lm()):
            base = lm()
            policy = adapt(base, LoraConfig(r=4))
            if stage == "dpo":
                rows = train_dpo(policy, reference, batch(2, sizes, longest=4), config.dpo, **last)
            elif stage == "grpo":
                rows = train_grpo(policy, reference, even, batch(1, sizes).prompts, config.grpo, **last)
            else:
                rows = train_ppo(policy, mk_value_model(policy), reference, even, batch(1, sizes).prompts, config.ppo, **last)
            assert all(torch.equal(a, b) for a, b in zip(base.parameters(), lm().parameters()))
            ends.append(timeless(rows))
        for a, b in zip(*ends):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        assert len(ends[0]) == 4 and abs(ends[0][-1].get("kl", 1)) > 1e-6


def of_peft():
    lora = dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    m = lm(kind="llama")
    m.add_adapter(peft.LoraConfig(**lora))
    return dict(get_peft_model=peft.get_peft_model(lm(kind="llama"), peft.LoraConfig(**lora, task_type="CAUSAL_LM")), add_adapter=m)


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo", "ppo"])
def test_models_of_peft(stage, way, tmp_path):
    "A model that peft has put adapters into is trained by every stage; what is frozen stays, and is in no checkpoint"
    m = of_peft()[way].eval()
    frozen = {k: p.clone() for k, p in m.named_parameters() if not p.requires_grad}
    begun = {k: p.clone() for k, p in m.named_parameters() if p.requires_grad}
    o = load_config("demo", [f"{stage}.{k}={v}" for k, v in rl.items() if k != "max_new_tokens" or stage in ("grpo", "ppo")]+[f"{stage}.checkpoint_every=3"])
    o, run = getattr(o, stage), Run(tmp_path/"run", config)
    if stage == "sft":
        train_sft(m, batch(1, sizes), o, run=run, **last)
    elif stage == "dpo":
        train_dpo(m, None, batch(2, sizes, longest=4), o, run=run, **last)
    elif stage == "grpo":
        train_grpo(m, None, even, batch(1, sizes).prompts, o, run=run, **last)
    else:
        train_ppo(m, mk_value_model(lm(kind="llama")), None, even, batch(1, sizes).prompts, o, run=run, **last)
    now = dict(m.named_parameters())
    assert all(torch.equal(v, now[k]) for k, v in frozen.items())
    assert any(not torch.equal(v, now[k]) for k, v in begun.items())
    kept = torch.load(run.checkpoint(stage))["model"]
    assert all("lora" in k or "value" in k for k in kept) and any("lora" in k for k in kept)


def test_classifier_of_peft():
    "So is a reward model"
    c = AutoModelForSequenceClassification.from_config(LlamaConfig(**{**configs["llama"].to_dict(), "num_labels": 1})).eval()
    m = peft.get_peft_model(c, peft.LoraConfig(r=4, task_type="SEQ_CLS")).eval()
    rows = train_reward(m, batch(2, sizes, longest=4), config.reward, **last)
    assert len(rows) == 4 and any(p.grad is None and p.requires_grad for p in m.parameters())


# Folders and runs

words = {w: i for i, w in enumerate(["<eos>", "<pad>", *"abcdefghijklmnopqrstuvwxyz", "Human", "Assistant", ":"])}
run_sets = """device=cpu jobs=1 data.test_size=.2 data.max_prompt=16 data.max_response=8 sft.updates=3 sft.batch_size=4 sft.eval_every=null reward.updates=3 reward.batch_size=4
    reward.n_normalise=8 reward.eval_every=null dpo.updates=3 dpo.batch_size=4 dpo.eval_every=null ppo.updates=2 ppo.batch_size=4 ppo.max_new_tokens=4 ppo.eval_every=null
    grpo.updates=2 grpo.batch_size=4 grpo.group_size=3 grpo.max_new_tokens=4 grpo.eval_every=null eval.n_prompts=4 eval.max_new_tokens=4""".split()
stages = ["--stages", "sft", "reward", "dpo", "ppo", "grpo", "last_token", "frontier", "evaluate", "failures"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a base and pairs, and an adapter of peft's making on the base"
    d = tmp_path_factory.mktemp("place")
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), eos_token="<eos>", pad_token="<pad>")
    tok.backend_tokenizer.pre_tokenizer = Whitespace()
    seed_all(0)
    small = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, intermediate_size=32, max_position_embeddings=64)
    m = AutoModelForCausalLM.from_config(LlamaConfig(**small, vocab_size=len(tok), bos_token_id=None, eos_token_id=0, pad_token_id=1)).eval()
    save_model(m, tok, d/"base")
    g = generator(0, "rows")
    said = lambda: " ".join("abcdefghij"[i] for i in torch.randint(0, 10, (3,), generator=g).tolist())
    rows = [dict(prompt=said(), chosen=said()+" k", rejected=said()) for _ in range(60)]
    (d/"pairs.jsonl").write_text("".join(json.dumps(r)+"\n" for r in rows), "utf-8")
    p = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(d/"base"), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for k, o in p.named_parameters():
        if "lora_B" in k:
            o.data.normal_(0, .05)
    p.save_pretrained(d/"theirs")
    return d


def run(place, out, *sets, stages=stages):
    more = [o for s in (*run_sets, *sets) for o in ("--set", s)]
    assert not main(["run", "--config", "demo", "--data", str(place/"pairs.jsonl"), "--out", str(out), *stages, *more]), "see its output"
    return Line(Run(out))


def asked(line):
    "What the cards ask, in the words of a run's template"
    t = line.template
    return Batch.from_tokens([t.prompt([dict(role="user", content="What is the capital of France?")])], [[t.response(" Paris.")]])


def ran(folder):
    "What the code of a model's card leaves, run beside its folder"
    names, text = {}, (folder/CARD).read_text("utf-8")
    with chdir(folder.parent):
        exec(re.search(r"(?s)```python\n(.*?)```", text)[1], names)
    return names


def test_run(place, tmp_path, monkeypatch):
    "A run on adapters: all its models are small folders on one base, with and without checkpointing the same; desk, generate and merge read them"
    line = run(place, tmp_path/"run", f"model.name={place/'base'}", "model.lora.r=4", "reward.head=last_token", "ppo.value_from=reward")
    made = [line.run.made(s) for s in ("sft", "reward", "dpo", "ppo", "grpo")]+[line.run.value_model]
    assert all(is_adapter(f) and not (f/"model.safetensors").exists() for f in made)
    assert len({id(m.base) for m in line.models.values()}) == 1 and line.model("reward").base is line.base
    again = run(place, tmp_path/"less", f"model.name={place/'base'}", "model.lora.r=4", "reward.head=last_token", "ppo.value_from=reward", "model.gradient_checkpointing=true")
    for s in ("sft", "reward", "dpo", "ppo", "grpo"):
        for a, b in zip(line.run.rows(s), again.run.rows(s)):
            a, b = timeless([a, b])
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    desk = Desk(tmp_path/"run")
    desk.load()
    assert len({id(p.policy.base) for p in desk.players.values()}) == 1 and len(desk.players) == 4, desk.troubles
    assert not main(["merge", str(tmp_path/"run")])
    for k, load, ask in (("ppo_model", load_policy, log_probs), ("reward_model", load_reward_model, scores)):
        (one, _), (whole, _) = load(str(tmp_path/"run"/k)), load(str(tmp_path/"run"/"merged"/k))
        b = batch(2, sizes, longest=4)
        assert isinstance(one, Adapted) and not isinstance(whole, Adapted)
        torch.testing.assert_close(ask(one, b), ask(whole, b), atol=1e-5, rtol=0)
    # each folder's card is code that gives our numbers, of an adapter by plain peft, merged by transformers
    b = asked(line)
    for folder in (tmp_path/"run", tmp_path/"run"/"merged"):
        assert ran(folder/"reward_model")["score"] == pytest.approx(scores(load_reward_model(str(folder/"reward_model"))[0], b).item(), abs=1e-5)
        got = ran(folder/"value_model")["values"]
        torch.testing.assert_close(got, values(load_reward_model(str(folder/"value_model"))[0], b)[0, 0], atol=1e-5, rtol=0)
        policy, said = load_policy(str(folder/"ppo_model"))[0], ran(folder/"ppo_model")
        assert said["answer"].split() == line.template.text(sample(policy, b.prompts, 1, 48, temperature=0).tokens()[0][0]).split()
        ids = torch.tensor(b.prompts)
        torch.testing.assert_close(said["chat"].model(ids).logits, policy(ids).logits, atol=1e-5, rtol=0)
    head = card_head((tmp_path/"run"/"ppo_model"/CARD).read_text("utf-8"))
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", "text-generation") and "base_model" not in head and "lora" in head["tags"]
    card = (tmp_path/"run"/"ppo_model"/CARD).read_text("utf-8")
    assert "r=4, alpha=8" in card and "`rlhf_nb run --config demo" in card and str(place) not in card and "n=4\n" in card and "37 train" in card
    # in plain peft, by the line that the folder states
    monkeypatch.chdir(tmp_path/"run")
    plain = eval(json.loads((tmp_path/"run"/"ppo_model"/"rlhf_nb.json").read_text("utf-8"))["plain_peft"], dict(peft=peft)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(plain(ids).logits, load_policy("ppo_model")[0](ids).logits, atol=1e-5, rtol=0)


def test_run_with_log_prob_head(place, tmp_path):
    line = run(place, tmp_path/"run", f"model.name={place/'base'}", "model.lora.r=4", "reward.head=log_prob", "sft.skip=true", stages=["--stages", "sft", "reward", "grpo"])
    assert line.model("sft").is_base() and line.model("reward").lm.base is line.base
    assert not main(["merge", str(tmp_path/"run")])
    for folder in (tmp_path/"run", tmp_path/"run"/"merged"):
        want = scores(load_reward_model(str(folder/"reward_model"))[0], asked(line)).item()
        assert ran(folder/"reward_model")["score"] == pytest.approx(want, abs=1e-5)


def test_run_begins_with_an_adapter(place, tmp_path):
    "Of peft's making: with adapters it is where training begins, without it is merged"
    line = run(place, tmp_path/"on", f"model.name={place/'theirs'}", "model.lora.r=2", "sft.skip=true", stages=["--stages", "sft", "dpo"])
    ref, theirs = line.model("sft"), load_policy(str(place/"theirs"))[0]
    b = batch(2, sizes, longest=4)
    assert torch.equal(log_probs(ref, b), log_probs(theirs, b)) and is_adapter(line.run.made("dpo"))
    whole = run(place, tmp_path/"whole", f"model.name={place/'theirs'}", "sft.skip=true", stages=["--stages", "sft"]).model("sft")
    assert not isinstance(whole, Adapted)
    torch.testing.assert_close(log_probs(whole, b), log_probs(theirs, b), atol=1e-5, rtol=0)


def test_given_reward_model_of_peft(place, tmp_path):
    c = AutoModelForSequenceClassification.from_pretrained(place/"base", num_labels=1)
    p = peft.get_peft_model(c, peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["score"], task_type="SEQ_CLS")).eval()
    for k, o in p.named_parameters():
        if "lora_B" in k:
            o.data.normal_(0, .05)
    p.save_pretrained(tmp_path/"rm")
    rm, _ = load_reward_model(str(tmp_path/"rm"))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(rm(ids).logits, p(ids).logits, atol=1e-5, rtol=0)
    line = run(place, tmp_path/"run", f"model.name={place/'base'}", "model.lora.r=4", f"reward.model={tmp_path/'rm'}", stages=["--stages", "sft", "reward", "grpo"])
    assert line.model("reward").base is line.base


bad = {
    "model.lora.targets=[lm_head]": "'lm_head' is the head or no linear layer of the body",
    "model.lora.targets=[embed_tokens]": "'embed_tokens' is the head or no linear layer of the body",
    "model.lora.targets=[query]": "'query' is no layer of this model; its linear layers are down_proj",
    "model.lora.r=9": "9 is more than model.layers.0.self_attn.k_proj has, which is 16 by 8",
    "model.quantize=4bit": "4bit needs bitsandbytes",
}


@pytest.mark.parametrize("change", bad)
def test_refused(change, place, tmp_path, capsys, monkeypatch):
    "One line, before anything is trained or written"
    monkeypatch.setattr("rlhf_nb.load.find_spec", lambda name: None)
    sets = [o for s in (*run_sets, f"model.name={place/'base'}", "model.lora.r=4", change) for o in ("--set", s)]
    with pytest.raises(SystemExit):
        main(["run", "--data", str(place/"pairs.jsonl"), "--out", str(tmp_path/"run"), *sets])
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and bad[change] in said[0], said
    assert not (tmp_path/"run").exists()


def test_moved_and_changed(place, tmp_path):
    "A base that has gone, or that somebody has trained further, is one line that names it"
    shutil.copytree(place/"base", tmp_path/"base")
    run(place, tmp_path/"run", f"model.name={tmp_path/'base'}", "model.lora.r=4", stages=["--stages", "sft"])
    os.rename(tmp_path/"base", tmp_path/"gone")
    with pytest.raises(ValueError, match="its base .*base is not there: put it back, or write its new place into"):
        load_policy(str(tmp_path/"run"/"reference"))
    m = AutoModelForCausalLM.from_pretrained(tmp_path/"gone")
    for p in m.parameters():
        p.data += 1e-3
    m.save_pretrained(tmp_path/"base")
    with pytest.raises(ValueError, match="has other weights now than when this adapter was made"):
        load_policy(str(tmp_path/"run"/"reference"))
