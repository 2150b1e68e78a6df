"""Families of models beyond those of notebook 18, and the command with models that need the padded forward. Random weights, the smallest sizes.

The right values are plain calls, a sequence at a time, in float64 where the model's code has it."""
import json
from copy import deepcopy

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf_nb.cli import main
from rlhf_nb.core import Batch,generator,seed_all
from rlhf_nb.forward import is_padded,max_tokens
from rlhf_nb.load import load_policy,load_reward_model,save_model
from rlhf_nb.models import check_forward,check_scores,log_probs,mk_reward_model,scores,values
from rlhf_nb.sampling import sample

vocab = 97
tokens = dict(vocab_size=vocab, bos_token_id=0, eos_token_id=1, pad_token_id=2)
size = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, max_position_embeddings=64, **tokens)
few = dict(size, num_key_value_heads=1)
wide = dict(few, head_dim=8)
gemma = dict(wide, query_pre_attn_scalar=8)
experts = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1)
latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6)
scan = dict(mamba_n_heads=4, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=8)
image = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
grouped = dict(
    Phimoe=dict(few, num_local_experts=4), Olmoe=dict(size, num_experts=4, num_experts_per_tok=2), Ernie4_5=wide, SeedOss=wide, Glm=wide, Helium=wide,
    Apertus=few, Arcee=few, DeepseekV2=dict(size, num_key_value_heads=2, **experts, **latent), Dots1=dict(size, num_key_value_heads=2, n_shared_experts=1, **experts),
    JetMoe=dict(hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=16, num_local_experts=2, num_experts_per_tok=1,
                max_position_embeddings=64, **tokens),
    Cwm=dict(wide, sliding_window=32, layer_types=["sliding_attention", "full_attention"]),
    Gemma3=dict(text_config=gemma, vision_config=image, mm_tokens_per_image=4, boi_token_index=90, eoi_token_index=91, image_token_index=92))
padded = dict(
    RecurrentGemma=dict(few, lru_width=16, attention_window_size=9, block_types=["recurrent", "attention"]),
    Mamba2=dict(hidden_size=16, num_heads=4, head_dim=8, state_size=4, n_groups=1, num_hidden_layers=2, chunk_size=8, **tokens),
    FalconH1=dict(few, mamba_d_ssm=16, mamba_d_head=4, lm_head_multiplier=.5, **scan), Bamba=dict(few, attn_layer_indices=[1], mamba_d_head=8, **scan),
    Jamba=dict(few, num_hidden_layers=3, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
               use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4),
    Rwkv=dict(hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, **tokens),
    ModernBertDecoder=dict(size, local_attention=8, global_attn_every_n_layers=2), VaultGemma=gemma,
    Bart=dict(d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16,
              max_position_embeddings=64, is_decoder=True, **tokens),
    GPTNeoXJapanese=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, **tokens))
encoders = dict(
    Bert=size, IBert=size, Roberta=size, XLMRoberta=size, Electra=dict(size, embedding_size=8), Albert=dict(size, embedding_size=8), MPNet=size, EuroBert=few,
    DebertaV2=dict(size, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False),
    ModernBert=dict(size, local_attention=8, cls_token_id=3, sep_token_id=4), DistilBert=dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=64, **tokens))


def model(kind, options, cls=AutoModelForCausalLM, **more):
    seed_all(0)
    m = cls.from_config(getattr(transformers, kind+"Config")(**dict(options, **more))).eval()
    for p in m.parameters():
        p.data += .1*torch.randn_like(p)
    return m


def batch():
    g = generator(1, "batch")
    ids = lambda n: torch.randint(3, 89, (n,), generator=g).tolist()
    return Batch.from_tokens([ids(9), ids(4), ids(1)], [[ids(3), ids(17)], [ids(12), ids(1)], [ids(2), ids(26)]])


@torch.no_grad()
def plain(m, b, temperature=1.):
    try:
        m = deepcopy(m).double()
        m(torch.tensor([[5]]))
    except (RuntimeError, ValueError):
        m = m.float()
    out = torch.zeros(b.shape, dtype=torch.float64)
    for i, (p, rs) in enumerate(zip(b.prompts, b.tokens())):
        for j, r in enumerate(rs):
            z = m(torch.tensor([p+r])).logits[0, len(p)-1:-1].double()/temperature
            out[i, j, :len(r)] = z.log_softmax(-1).gather(-1, torch.tensor(r)[:, None])[:, 0]
    return out


def near(got, want, tol=1e-5): assert (got-want).abs().max() < tol


@pytest.mark.parametrize("kind", [*grouped, *padded])
@pytest.mark.parametrize("forward", ["grouped", "padded"])
def test_log_probabilities_and_samples(kind, forward):
    m, same = (model(kind, {**grouped, **padded}[kind]) for _ in range(2))
    m.padded = forward == "padded"
    if kind in padded and forward == "grouped":
        with pytest.raises(ValueError, match="Load it with forward='padded'"):
            check_forward(m)
        return
    check_forward(m)
    b = batch()
    near(log_probs(m, b), plain(same, b))
    near(log_probs(m, b, .7), plain(same, b, .7))
    for n in (1, 5):
        s = sample(m, b.prompts, n, 4, .7, seed=n)
        near(s.old_log_probs, plain(same, s, .7))


@pytest.mark.parametrize("kind", ["SeedOss", "DeepseekV2", "Gemma3", "VaultGemma", "GptOss"])
def test_reward_and_value_of_our_own(kind):
    p = model(kind, {**grouped, **padded, "GptOss": dict(wide, num_local_experts=4, num_experts_per_tok=2)}[kind])
    p.padded = kind in ("VaultGemma", "GptOss")
    if kind == "VaultGemma":  # it has no classifier in transformers
        with pytest.raises(ValueError, match="no sequence classifier for 'vaultgemma'"):
            mk_reward_model(p)
        return
    rm, b = mk_reward_model(p), batch()
    assert is_padded(rm) == p.padded
    call = lambda row: rm(torch.tensor([row])).logits[0, 0].item()
    near(scores(rm, b), torch.tensor([[call(p+r) for r in rs] for p, rs in zip(b.prompts, b.tokens())]))
    v = values(rm, b)
    for i, j in ((0, 1), (2, 0)):
        r = b.tokens()[i][j]
        near(v[i, j, :len(r)], torch.tensor([call(b.prompts[i]+r[:t]) for t in range(len(r))]))


@pytest.mark.parametrize("kind", encoders)
def test_encoders_as_reward_models(kind, tmp_path):
    m = model(kind, encoders[kind], AutoModelForSequenceClassification, num_labels=1)
    m.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    rm, _ = load_reward_model(str(tmp_path))
    b = batch()
    want = torch.tensor([[m(torch.tensor([p+r])).logits[0, 0].item() for r in rs] for p, rs in zip(b.prompts, b.tokens())])
    near(scores(rm, b), want)
    if kind in ("IBert", "Roberta", "XLMRoberta", "MPNet"):  # 64 places, counted from behind PAD's (in MPNet always 1)
        assert max_tokens(rm) == (62 if kind == "MPNet" else 61)


@pytest.mark.parametrize("kind", ["FalconH1", "Llama"])
def test_a_log_prob_reward_comes_back_with_its_infinities(kind, tmp_path):
    m = model(kind, dict({**padded, "Llama": few}[kind], vocab_size=259))  # Falcon-H1 has an infinite bound of its time steps, which JSON cannot say
    m.padded = kind in padded
    rm, b = mk_reward_model(m, "log_prob"), batch()
    rm.config.odd = [float("-inf"), dict(x=float("inf"))]
    rm.w.data.normal_()
    save_model(rm, byte_tokenizer(), tmp_path/"rm")
    json.loads((tmp_path/"rm"/"config.json").read_text(), parse_constant=lambda o: 1/0)
    again, _ = load_reward_model(str(tmp_path/"rm"), forward="padded" if m.padded else "grouped")
    assert again.config.odd == rm.config.odd
    near(scores(again, b), scores(rm, b))


def test_a_model_without_a_gradient_is_refused():
    m = model("Reformer", dict(hidden_size=16, num_attention_heads=2, attention_head_size=8, feed_forward_size=24, attn_layers=["local", "local"], is_decoder=True,
                               axial_pos_embds=False, local_attn_chunk_length=8, max_position_embeddings=64, **tokens))
    m.padded = True
    with pytest.raises(ValueError, match="its gradient fails"):  # its backward wants training mode, in which it would drop out
        check_forward(m)


xlnet = dict(d_model=16, n_layer=2, n_head=2, d_inner=24, **tokens)


@pytest.mark.parametrize("kind, options", [("XLNet", xlnet), ("Bert", size), ("Roberta", size)])
def test_language_models_that_look_ahead_are_refused(kind, options):
    m = model(kind, options)
    m.padded = True
    with pytest.raises(ValueError, match="looks ahead"):
        check_forward(m)


@pytest.mark.parametrize("kind, options", [("XLNet", xlnet), ("Bart", padded["Bart"])])
def test_classifiers_that_padding_changes_are_refused(kind, options):
    m = model(kind, options, AutoModelForSequenceClassification, num_labels=1, is_decoder=False)
    m.padded = True
    with pytest.raises(ValueError, match="cannot be used"):
        check_scores(m)


@pytest.mark.parametrize("pad", [2, 1, None, -1])
@pytest.mark.parametrize("forward", ["grouped", "padded"])
def test_foreign_reward_model_reads_where_transformers_reads(pad, forward):
    m = model("Llama", few, AutoModelForSequenceClassification, num_labels=1)
    m.config.pad_token_id = pad
    m.padded = forward == "padded"
    check_scores(m)
    b = batch()
    b = Batch.from_tokens(b.prompts, [[r+[1] if j else r for j, r in enumerate(rs)] for rs in b.tokens()])  # some end with EOS, which is PAD where pad = 1
    near(scores(m, b), torch.tensor([[m(torch.tensor([p+r])).logits[0, 0].item() for r in rs] for p, rs in zip(b.prompts, b.tokens())]))


def byte_tokenizer():
    t = Tokenizer(BPE(vocab={w: i for i, w in enumerate(["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", pad_token="<pad>")


def folder(path, kind, options):
    tok = byte_tokenizer()
    model(kind, dict(options, vocab_size=len(tok))).save_pretrained(path)
    tok.save_pretrained(path)
    return str(path)


def pairs(path):
    path.write_text("".join(json.dumps(dict(prompt=f"What is {i}?", chosen=f"It is {i}.", rejected="No."))+"\n" for i in range(80)))
    return str(path)


SMALL = ["jobs=1", "data.max_prompt=40", "data.max_response=16", "sft.updates=2", "reward.updates=2", "reward.n_normalise=8", "dpo.updates=2", "ppo.updates=1", "ppo.batch_size=4",
         "ppo.mini_batches=1", "ppo.max_new_tokens=5", "grpo.updates=1", "grpo.batch_size=2", "grpo.max_new_tokens=5", "eval.max_new_tokens=5", "eval.n_prompts=4"]


def run(tmp_path, name, stages, *sets):
    sets = sum((["--set", o] for o in [*SMALL, *sets]), [])
    main(["run", "--out", str(tmp_path/"out"), "--model", name, "--data", pairs(tmp_path/"pairs.jsonl"), "--device", "cpu", *sets, "--stages", *stages])


def test_the_whole_line_with_a_padded_model(tmp_path):
    name = folder(tmp_path/"m", "Gemma2", dict(gemma, sliding_window=16, final_logit_softcapping=2.))
    run(tmp_path, name, ["sft", "reward", "dpo", "ppo", "grpo", "evaluate"], "model.forward=padded")
    m, _ = load_policy(str(tmp_path/"out"/"ppo_model"), forward="padded")
    b = batch()
    near(log_probs(m, b), plain(AutoModelForCausalLM.from_pretrained(tmp_path/"out"/"ppo_model").eval(), b))


@pytest.mark.parametrize("kind, options, sets, said", [
    ("CodeGen", dict(n_embd=16, n_layer=1, n_head=4, n_ctx=64, n_positions=64, rotary_dim=4, **tokens), ["model.forward=padded"], "no sequence classifier for 'codegen', which reward (reward.head=last_token), ppo"),
    ("Gemma2", gemma, [], "soft-capped scores in its attention. Load it with forward='padded' (model.forward=padded)"),
    ("DiffLlama", dict(size, num_key_value_heads=2), [], "a layer that attends twice")])
def test_what_a_model_lacks_is_said_before_the_first_stage(tmp_path, capsys, kind, options, sets, said):
    with pytest.raises(SystemExit) as e:
        run(tmp_path, folder(tmp_path/"m", kind, options), ["sft", "reward", "dpo", "ppo"], *sets)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not list((tmp_path/"out").glob("*/model.safetensors"))
