"Configurations: YAML files and --set lists, right ones and damaged ones, against a table of our own of what each key may hold"
from fuzz import REFUSED, Case
from rlhf_nb.settings import load_config

big, most = 2**53, 1e6   # the largest count; rates have no largest value, we try so far
# key: kind, smallest, largest, whether the ends are out, null allowed; for words: those that are allowed
def num(kind, lo, hi, open_lo=False, open_hi=False, null=False): return dict(kind=kind, lo=lo, hi=hi, open_lo=open_lo, open_hi=open_hi, null=null)
count, rate, share, above = num(int, 1, big), num(float, 0, most), num(float, 0, 1), num(float, 0, most, open_lo=True)
heat, flag, name = num(float, .001, 1000), dict(kind=bool, null=False), dict(kind=str, null=False)
def null(d): return {**d, 'null': True}
def words(*o): return dict(kind='words', words=o, null=False)
optim = dict(lr=rate, updates=null(count), epochs=count, batch_size=count, warmup=share, schedule=words('constant', 'linear', 'cosine'), weight_decay=rate,
             beta2=num(float, 0, 1, open_hi=True), eps=above, max_grad_norm=rate, micro_tokens=count, checkpoint_every=count)
rollout = dict(optim, max_new_tokens=count, temperature=heat, no_eos_penalty=rate, target_kl=null(rate), max_kl=null(rate), eval_samples=count)
table = {
    '': dict(seed=num(int, -2**63, 2**64-1), device=words('auto', 'cpu', 'mps', 'cuda', 'cuda:0', 'cuda:3'), jobs=count),
    'data': dict(name=name, data_dir=null(name), config=null(name), format=name, n_pairs=null(count), test_size=num(float, 0, .5, open_hi=True), max_prompt=count, max_response=count),
    'world': dict(n_corpus=count, n_facts=num(int, 0, big), n_pairs=count, n_dev=count, n_test=count, n_ood=count),
    'model': dict(tokenizer=null(name), n_layer=count, n_positions=count, precision=words('auto', 'fp32', 'bf16', 'fp16'), forward=words('grouped', 'padded')),
    'sft': dict(optim, skip=flag),
    'reward': dict(optim, head=words('last_token', 'log_prob'), center=rate, n_normalise=num(int, 2, big)),
    'ppo': dict(rollout, value_lr=rate, kl_coef=rate, gamma=share, lam=share, clip=rate, value_clip=rate, value_coef=rate, mini_batches=count, value_from=words('reference', 'reward'), value_warmup=num(int, 0, big)),
    'grpo': dict(rollout, group_size=num(int, 2, big), loss_type=words('grpo', 'dr_grpo', 'dapo', 'cispo'), ratio=words('token', 'sequence'),
                 baseline=words('mean', 'leave_one_out'), normalise_each=flag, resample_silent=num(int, 0, big), scale_rewards=words('group', 'batch', 'none'), epsilon=rate, epsilon_high=null(rate),
                 inner=count, beta=rate, kl_in=words('loss', 'loss_corrected', 'reward'), mask_truncated=flag),
    'dpo': dict(optim, n_pairs=null(count), loss_type=words('sigmoid', 'ipo', 'robust', 'cdpo', 'simpo'), beta=rate, label_smoothing=num(float, 0, .5, open_hi=True), gamma=rate, sft_weight=rate, cache_reference=flag),
    'eval': dict(n_prompts=count, n_samples=count, max_new_tokens=count, batch_size=count, n_pairs=null(count)),
}
names = ['pairs.jsonl', 'my data/', 'p[1].jsonl', 'a: b', '#1', 'x #2', "O'Hara", 'say "hi"', '🙂', 'ü ß', '1.5.2', '- x', '*star', '&and', '!bang', '%x', '@x', '{a}', 'tab\there', 'C:\\data', 'nulls', 'yes.csv', '\u2028', '~/x']

def good(rng, t, quoted_names):
    "(how it is written, what it means)"
    if t['null'] and rng.random() < .25: return rng.choice(['null', '~', 'Null', 'NULL']), None
    if t['kind'] is bool:
        v = rng.random() < .5
        return rng.choice(['true', 'yes', 'on', 'True', 'YES', 'On'] if v else ['false', 'no', 'off', 'False', 'NO', 'Off']), v
    if t['kind'] == 'words':
        v = rng.choice(t['words'])
        return rng.choice([v, f'"{v}"', f"'{v}'"]), v
    if t['kind'] is str:
        v = rng.choice(names)
        if not quoted_names: return v, v
        if "'" not in v and '\u2028' not in v and rng.random() < .5: return f"'{v}'", v
        esc = {'"': '\\"', '\\': '\\\\', '\t': '\\t', '\u2028': '\\u2028', '🙂': rng.choice(['🙂', '\\U0001F642', '\\ud83d\\ude42'])}
        return '"'+''.join(esc.get(c, c) for c in v)+'"', v
    lo, hi = t['lo'], t['hi']
    if t['kind'] is int:
        v = rng.choice([lo, hi, max(lo, 1)+rng.randrange(5), max(lo, 1)+rng.randrange(100000), max(2, lo)*1000])
        forms = [str(v), str(v), f'"{v}"', str(v) if v < 0 else f'+{v}', f'{v:_}', f' {v} ']
        if 0 < v < 10**6: forms += [f'{v}.0', f'{v}e0', f'{v}.']
        if v % 1000 == 0 and 0 < v < big: forms += [f'{v//1000}e3', f'{v//1000}E+3']
        return rng.choice(forms), v
    v = rng.choice([lo, hi, lo+(hi-lo)*rng.random(), min(hi, lo+10**-rng.randrange(1, 9)), min(hi, 1), (lo+min(hi, 1))/2])
    if t['open_lo'] and v == lo or t['open_hi'] and v == hi: v = lo+(hi-lo)/4
    forms = [repr(v), f'{v:.17e}', f'"{v!r}"']
    if 0 < v < 1 and repr(v).startswith('0.'): forms.append(repr(v)[1:])
    if v == int(v): forms += [str(int(v)), f'{int(v)}.']
    return rng.choice(forms), v

def bad(rng, t):
    "Written so that nobody can mean it"
    odd = ['[1]', '{a: 1}', '[]', '2024-01-01', '1:30', '.inf', '-.inf', '.nan']
    if not t['null']: odd += ['null', '~']
    if t['kind'] is bool: return rng.choice([*odd, '1', '0', 'maybe', '"yes"', '1.0', 'y'])
    if t['kind'] == 'words': return rng.choice([*odd, 'true', '1', 'nothing_of_it', t['words'][0].upper(), f'[{t["words"][0]}]'])
    if t['kind'] is str: return rng.choice([o for o in odd if o[0] not in '[{'] + ['no', 'True', '12', '1.5', '0x10'])
    lo, hi = t['lo'], t['hi']
    odd += ['yes', 'no', 'true', 'off', 'inf', 'nan', 'fast', '010', '0x10', '0o7', '1e999', '-1e999', '1,5', '1 000', 'five', '"yes"', '٣', '1__0', '_1', '1_', '--1', '1e', 'e3']
    odd += [repr(lo-1)]*3 + [f'{hi*10}']*(hi != most)
    if t['open_lo']: odd += [str(lo), '-0.0']
    if t['open_hi']: odd.append(str(hi))
    if t['kind'] is int: odd += ['1.5', '2.5e0', '1e-3', '1e30', str(10**40)]
    return rng.choice(odd)

def one(rng, folder):
    as_sets = rng.random() < .4
    damage = rng.choice([None]*5 + ['value']*3 + ['key', 'twice', 'section twice', 'list', 'syntax', 'bytes', 'together'])
    keys = sorted((s, k) for s, ks in table.items() for k in ks)
    given = {}
    for s, k in rng.sample(keys, rng.randrange(1, 7)): given.setdefault(s, {})[k] = good(rng, table[s][k], not as_sets)
    if damage == 'value':
        s, k = rng.choice([(s, k) for s, ks in given.items() for k in ks])
        given[s][k] = bad(rng, table[s][k]), None
    if damage == 'key':
        s = rng.choice(list(given))
        k = rng.choice(['lrr', 'Seed', 'n', '', 'ppo ', 'None', 'lr.x', '1', 'kl coef'])
        given[s][k] = '1', 1
    if damage == 'together':
        if rng.random() < .5: given.setdefault('ppo', {}).update(batch_size=('6', 6), mini_batches=('7', 7))
        else: given.setdefault('dpo', {}).update(loss_type=('ipo', 'ipo'), beta=('0', 0.))
    p, d = given.get('ppo', {}), given.get('dpo', {})
    wrong_together = p.get('mini_batches', ('', 1))[1] > p.get('batch_size', ('', 64))[1] if damage != 'value' else False
    wrong_together |= d.get('loss_type', ('', ''))[1] == 'ipo' and d.get('beta', ('', .4))[1] == 0
    head = 'log_prob' if given.get('data', {}).get('name', ('', 'world'))[1] == 'world' else 'last_token'
    wrong_together |= p.get('value_from', ('', ''))[1] == 'reward' and given.get('reward', {}).get('head', ('', head))[1] != 'last_token'
    wrong_together |= given.get('grpo', {}).get('normalise_each', ('', False))[1] is True
    if as_sets:
        if damage in ('twice', 'section twice', 'bytes'): damage = None
        sets = [f"{s+'.' if s else ''}{k}={w}" for s, ks in given.items() for k, (w, _) in ks.items()]
        if damage == 'list': sets.append(rng.choice(['ppo=[1]', 'sft=5', 'data=x', 'model=null.x', 'eval=[{n_prompts: 5}]']))
        if damage == 'syntax': sets.append(rng.choice(['ppo', 'seed:1', '', 'ppo={lr: [1}', 'ppo={lr: 1', '=', 'seed=', 'sft="x', 'ppo={lr: 1, lr: 2}', 'ppo.lr.x=1', 'data.name="a']) if rng.random() < .95 else 'seed=1=1')
        if damage == 'syntax' and sets[-1] == 'data.name="a': damage, given = None, {**given, 'data': {**given.get('data', {}), 'name': ('', '"a')}}
        what, got = f'--set {sets!r}', lambda: load_config('demo', sets)
    else:
        lines, anchor = [], rng.random() < .15
        order = sorted(given, key=lambda s: (s != '', rng.random()))
        for s in order:
            items = [f'{k}: {w}' for k, (w, _) in given[s].items()]
            if damage == 'twice' and s == order[-1]: items.insert(0, f'{next(iter(given[s]))}: 1')
            if not s: lines += items
            elif rng.random() < .25: lines.append(f'{s}: {{{", ".join(items)}}}')
            else: lines += [f'{s}:  # a section', *(f'  {i}' for i in items)]
            if rng.random() < .2: lines.append(rng.choice(['', '# a comment', '   ']))
        if anchor and not damage and 'sft' not in given and 'reward' not in given:
            lines += ['sft: &a', '  lr: 0.25', '  epochs: 3', 'reward:', '  <<: *a', '  epochs: 4']
            given.update(sft=dict(lr=('', .25), epochs=('', 3)), reward=dict(lr=('', .25), epochs=('', 4)))
        if damage == 'section twice': lines += ['zzz: 1'] if order == [''] else [f'{order[-1] or order[0]}:', '  lr: 1']
        if damage == 'list': lines = rng.choice([['ppo:', '- lr: 1'], ['- seed: 1'], ['ppo: 5'], ['just words'], ['sft: [1, 2]'], ['data: pairs.jsonl'], ['"a"']])
        if damage == 'syntax': lines.append(rng.choice(['ppo: {lr: 1', 'a: b: c', '\tseed: 1', 'seed: "1', '---\nseed: 1\n---\nseed: 2', 'seed: *nobody', '!!python/name:os.system x', '? [a]\n: 1', '['*2000, 'seed: !!timestamp x', 'x: \x07', '%YAML 9']))
        text = '\n'.join(lines)+rng.choice(['\n', '', '\n\n'])
        if rng.random() < .15: text = text.replace('\n', '\r\n')
        data = text.encode(rng.choice(['utf-8', 'utf-8', 'utf-8', 'utf-8-sig', 'utf-16']))
        if damage == 'bytes': data = text.encode()[:(i := rng.randrange(len(text.encode())+1))]+bytes([rng.choice([0x80, 0xff, 0xfc, 0xc0])])+b'x'+text.encode()[i:]
        f = folder/'c.yaml'
        f.write_bytes(data)
        what, got = f'{data!r}', lambda: load_config(str(f))
    def right(c):
        base = load_config('demo', [dict(data=dict(name=c.data.name))])   # with other data the preset has other defaults
        for s, ks in table.items():
            for k in ks:
                want = given[s][k][1] if k in given.get(s, {}) else getattr(getattr(base, s) if s else base, k)
                have = getattr(getattr(c, s) if s else c, k)
                if type(have) is not type(want) and not (isinstance(want, int) and isinstance(have, float) and table[s][k]['kind'] is float) or have != want: return False
        return True
    ruined = damage or wrong_together
    return Case(f'{damage}: {what}', got, REFUSED if ruined else right, plain=not ruined)
