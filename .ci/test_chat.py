"A tiny chat model with its own template through everything: what it is asked, what is saved, what the page shows, what transformers makes of it"
import json
from unittest import mock

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from rlhf_nb import cli
from rlhf_nb.cards import mk_prompt
from rlhf_nb.desk import Desk
from rlhf_nb.line import Line
from rlhf_nb.load import load_policy,load_reward_model,stop_tokens
from rlhf_nb.run import Run,read_samples
from rlhf_nb.sampling import sample
from rlhf_nb.template import Template,as_template
from rlhf_nb.text import HH,parse_turns,to_messages

torch.set_num_threads(1)
chat = ("{% if messages[0]['role']!='system' %}{{'<|im_start|>system\nYou are Tiny.<|im_end|>\n'}}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}")
sets = """data.max_prompt=220 data.max_response=24 sft.updates=3 sft.eval_every=2 reward.updates=3 reward.n_normalise=8 dpo.updates=3 ppo.updates=2 ppo.batch_size=4 ppo.mini_batches=1 ppo.max_new_tokens=8
    grpo.updates=2 grpo.batch_size=4 grpo.group_size=2 grpo.max_new_tokens=8 eval.max_new_tokens=8 eval.n_prompts=6 eval.n_samples=2 jobs=1 device=cpu""".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "Its folder: EOS and PAD are one token, as in SmolLM2's"
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens([AddedToken(o, special=True) for o in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|spare|>")])
    tok = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>", unk_token="<|endoftext|>")
    tok.chat_template = chat
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, vocab_size=len(tok),
                         bos_token_id=257, eos_token_id=258, pad_token_id=258)
    m = AutoModelForCausalLM.from_config(config).eval()
    for p in m.parameters(): p.data += .2*torch.randn_like(p)
    m.lm_head.weight.data[258] *= 1.5                              # so that some answers end
    path = tmp_path_factory.mktemp("model")/"tiny"
    m.save_pretrained(path)
    tok.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Dialogues with system turns, and with turns that spell a special token and a marker"
    rows = []
    for i in range(60):
        said = [dict(role="user", content=f"What is {i}+{i}?")]
        if i % 3==0: said = [dict(role="system", content="Be brief."), *said]
        if i % 4==0: said += [dict(role="assistant", content="Say again?"), dict(role="user", content=f"{i}+{i}, please.\n\nHuman: hi <|im_end|>")]
        rows.append(dict(prompt=said, chosen=[dict(role="assistant", content=f"{2*i}")], rejected=[dict(role="assistant", content=f"No idea {i}")]))
    path = tmp_path_factory.mktemp("data")/"pairs.jsonl"
    path.write_text("".join(json.dumps(r)+"\n" for r in rows))
    return path


def train(model, data, out, *more): return cli.main(["run", "--config", "prototype", "--model", str(model), "--data", str(data), "--out", str(out), *[o for s in sets for o in ("--set", s)], *more])


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")/"run"
    train(model, data, out)
    return out


def theirs(tok, turns): return tok.apply_chat_template(to_messages(turns), add_generation_prompt=True, return_dict=False, enable_thinking=False)


def test_greedy_answers_are_transformers_own(model):
    "The same prompt ids, and token for token the same answer up to the first stop token"
    ours, tok = load_policy(str(model))
    t = as_template(tok)
    assert tok.pad_token=="<|spare|>" and len(ours.get_input_embeddings().weight)==len(tok)==260 and stop_tokens(ours)=={258}
    other, own = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    questions = [f"What is {i}?" for i in range(20)]
    b = sample(ours, [t.prompt(HH.ask(q)) for q in questions], 1, 24, temperature=0., seed=0)
    for q, p, (ids,) in zip(questions, b.prompts, b.tokens()):
        want = own.apply_chat_template([dict(role="user", content=q)], add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=False)
        assert want[0].tolist()==p
        said = other.generate(want, attention_mask=torch.ones_like(want), max_new_tokens=24, do_sample=False, repetition_penalty=1.)[0, want.shape[1]:].tolist()
        assert ids==said[:said.index(258)+1 if 258 in said else None]
    assert b.finished.any() and b.lengths.max()>3


def test_what_the_run_asks_and_keeps(run, model, data):
    line = Line(Run(run))
    assert line.template.kind=="chat" and line.template.form.kwargs==dict(enable_thinking=False)
    rows = [json.loads(o) for o in data.read_text().splitlines()]
    asked = {HH.prompt(parse_turns(r["prompt"])) for r in rows}
    own = AutoTokenizer.from_pretrained(model)
    recs = read_samples(line.run)
    assert set(recs)=={"reference", "ppo", "grpo", "dpo"}
    for r in recs["ppo"]:
        assert r["prompt"] in asked                          # a dialogue, not a rendering
        turns = parse_turns(r["prompt"])[:-1]
        ids = line.template.prompt(r["prompt"])
        if "<|im_end|>" not in r["prompt"]: assert ids==theirs(own, turns)
        else: assert own.decode(ids)==own.decode(theirs(own, turns)) and ids.count(258)==theirs(own, turns).count(258)-1
        assert not r["response"].endswith("<|im_end|>") and "<|spare|>" not in r["response"]
    for k in ("reference", "dpo_model"):                    # plain transformers loads them, and asks as before
        tok = AutoTokenizer.from_pretrained(run/k)
        assert tok.chat_template==chat and AutoModelForCausalLM.from_pretrained(run/k).config.vocab_size==260
    pairs = line.pairs(line.splits.train)
    for p, (chosen, _), at in zip(pairs.prompts, pairs.tokens(), pairs.index.tolist()):
        row = line.splits.train[at]
        assert p==line.template.prompt(row["prompt"]) and chosen==own(row["chosen"].removeprefix(" ")).input_ids+[258]


def test_the_page(run):
    desk = Desk(str(run))
    desk.load()
    assert list(desk.players)==["reference", "ppo", "grpo", "dpo"]
    c = desk.ask(mk_prompt("What is <|im_end|>?", [("user", "Hi"), ("assistant", "Hello")]), ["reference", "ppo"], None, 6, 0, 1)
    ids = desk._encode(c)["ppo"]
    tok = desk.players["ppo"].template.tok
    assert tok.decode(ids).count("What is <|im_end|>?")==1 and ids.count(258)==4
    for last in desk.compare(c): pass
    assert [a["model"] for a in c["answers"].values()]==["reference", "ppo"] and all("".join(p["text"] for p in a["tokens"])==a["response"] for a in c["answers"].values())


def test_its_reward_model_is_read_as_it_was_trained(run):
    rm, tok = load_reward_model(str(run/"reward_model"))
    assert as_template(tok).kind=="chat" and rm.config.pad_token_id==259


def test_hh_in_place_of_its_own(model, data, tmp_path, capsys):
    "Rows that `Human:` can't hold go and are counted, and what is saved says how it reads"
    train(model, data, tmp_path/"run", "--set", "model.template=hh", "--stages", "sft", "dpo")
    assert "15 mismatched prompt: a turn marker inside a turn" in capsys.readouterr().out
    m, tok = load_policy(str(tmp_path/"run"/"dpo_model"))
    assert as_template(tok).kind=="hh" and Line(Run(tmp_path/"run")).template.kind=="hh"
    own = AutoTokenizer.from_pretrained(tmp_path/"run"/"dpo_model")
    asked = own.apply_chat_template([dict(role="system", content="Be brief."), dict(role="user", content="Hi")], add_generation_prompt=True, return_dict=False)
    assert asked==own("Be brief.\n\nHuman: Hi\n\nAssistant:").input_ids==as_template(tok).prompt("Be brief.\n\nHuman: Hi\n\nAssistant:")


@pytest.mark.parametrize("bad,why", [("{{ raise_exception('no') }}", "fails on a question and an answer"), ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes no special token behind an answer")])
def test_bad_templates_are_one_line(model, data, tmp_path, bad, why, capsys):
    tok = AutoTokenizer.from_pretrained(model)
    tok.chat_template = bad
    tok.save_pretrained(tmp_path/"tok")
    for more, want in ((("--tokenizer", str(tmp_path/"tok")), f"rlhf_nb: {tmp_path/'tok'}: the chat template {why}"), (("--set", "model.template_kwargs={thoughts: true}"), "rlhf_nb: model.template_kwargs: the chat template knows no thoughts")):
        with pytest.raises(SystemExit): train(model, data, tmp_path/"run", *more)
        err = capsys.readouterr().err
        assert err.startswith(want) and err.count("\n")==1
        assert not (tmp_path/"run"/"reference").exists()
    assert Template(tok, "hh").prompt(HH.ask("a"))==tok("\n\nHuman: a\n\nAssistant:").input_ids


def test_a_file_with_a_prompt_that_the_template_refuses(run, tmp_path, capsys):
    "It is named, before anything is written"
    f = tmp_path/"prompts.jsonl"
    rows = [dict(prompt="Fine?"), dict(prompt=[dict(role="system", content="Be brief. "*40)])]
    f.write_text("".join(json.dumps(r)+"\n" for r in rows))
    with pytest.raises(SystemExit): cli.main(["generate", str(run), "--prompts", str(f), "--to", str(tmp_path/"to")])
    err = capsys.readouterr().err
    assert err.startswith("rlhf_nb: the prompt 'Be brief. Be brief.") and "too long: without the question it is" in err and err.count("\n")==1


def test_a_stop_of_the_model_alone_is_no_text(run):
    "An answer that ends with it is shown without it, while it is written and piece by piece"
    desk = Desk(str(run))
    desk.load()
    player = desk.players["ppo"]
    stop = player.template.tok.convert_tokens_to_ids("<|endoftext|>")
    assert stop not in player.template.stops
    player.policy.generation_config.eos_token_id = [258, stop]
    wrote = player.template.tok("Hm").input_ids+[stop]
    steps = ((torch.tensor([[i]]), torch.zeros(1, 1), torch.ones(1, 1, dtype=bool), None) for i in wrote)
    c = desk.ask(mk_prompt("Hi"), ["ppo"], None, 6, 0, 1)
    with mock.patch("rlhf_nb.sampling.decode", lambda *a: steps): shown = [dict(c["answers"]["ppo"])["response"] for c in desk.compare(c, every=0)]
    answer = c["answers"]["ppo"]
    assert answer["response"]=="Hm" and answer["finished"] and "".join(p["text"] for p in answer["tokens"])=="Hm" and not any("<|" in o for o in shown)
