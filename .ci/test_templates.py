"Chat templates as their families publish them: what is asked, where an answer ends, what is learned, and what is refused"
import datetime
import importlib.util
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

from rlhf_nb.reward import Reader
from rlhf_nb.template import Template,tokenize_sft
from rlhf_nb.text import HH,BadPair,Turn,to_messages

# The originals are in TRL's wheel, a development requirement; they are read, TRL itself is not imported
spec = importlib.util.find_spec("trl")
folder = Path(spec.origin).parent/"chat_templates" if spec else None
originals = {f.stem: f.read_text() for f in sorted(folder.glob("*.jinja")) if not f.stem.endswith("_training")} if folder else {}
# families that TRL lacks, in our own words
originals |= dict(
    mistral="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
            "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    zephyr="{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    granite="{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant' }}{% if thinking %}{{ ' {\"thinking\": true}' }}{% endif %}{{ '<|end_of_role|>' }}{% endif %}",
)

# what they have in common with none: contents that are lists of parts
refused = {"idefics3": "leaves out what is said", "smolvlm": "leaves out what is said", "llava_next": "fails on a question and an answer"}
ends = [("cohere2", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"), ("cohere", "<|END_OF_TURN_TOKEN|>"), ("deepseek", "<｜end▁of▁sentence｜>"), ("diffusion_gemma|gemma4", "<turn|>"), ("gemma", "<end_of_turn>"),
        ("glm4", "<|user|>"), ("gptoss", "<|return|>"), ("lfm2|qwen|nemotron", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("muse", "<|eot|>"), ("phi3", "<|end|>"), ("mistral|zephyr", "<eos>"), ("granite", "<|end_of_text|>")]
# families whose EOS is another token than the end of an answer, or the end itself
eos = [("cohere", "<|END_OF_TURN_TOKEN|>"), ("deepseek", "<｜end▁of▁sentence｜>"), ("qwen|lfm2", "<|im_end|>"), ("llama3", "<|eot_id|>")]
# what the beginning of an answer says where a family can think and is told not to
unthinking = [("qwen3_instruct|qwen3_vl", "assistant\n"), ("qwen3", "<think>\n\n</think>\n\n"), ("nemotron", "<think></think>"), ("glm4", "<think></think>"), ("granite", "assistant<|end_of_role|>")]
joins = "gemma", "mistral"      # no system role
# the answer stands otherwise in the rendering: a thought or a channel in front, a blank
border = "deepseek", "glm4", "gptoss", "muse", "mistral"


def of(table, name): return next((v for k, v in table if re.match(k, name)), None)


def mk_tok(name):
    "A tokenizer of bytes that has the special tokens of a template; names of thoughts are words"
    names = re.findall(r"<[|｜][^<>|｜\n'\"]{1,40}[|｜]>|<[a-z]+_of_turn>|<turn\|>|<\|turn>|</?think>|\[/?INST\]|\[gMASK\]|<sop>", originals[name])
    names = sorted({*names, "<|user|>", "<|assistant|>", "<|system|>"})
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [n for n in names if "think" not in n]
    tok = PreTrainedTokenizerFast(tokenizer_object=t, eos_token=of(eos, name) or "<eos>", bos_token="<bos>", pad_token="<pad>", additional_special_tokens=special)
    tok.add_tokens([n for n in names if "think" in n])
    tok.chat_template = originals[name]
    return tok


usable = [n for n in originals if n not in refused]
day = datetime.date(2025, 3, 4)
U, A, S = (lambda role: lambda text: Turn(role, text))("user"), (lambda text: Turn("assistant", text)), (lambda text: Turn("system", text))
talk = [U("Hi there."), A("Hello! How are you?"), U("What is 2+2?\n\nBe quick."), A("4"), U("Größe? 日本 🙂")]


@pytest.fixture(scope="module")
def templates():
    if not folder: pytest.skip("no trl in this environment (pip install -e '.[dev]')")
    return {n: Template(mk_tok(n), date=day) for n in usable}


def theirs(t, turns, **kw):
    return t.tok.apply_chat_template(to_messages(turns), chat_template=t.form.source, return_dict=False, **t.form.kwargs, **kw)


def completion(t, turns, text):
    "As TRL makes it of a prompt and its completion: what follows the prompt in the whole; None where the prompt is not its beginning"
    prompt, whole = theirs(t, turns, add_generation_prompt=True), theirs(t, [*turns, A(text)])
    return whole[len(prompt):] if whole[:len(prompt)]==prompt else None


def test_there_are_at_least_thirty(templates): assert len(originals)>=43 and len(templates)>=40


@pytest.mark.parametrize("name", refused)
def test_what_is_refused(name, templates):
    with pytest.raises(ValueError, match=refused[name]): Template(mk_tok(name), "chat")


@pytest.mark.parametrize("name", usable)
def test_prompt(name, templates):
    "The ids are transformers' own; a name in a turn is text and changes no token around it"
    t = templates[name]
    for turns in (talk[:1], talk[:3], talk, [U(" a\n")]):
        assert t.prompt(turns)==t.prompt(HH.prompt(turns))==theirs(t, turns, add_generation_prompt=True)
    names = [t.tok.convert_ids_to_tokens(t.form.end[-1]), t.tok.eos_token, "<|user|>"]
    spelled, plain = t.prompt([U(f"What is {' '.join(names)}?")]), t.prompt([U("What is x?")])
    special = set(t.form.own_tokens.values())
    assert [i for i in spelled if i in special]==[i for i in plain if i in special]
    assert f"What is {' '.join(names)}?" in t.tok.decode(spelled)
    begun = t.prompt(HH.prompt(talk[:1])+" Well,")                 # a prefill is what the model would have written itself
    assert begun==t.prompt(talk[:1])+t.tok("Well,").input_ids


@pytest.mark.parametrize("name", usable)
def test_system(name, templates):
    t, turns = templates[name], [S("Be brief."), *talk[:1]]
    said = t.tok.decode(t.prompt(turns))
    assert said.count("Be brief.")==1 and said.index("Be brief.")<said.index("Hi there.")
    if name in joins: assert "Be brief.\n\nHi there." in said and not t.form.system
    else: assert t.prompt(turns)==theirs(t, turns, add_generation_prompt=True)


@pytest.mark.parametrize("name", usable)
def test_end_and_masks(name, templates):
    "An answer ends with the family's end token, and with nothing else; it and the end are learned, the prompt is not"
    t = templates[name]
    assert "".join(t.tok.convert_ids_to_tokens(t.form.end))==of(ends, name)
    assert t.stops=={t.form.end[-1], t.tok.eos_token_id}
    b = tokenize_sft([dict(prompt=HH.prompt(talk[:3]), response=" Four. "), dict(prompt=HH.prompt(talk[:1])+" Well,", response=" I am.")], t, 4000, 99)
    for (ids,), text in zip(b.tokens(), ("Four. ", " I am.")):
        assert ids==t.tok(text).input_ids+t.form.end and t.text(ids)==text
    assert b.prompts==[t.prompt(HH.prompt(talk[:3])), t.prompt(HH.prompt(talk[:1])+" Well,")]


@pytest.mark.parametrize("name", usable)
def test_border(name, templates):
    "Prompt and answer are TRL's up to the first stop token, where the template leaves the answer alone; where it doesn't, that is noticed"
    t = templates[name]
    for turns in (talk[:1], talk[:3], talk):
        ours, want = t.response(" Four."), completion(t, turns, "Four.")
        same = want is not None and want[:len(ours)]==ours
        assert same==t.agrees(HH.prompt(turns), " Four.")==(not name.startswith(border)), (ours, want)
        for blank in ("Four.\n", "  Four."):                        # what the template strips stays in what we teach
            assert t.text(t.response(f" {blank}"))==blank
            want, ours = completion(t, turns, blank), t.response(f" {blank}")
            assert t.agrees(HH.prompt(turns), f" {blank}")==(want is not None and want[:len(ours)]==ours)


@pytest.mark.parametrize("name", usable)
def test_long(name, templates):
    "Whole turns go from the beginning, up to a turn of a person, never the system turn; a question too long for itself loses its beginning"
    t = templates[name]
    turns = [S("Be brief."), *talk]
    sizes = [len(t.prompt([turns[0], *turns[i:]])) for i in (1, 3, 5)]
    for i, room in zip((1, 3, 5), sizes):
        assert t.prompts([HH.prompt(turns)], room)[0].ids==t.prompt([turns[0], *turns[i:]])
        if i>1: assert t.prompts([HH.prompt(turns)], room+1)[0].cut
    cut = t.prompts([HH.prompt([S("Be brief."), U("x"*300+" the end?")])], sizes[2]+20)[0]
    said = t.tok.decode(cut.ids)
    assert cut.cut and len(cut.ids)<=sizes[2]+20 and "the end?" in said and "Be brief." in said
    assert said.startswith(t.tok.decode(t.prompt([S("Be brief."), U("x")]))[:12])
    with pytest.raises(BadPair, match="too long"): t.prompts([HH.prompt(turns)], 8)


@pytest.mark.parametrize("name", usable)
def test_thinking(name, templates):
    t = templates[name]
    knows = {k for k in ("enable_thinking", "thinking") if k in t.form.kwargs}
    assert knows==({"thinking"} if name=="granite" else {"enable_thinking"} if "enable_thinking" in originals[name] else set())
    assert not any(t.form.kwargs.values())
    tail = of(unthinking, name)
    if tail: assert t.tok.decode(t.prompt(talk[:1])).endswith(tail)
    for k in knows:
        on = Template(t.tok, template_kwargs={k: True}, date=day)
        assert on.prompt(talk[:1])==theirs(on, talk[:1], add_generation_prompt=True)!=t.prompt(talk[:1])


@pytest.mark.parametrize("name", [n for n in usable if "strftime_now" in originals[n]])
def test_date(name, templates):
    "The run's date, not today's"
    said = templates[name].tok.decode(templates[name].prompt(talk[:1]))
    assert templates[name].dated and ("04 Mar 2025" in said or "2025-03-04" in said)
    other = Template(mk_tok(name), date=datetime.date(2024, 1, 2))
    assert other.prompt(talk[:1])!=templates[name].prompt(talk[:1])


def test_some_print_the_date(templates): assert {n for n in usable if templates[n].dated}>={"llama3_2", "gptoss", "muse_glimmer"}


@pytest.fixture(scope="module")
def classifier():
    c = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=9999, vocab_size=300, num_labels=1)
    return AutoModelForSequenceClassification.from_config(c).eval()


@pytest.mark.parametrize("name", usable)
def test_what_a_reward_model_reads(name, templates, classifier):
    "A finished reward model is given what its card's code gives it: one rendering of the dialogue with its answer, with nothing switched off"
    tok = mk_tok(name)
    reader = Reader(classifier, tok)
    assert reader.form=="chat"
    for turns in (talk[:1], talk[:3], talk, [S("Be brief."), *talk]):
        if turns[0].role=="system" and name in joins: continue
        b = reader.batch([HH.prompt(turns)], [[" Four.", " I do not know.\n"]])
        rows = [p+r for p, rs in zip(b.prompts, b.tokens()) for r in rs]
        assert rows==[tok.apply_chat_template(to_messages([*turns, A(text)]), return_dict=False) for text in ("Four.", "I do not know.\n")]
        names = f" {tok.eos_token}{tok.convert_ids_to_tokens(templates[name].form.end[-1])}"
        special = set(templates[name].form.own_tokens.values())
        said, plain = (reader.batch([HH.prompt(turns)], [[o]]) for o in (names, " x"))
        said, plain = ([i for i in o.prompts[0]+o.tokens()[0][0] if i in special] for o in (said, plain))
        assert said==plain                                             # what an answer spells ends no turn
