"A finished run with one damaged file: what reads it says what it would have said of the whole one, or names the file"
import contextlib, hashlib, io, json, os, shutil, tempfile
from pathlib import Path
from fuzz import Case

import torch
import rlhf_nb
from rlhf_nb.cli import main
from rlhf_nb.run import Run,read_samples
from rlhf_nb.judge import judge_run
from rlhf_nb.load import load_policy,load_reward_model,load_tokenizer

torch.set_num_threads(1)
tiny = """world.n_corpus=300 world.n_facts=50 world.n_pairs=60 world.n_dev=12 world.n_test=12 world.n_ood=8 model.n_layer=1 model.n_embd=16 model.n_head=2 data.max_prompt=100 jobs=1 device=cpu
    sft.updates=8 sft.batch_size=8 reward.updates=8 reward.batch_size=8 reward.n_normalise=16 dpo.updates=4 dpo.batch_size=8 ppo.updates=3 ppo.batch_size=6 ppo.max_new_tokens=8
    grpo.updates=3 grpo.batch_size=4 grpo.group_size=3 grpo.max_new_tokens=8 eval.n_prompts=8 eval.max_new_tokens=12 eval.batch_size=8""".split()

def quiet(f, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try: return f(*args)
        except SystemExit as e:
            if e.code: raise ValueError(err.getvalue().strip().removeprefix('rlhf_nb: ')) from None

def base():
    "The run, made once for each state of the package"
    code = b''.join(f.read_bytes() for f in sorted(Path(rlhf_nb.__file__).parent.glob('*.py')))
    kept = Path(tempfile.gettempdir())/f'rlhf_nb_fuzz_run_{os.getuid() if hasattr(os, "getuid") else 0}_{hashlib.sha256(code+repr(tiny).encode()).hexdigest()[:12]}'
    if not kept.is_dir():
        new = Path(tempfile.mkdtemp(prefix='rlhf_nb_fuzz_run_new_'))
        quiet(main, ['run', '--out', str(new/'run'), *(o for s in tiny for o in ('--set', s)), '--stages', 'sft', 'reward', 'dpo', 'ppo', 'grpo', 'evaluate', 'judge', 'failures', 'analyze'])
        try: new.rename(kept)
        except OSError: shutil.rmtree(new)
    return kept/'run'

def weights(m): return {k: v.tolist() for k, v in m.state_dict().items()}
def vocabulary(path): t = load_tokenizer(path); return t.get_vocab(), t.eos_token_id, t.pad_token_id, t('Human: café?').input_ids
def model(path): m, _ = load_policy(str(path)); return weights(m), vocabulary(path)
def reward(path): m, _ = load_reward_model(str(path)); return weights(m), m.config.reward_mean
def rates(run):
    keep = lambda d: {k: v for k, v in d.items() if k in ('mean', 'low', 'high', 'rate', 'n', 'wins', 'ties', 'losses')}
    return {j: {m: keep(w) for m, w in d.items()} for j, d in quiet(judge_run, run).items()}
def texts(name, args):
    "What a command writes into a file"
    def f(run):
        quiet(main, args(run))
        return (run/name).read_text(encoding='utf-8').replace(str(run), 'RUN')
    return f
log = lambda run: Run(run).rows('ppo')
generate = texts('generated/ppo_samples.json', lambda run: ['generate', '--out', str(run)])
failures = texts('results/failure_analysis/rates.csv', lambda run: ['failures', '--out', str(run)])
# what is called, the files that are damaged for it, how often
calls = [(lambda run: Run(run).config, ['config.yaml'], 6), (log, ['logs/ppo.jsonl'], 6), (read_samples, ['output_samples/reference_samples.json', 'output_samples/dpo_samples.json'], 8),
         (rates, ['output_samples/ppo_samples.json', 'results/win_rates.json', 'results/judgements/agreement.json', 'config.yaml'], 6),
         (lambda run: model(run/'ppo_model'), ['ppo_model/config.json', 'ppo_model/model.safetensors', 'ppo_model/tokenizer.json', 'ppo_model/tokenizer_config.json', 'ppo_model/generation_config.json'], 8),
         (lambda run: reward(run/'reward_model'), ['reward_model/config.json', 'reward_model/model.safetensors'], 5),
         (generate, ['reference/config.json', 'grpo_model/model.safetensors', 'reward_model/model.safetensors', 'config.yaml', 'data.json'], 2), (failures, ['dpo_model/model.safetensors', 'output_samples/grpo_samples.json'], 1)]
right = {}

def places(o, path=()):
    "The path of every key and item"
    for k, v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ():
        yield (*path, k)
        yield from places(v, (*path, k))

known = {'prompt', 'response', 'model', 'reward', 'kl', 'n_tokens', 'finished', 'n_layer', 'n_embd', 'n_head', 'vocab_size', 'model_type', 'update'}

def damage(rng, f):
    "Damage a file so that it can be noticed, or that it does not matter; what was done in words"
    b, kind = f.read_bytes(), rng.choice(['cut', 'empty', 'removed', 'folder', 'garbage', 'null', 'latin', 'utf-16', 'header', 'wrong type', 'key gone', 'twice', 'space', 'line'])
    weights = f.suffix == '.safetensors'
    if weights and kind in ('null', 'latin', 'utf-16', 'wrong type', 'key gone', 'twice', 'space', 'line'): kind = 'header'
    if not weights and kind == 'header': kind = 'cut'
    if kind == 'cut': f.write_bytes(b[:(i := rng.randrange(len(b)))]); return f'cut after {i} of {len(b)} bytes'
    if kind == 'empty': f.write_bytes(b'')
    elif kind == 'removed': f.unlink()
    elif kind == 'folder': f.unlink(); f.mkdir()
    elif kind == 'garbage': f.write_bytes(rng.randbytes(rng.randrange(1, 200)))
    elif kind == 'null': f.write_text(rng.choice(['null', '[]', '3', '"x"', 'null\n', '[null]', '{']))
    elif kind == 'latin': f.write_bytes(b[:(i := b.find(b'"')+1)]+'é'.encode('latin-1')+b[i:])
    elif kind == 'utf-16': f.write_bytes(b.decode().encode('utf-16'))
    elif kind == 'space': f.write_bytes(b+rng.choice([b'\n', b'  \n', b'\r\n']))
    elif kind == 'line':
        lines = b.split(b'\n')
        lines.insert(rng.randrange(len(lines)-1), rng.choice([b'null', b'{"update": ', b'[1]', b'\x00\x00', b'12']))
        f.write_bytes(b'\n'.join(lines))
    elif kind == 'header':                       # safetensors: 8 bytes of length, then JSON that says where each tensor lies
        n = int.from_bytes(b[:8], 'little')
        i = rng.randrange(8+n)
        f.write_bytes(b[:i]+bytes([b[i] ^ 1 << rng.randrange(8)])+b[i+1:])
        return f'bit flipped in byte {i}: {b[max(0, i-20):i+20]!r}'
    elif f.suffix == '.json':
        o = json.loads(b)
        at = [p for p in places(o) if p[-1] in known]
        if not at: f.write_bytes(b''); return 'empty'
        *path, k = rng.choice(at)
        inner = o
        for p in path: inner = inner[p]
        if kind == 'wrong type': new = rng.choice([v for v in ('high', [1], {'a': 1}, None, float('inf')) if type(v) is not type(inner[k])]); inner[k] = new; said = f'{path}.{k} is {new!r}'
        elif kind == 'key gone': del inner[k]; said = f'{path}.{k} is gone'
        else: said = 'written anew'
        f.write_text(json.dumps(o))
        return said
    else: f.write_bytes(b''); return 'empty'
    return kind

def one(rng, folder):
    i = rng.choices(range(len(calls)), [c[2] for c in calls])[0]
    f, files, _ = calls[i]
    name = rng.choice(files)
    run = folder/'run'
    shutil.copytree(base(), run)
    if i not in right: right[i] = json.loads(json.dumps(f(run), default=vars)); shutil.rmtree(run); shutil.copytree(base(), run)
    what = 'nothing' if rng.random() < .1 else damage(rng, run/name)
    if f is failures and what == 'removed': (run/name).write_text('')             # of a model without samples the report says less, rightly
    def got():
        try: return json.loads(json.dumps(f(run), default=vars))
        except (ValueError, OSError) as e:
            if not any(o in str(e) for o in (Path(name).name, str(run/Path(name).parent)+os.sep if '/' in name else 'run', str(run/Path(name).parent))): raise RuntimeError(f'the file is not named: {e}') from e
            raise
    def same(v):
        if v == right[i]: return True
        if f is rates and what == 'removed' and '_samples' in name: return v == {j: {m: w for m, w in d.items() if m != 'ppo'} for j, d in right[i].items()}
        if f is read_samples and what == 'removed': return v == {k: r for k, r in right[i].items() if k not in name}       # a model less
        if f is log and (what.split()[0] in ('removed', 'empty', 'cut') or (run/name).read_bytes() == b'{'):                                                    # a last line that a kill cut short is left out
            n = (run/name).read_bytes().count(b'\n') if (run/name).exists() else 0
            return len(v)-n in (0, 1) and v == right[i][:len(v)]
    return Case(f'{name}: {what}', got, same, plain=what in ('nothing', 'space', 'written anew'))
