"People's own data from the command line: a handful of votes to the end, a leak told before anything is trained, names that are names"
import json

import pytest
import torch

from rlhf_nb import cli
from rlhf_nb.settings import load_config,mk_config
from rlhf_nb.data import load_splits
from rlhf_nb.line import Line
from rlhf_nb.run import Places,Run,usual_stages

from rlhf_nb.world import make_world,world_tokenizer

torch.set_num_threads(1)
tiny = """model.n_layer=1 model.n_embd=16 model.n_head=2 data.max_prompt=100 sft.updates=4 sft.batch_size=4 reward.updates=4 reward.batch_size=4 reward.n_normalise=16 dpo.updates=4 dpo.batch_size=4
    ppo.updates=2 ppo.batch_size=4 ppo.max_new_tokens=6 grpo.updates=2 grpo.batch_size=2 grpo.group_size=3 grpo.max_new_tokens=6 eval.max_new_tokens=8 jobs=1 device=cpu""".split()


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    "Folder of a tokenizer that knows the world's words"
    path = tmp_path_factory.mktemp("tok")
    world_tokenizer(make_world(mk_config(dict(world=dict(n_corpus=300, n_facts=50, n_pairs=60, n_dev=12, n_test=12, n_ood=8))).world)).save_pretrained(path)
    return str(path)


def votes(n, sign=str):
    return [dict(prompt=f"\n\nHuman: {sign(f'What is the colour of thing {i}?')}\n\nAssistant:", chosen=f" It is red {i}.", rejected=" No.") for i in range(n)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r)+"\n" for r in rows))
    return path


def run(data, tok, out, *more):
    sets = [o for s in tiny for o in ("--set", s)]
    return cli.main(["run", "--config", "demo", *sets, "--data", str(data), "--tokenizer", tok, "--out", str(out), *more])


@pytest.mark.parametrize("n", (3, 8))
def test_a_handful_of_votes_goes_to_the_end(n, tok, tmp_path, capsys):
    run(write(tmp_path/"preferences.jsonl", votes(n)), tok, tmp_path/"out")
    said = capsys.readouterr().out
    assert "test has 1 prompt: too few to conclude anything from" in said.split("sft:")[0]  # before anything was trained
    for stage in usual_stages:
        assert Places(tmp_path/"out").done(stage), stage


def test_two_votes_are_refused_before_anything_is_trained(tok, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(write(tmp_path/"preferences.jsonl", votes(2)), tok, tmp_path/"out")
    assert "2 different prompts are too few" in capsys.readouterr().err and not (tmp_path/"out"/"reference").exists()


def test_a_leak_in_capitals_is_told_and_does_not_stop_the_evaluation(tok, tmp_path, capsys):
    write(tmp_path/"data"/"train.jsonl", votes(30))
    write(tmp_path/"data"/"test.jsonl", votes(9, lambda s: f" {s.upper()} "))
    write(tmp_path/"data"/"validation.jsonl", [dict(r, prompt="Before."+r["prompt"]) for r in votes(4)])
    run(tmp_path/"data", tok, tmp_path/"out", "--stages", "sft", "reward", "evaluate")
    assert "9 train/test leak" in capsys.readouterr().out.split("sft:")[0]


@pytest.mark.parametrize("name", ("p[1].jsonl", "data [v2]/x*/train.jsonl", "what? 🙂.jsonl", "-p.jsonl", ".p.jsonl"))
def test_names_are_names(name, tmp_path):
    rows = votes(12)
    f = write(tmp_path/"here"/name, rows)
    for decoy in ("p1.jsonl", "data v/xy/train.jsonl", "whatx 🙂.jsonl"):     # what a pattern would find
        write(tmp_path/"here"/decoy, rows[:4])
    for source in {f, f.parent} - {tmp_path/"here"}:
        s = load_splits(load_config("demo"), source=str(source))
        assert s.report.read == 12 and all(str(f) in p["source"] for p in s.train)


def test_each_stage_may_have_data_of_its_own(tok, tmp_path, capsys):
    sure = lambda i: f"What is the colour of thing {i}?"
    chats = [dict(conversations=[{"from": "human", "value": sure(i)}, {"from": "gpt", "value": f"It is red {i}."}]) for i in range(100, 130)]
    asks = [dict(question=sure(i), colour="red") for i in range(200, 230)]
    ranked = [dict(instruction=sure(i), input="", chosen=f"It is red {i}.", rejected="No.") for i in range(300, 330)]
    own = [f"sft.data={write(tmp_path/'chats.jsonl', chats)}", f"reward.data={write(tmp_path/'ranked.jsonl', ranked)}",
           f"grpo.prompts={{name: {write(tmp_path/'asks.jsonl', asks)}, columns: {{prompt: question}}}}"]
    more = [o for s in own for o in ("--set", s)]
    run(write(tmp_path/"pairs.jsonl", votes(30)), tok, tmp_path/"out", *more)
    places = Places(tmp_path/"out")
    assert all(map(places.done, usual_stages))
    rows = json.loads(places.data_file.read_text())["rows"]
    assert rows["sft.train"]+rows["sft.dev"] == 30 == rows["grpo.train"]+rows["grpo.dev"] and rows["train"]+rows["dev"]+rows["test"] == 30
    assert rows["reward.train"]+rows["reward.dev"]+rows["reward.test"] == 30 and rows["reward.test"] > 0
    write(tmp_path/"ranked.jsonl", ranked[1:])                   # other pairs than the run began with
    with pytest.raises(ValueError, match="was begun with other data"):
        Line(Run(tmp_path/"out")).splits


def test_data_that_do_not_serve_a_stage_are_refused_before_anything_is_trained(tok, tmp_path, capsys):
    asks = write(tmp_path/"asks.jsonl", [dict(prompt=f"What is the colour of thing {i}?", colour="red") for i in range(30)])
    for stages, said in ((["sft"], "stage 'sft' learns from prompts with an answer each, and "+str(asks)+" holds prompts: give other data with sft.data, or skip it"),
                         (["sft", "reward"], "learns from"), (["sft", "dpo"], "learns from")):
        with pytest.raises(SystemExit):
            run(asks, tok, tmp_path/"out", "--stages", *stages)
        assert said in capsys.readouterr().err and not (tmp_path/"out"/"reference").exists()
