"""Splits of a data set: splits of any name, few prompts, the same prompt in other spellings here and there, many pairs of a prompt.

The independent reading works on sets of prompts: what is in test, dev or ood is taken out of train, what is in test or ood out of dev, no prompt is in two parts that were made
from train, every pair is somewhere or counted, and enough prompts never leave a part empty."""
import unicodedata

from fuzz import Case
from fuzz.data import text

def spelling(rng, q): return rng.choice((q, q, q, f' {q}', f'{q}  ', q.upper(), q.replace(' ', '\n'), unicodedata.normalize('NFD', q)))

def same(q): return ' '.join(unicodedata.normalize('NFKC', q).casefold().split())

def one(rng, folder):
    pool = [' '.join(f'{i} {text(rng)}'.replace('\r', '').split()) for i in range(rng.choice((1, 3, 4, 6, 9, 12, 40)))]
    def rows(n): return [dict(prompt=[dict(role='user', content=spelling(rng, rng.choice(pool)))], chosen=f'a{i}', rejected='b') for i in range(n)]
    train, test = rng.choice((('train', None), ('train', None), ('train_prefs', 'test_prefs'), ('x', None), ('test', None))), None
    train, test = train
    data = {train: rows(rng.choice((1, 3, 8, 30)))}
    names = dict(train=train)
    if rng.random() < .4: data[test or 'test'] = data.get(test or 'test') or rows(rng.choice((1, 4)))
    if (test or 'test') in data and (test or 'test') != train: names['test'] = test or 'test'
    elif test: test = None
    if rng.random() < .3: k = rng.choice(('dev', 'validation')); data[k] = rows(rng.choice((1, 4))); names['dev'] = k
    if rng.random() < .1: data['ood'] = rows(2); names['ood'] = 'ood'
    if rng.random() < .1: data['other'] = rows(2)
    sets = ['data.name=x', f'data.split={train}', f'seed={rng.randrange(99)}'] + [f'data.test_split={test}'] * bool(test)
    key = lambda r: same(r['prompt'][0]['content'])
    held = {key(r) for k in ('test', 'dev', 'ood') if k in names for r in data[names[k]]}
    free = {key(r) for r in data[train]} - held
    tested = {key(r) for k in ('test', 'ood') if k in names for r in data[names[k]]}
    dev = [r for r in data[names['dev']] if key(r) not in tested] if 'dev' in names else []
    n_given = {k: len(dev) if k == 'dev' else len(data[n]) for k, n in names.items() if k != 'train'}
    parts = 1 + sum(k not in names for k in ('test', 'dev'))
    leaks = sum(key(o) in held for o in data[train]) + (len(data[names['dev']]) - len(dev) if 'dev' in names else 0)
    possible = len(free) >= parts and all(n_given.values())          # a dev split that holds test prompts alone is nothing
    from rlhf_nb.settings import load_config
    from rlhf_nb.data import load_splits
    def got(): return load_splits(load_config('demo', sets), source=data)
    def right(s):
        where = {k: {same(p['prompt'].removeprefix('\n\nHuman: ').removesuffix('\n\nAssistant:')) for p in getattr(s, k)} for k in ('train', 'dev', 'test', 'ood')}
        made = [where[k] for k in ('train', 'test', 'dev') if k not in names or k == 'train']
        r = s.report
        return (all(made) and sum(map(len, made)) == len(free) and set.union(*made) == free and not any(where['train'] & where[k] for k in ('dev', 'test', 'ood'))
                and all(len(getattr(s, k)) == n for k, n in n_given.items()) and r.counts.get('train/test leak', dict(n=0))['n'] == leaks
                and r.read == sum(len(data[n]) for n in names.values()) and r.kept == sum(r.splits.values()))
    return Case(f'{sets}, {({k: [r["prompt"][0]["content"] for r in v] for k, v in data.items()})}', got, right if possible else lambda s: False, plain=possible)
