"""Calls of the page's functions: questions, prompts, votes, exports, filters, and the same over HTTP.

The readings here are a table of what is allowed and what must come back unchanged, a reader of dialogues that goes line by line, a filter by brute force, and for votes the bytes of the file
before and after."""
import atexit, functools, http.client, json

from rlhf_nb.cards import _limit,find
from rlhf_nb.cards import mk_prompt
from rlhf_nb.records import shipped_samples
from rlhf_nb.desk import Desk
from rlhf_nb.app import launch
from rlhf_nb.votes import read_votes

from . import REFUSED, Case

files = {k: json.loads((shipped_samples()/f'{k}_samples.json').read_text(encoding='utf-8')) for k in ('reference', 'ppo', 'grpo', 'dpo')}
names = list(files)
prompts = list(dict.fromkeys(r['prompt'] for r in files['reference']))
junk = [None, True, False, 0, 1, -1, 1.5, 2.0, '2', '', 'ppo', [], {}, [1], [None], {'ppo': 1}, float('nan'), float('inf'), -float('inf'), 10**30, -10**30, 1e-300, 'x'*5000, [['ppo']], 'Größe 🙂']
whole = lambda v, lo, hi: type(v) is int and lo <= v <= hi
rules = dict(     # name: default, is it allowed?, some that are
    models=(names, lambda v: type(v) in (list, tuple) and 1 <= len(v) <= 4 and all(type(k) is str and k in names for k in v) and len(set(v)) == len(v), None),
    temperature=(1.0, lambda v: type(v) in (int, float) and (v == 0 or .001 <= v <= 5), [0, 0., 1, 1.0, .7, 5, .001]),
    max_new_tokens=(48, lambda v: whole(v, 1, 1024), [1, 24, 48, 256, 1024]),
    seed=(0, lambda v: whole(v, 0, 2**62), [0, 1, 123456, 2**53+1, 2**62]),
    n=(1, lambda v: whole(v, 1, 64), [1, 2, 3, 64]))


@functools.cache
def desk():
    return Desk(live=False).load()


def settings(rng):
    "Random arguments of a question, and what they mean: a dictionary or REFUSED"
    kw = {}
    for k, (default, ok, good) in rules.items():
        if rng.random() < .4: kw[k] = default if rng.random() < .5 else None
        elif rng.random() < .85: kw[k] = rng.sample(names, rng.randint(1, 4)) if k == 'models' else rng.choice(good)
        else: kw[k] = rng.choice(junk)
    if any(v is not None and not rules[k][1](v) for k, v in kw.items()): return kw, REFUSED
    want = {k: rules[k][0] if v is None else v for k, v in kw.items()}
    return kw, want if len(want['models'])*want['n']*want['max_new_tokens'] <= 4096 else REFUSED


def same(got, want):
    "Equal, and of the same types"
    return got == want and all(type(got[k]) is type(want[k]) for k in want)


def question(rng, folder):
    kw, want = settings(rng)
    prompt = rng.choice([*prompts, '\n\nHuman: '+'x'*rng.choice([5, 7950, 8100])+'\n\nAssistant:', *([rng.choice(junk)] if rng.random() < .2 else [])])
    if type(prompt) is not str or len(prompt) > 8000: want = REFUSED
    elif want is not REFUSED: want = dict(want, prompt=prompt)
    def got():
        c = desk().ask(prompt, **kw)
        return {k: c[k] for k in (*rules, 'prompt')}
    return Case(f'ask({prompt!r:.100}, **{kw!r:.300})', got, REFUSED if want is REFUSED else lambda g: same(g, want), plain=want is not REFUSED)


def hh(turns): return ''.join(f'\n\n{r}: {t}' if t else f'\n\n{r}:' for r, t in turns)+'\n\nAssistant:'


def read_prompt(text):
    "A prompt, line by line"
    if type(text) is not str: return REFUSED
    text = ''.join('\ufffd' if '\ud800' <= c <= '\udfff' else c for c in text).replace('\r\n', '\n').replace('\0', '')
    if text.startswith('\n\nHuman:') and text.endswith('\n\nAssistant:'): return text
    lines = text.strip().split('\n')
    role = lambda l: next((r for r in ('Human', 'Assistant') if l.lstrip().startswith(r+':')), None)
    if not role(lines[0]):
        begins = any(not a and b.startswith(('Human:', 'Assistant:')) for a, b in zip(lines, lines[1:]))
        return REFUSED if begins or not text.strip() else hh([('Human', text.strip())])
    turns = []
    for l in lines:
        if (r := role(l)): turns.append([r, l.lstrip().removeprefix(r+':')])
        else: turns[-1][1] += '\n'+l
    turns = [(r, t.strip()) for r, t in turns]
    if turns[-1] == ('Assistant', ''): turns.pop()
    return hh(turns) if turns and turns[-1][0] == 'Human' and turns[-1][1] else REFUSED


parts = ['Human:', 'Assistant:', ' Human:', '\tAssistant: ', 'Hi', 'What is 2+2?', '\n', '\n', '\n\n', ' ', '\r\n', '\u2028', '\f', '\0', '🙂', 'human:', 'Human', '<b>', '{x}', '\x85', 'System:', 'Human: hello', 'Assistant: yes', '\ud83d', '\ufeff']
def prompt(rng, folder):
    text = ''.join(rng.choice(parts) for _ in range(rng.randint(0, 14))) if rng.random() < .9 else rng.choice([*junk, *prompts, '\n'*50_000+'x', 'Human:'+'\n'*50_000+'x'])
    want = read_prompt(text)
    return Case(f'mk_prompt({text!r:.300})', lambda: mk_prompt(text), want, plain=want is not REFUSED)


def vote(rng, folder):
    "Votes on a file that holds something already; afterwards that is still there, and each vote that was taken once"
    f = folder/'votes.jsonl'
    old = dict(prompt='p', answers={'a': 'x', 'b': 'y'}, order=['a', 'b'], vote='a', time='')
    line = json.dumps(old).encode()
    before = rng.choice([b'', b'', line+b'\n', line, line+b'\n'+line[:30], b'no json\n', b'no json', line+b'\n\xff\xfe\n', line+b'\r\n', b'[]', b'\n\n'])
    if before: f.write_bytes(before)
    d = Desk(live=False, votes=f).load()
    done, want, refused = [], [], 0
    for _ in range(rng.randint(1, 3)):
        models = rng.sample(names, rng.randint(1, 4))
        c = d.stored(d.ask(p := rng.choice(prompts), models))
        for choice in rng.choice([[rng.choice([*models, 'tie', 'bad'])], [rng.choice([*names, *junk])], ['tie', 'bad']]):
            asked = c['id'] if rng.random() < .9 else rng.choice(['', 'x', *junk])
            ok = asked == c['id'] and len(models) > 1 and type(choice) is str and choice in (*models, 'tie', 'bad') and c['id'] not in done
            if ok:
                done.append(c['id'])
                best = {k: max([r for r in files[k] if r['prompt'] == p][:1], key=lambda r: r['reward'])['response'] for k in models}
                want.append((p, choice, best))
            try: d.vote(asked, choice)
            except ValueError as e:
                if ok: return Case(f'{before!r} vote({asked!r:.50}, {choice!r:.50})', lambda e=e: (_ for _ in ()).throw(e), None, plain=True)
                refused += 1
            else:
                if not ok: return Case(f'vote({asked!r:.50}, {choice!r:.50}) on {models}', lambda: 'accepted', REFUSED)
    half = before.endswith(line[:30]) and not before.endswith(line)
    kept = before[:-30] if half and want else before
    def got():
        data = f.read_bytes() if f.exists() else b''
        new = [json.loads(l) for l in data[len(kept):].split(b'\n') if l]
        return data.startswith(kept) and [(r['prompt'], r['vote'], r['answers']) for r in new] == want and (not want or data.endswith(b'\n'))
    n_old = sum(o.strip(b'\r') == line for o in before.split(b'\n'))
    def right(ok):
        if not ok: return False
        if not f.exists(): return True
        return len(read_votes(f)) == n_old+len(want) and d.summary()['votes'] == n_old+len(want)
    return Case(f'votes after {before!r}: {want!r:.200}, {refused} refused', got, right, plain=True)


def export(rng, folder):
    f = folder/'votes.jsonl'
    d = Desk(live=False, votes=f).load()
    there = rng.choice([None, None, b'', b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n', b'hello\n', b'[1]\n'])
    if there is not None: f.with_name('preferences.jsonl').write_bytes(there)
    want = []
    for p in rng.sample(prompts, rng.randint(0, 4)):
        c, choice = d.stored(d.ask(p, ['reference', 'ppo'])), rng.choice(['reference', 'ppo', 'tie', 'bad'])
        d.vote(c['id'], choice)
        a = {k: next(r['response'] for r in files[k] if r['prompt'] == p) for k in ('reference', 'ppo')}
        if choice in a and a['reference'].strip() != a['ppo'].strip(): want.append(dict(prompt=p, chosen=a[choice], rejected=a['ppo' if choice == 'reference' else 'reference']))
    if not want or there: want = REFUSED
    def got():
        try: return [json.loads(l) for l in d.export_votes().read_text(encoding='utf-8').split('\n') if l]
        finally: assert not there or f.with_name('preferences.jsonl').read_bytes() == there
    return Case(f'export beside {there!r}: {want!r:.200}', got, want, plain=want is not REFUSED)


def limit(rng, folder):
    "The filters of Explore"
    texts = {'': None, ' ': None, '0': 0., '-0.5': -.5, '0,5': .5, '−1': -1., '+2': 2., '1e1': 10., '.5': .5, '3.': 3., '12': 12.,
             'nan': REFUSED, 'inf': REFUSED, '1,000': REFUSED, '1_0': REFUSED, 'many': REFUSED, '1 2': REFUSED, '0x1': REFUSED, '--1': REFUSED, '٣': REFUSED, '1e': REFUSED, ',': REFUSED, '<b>': REFUSED}
    typed = {k: [rng.choice(list(texts)[:11] if rng.random() < .9 else list(texts)) for _ in 'ab'] for k in rng.sample(['gap', 'kl', 'n_tokens'], rng.randint(0, 2))}
    model, text, sort = rng.choice(names), rng.choice(['', '', 'e', 'THE', 'zzz', '<', 'É']), rng.choice(['as stored', 'largest gain', 'highest KL', 'longest'])
    bounds = {k: [texts[s] for s in v] for k, v in typed.items()}
    if any(b is REFUSED for v in bounds.values() for b in v): want = REFUSED
    else:
        ref, rows, seen = {}, [], set()
        for r in files['reference']: ref.setdefault(r['prompt'], r['reward'])
        for r in files[model]:
            if r['prompt'] in seen: continue
            seen.add(r['prompt'])
            value = dict(gap=r['reward']-ref[r['prompt']], kl=r['kl'], n_tokens=r['n_tokens'])
            low = any(b[0] is not None and value[k] < b[0] for k, b in bounds.items())
            high = any(b[1] is not None and value[k] > b[1] for k, b in bounds.items())
            if not low and not high and text.lower() in (r['prompt']+r['response']).lower(): rows.append((value, r['prompt']))
        key = {'as stored': None, 'largest gain': lambda o: -o[0]['gap'], 'highest KL': lambda o: -o[0]['kl'], 'longest': lambda o: -o[0]['n_tokens']}[sort]
        want = [p for _, p in (sorted(rows, key=key) if key else rows)]
    got = lambda: find(desk().records, model, sort, None, text, **{k: [_limit(s) for s in v] for k, v in typed.items()})
    return Case(f'find({model}, {sort}, {text!r}, {typed})', got, want, plain=want is not REFUSED)


@functools.cache
def page():
    a = launch(inline=False)
    atexit.register(a.close, verbose=False)
    return a


def ask_page(path, o, host='localhost', **headers):
    "(status, body) of a request as it stands"
    c = http.client.HTTPConnection('127.0.0.1', page().server_port, timeout=60)
    body = json.dumps(o).encode() if o is not None else b''
    c.putrequest('POST' if o is not None else 'GET', path, skip_host=True)
    for k, v in {'Host': host, 'Content-Type': 'application/json', 'Content-Length': str(len(body)), **headers}.items(): c.putheader(k, v)
    c.endheaders(body)
    r = c.getresponse()
    out = r.status, r.read().decode()
    c.close()
    if out[0] in (403, 404, 413, 422, 400): raise ValueError(out[1])
    if out[0] != 200: raise RuntimeError(f'{out}')
    return out[1]


def web(rng, folder):
    "A question by the endpoint that stays as it is, with any values, names and hosts"
    kw, want = settings(rng)
    p = rng.choice(prompts) if rng.random() < .9 else rng.choice(junk)
    data = [p, *(kw[k] for k in ('models', 'temperature', 'max_new_tokens', 'seed', 'n'))]
    host, good = rng.choice([('localhost', 1), ('localhost:1', 1), ('127.0.0.1', 1), ('[::1]:80', 1), ('LOCALHOST.', 1), ('evil.example', 0), ('localhost.evil.example', 0), ('127.0.0.1.evil.example:7860', 0)][:8 if rng.random() < .3 else 5])
    name, known = rng.choice([('compare', 1)]*9+[('on_compare', 0), ('on_export', 0), ('on_make', 0), ('lambda', 0), ('f', 0)])
    n_bad = rng.random() < .05
    if n_bad: data = data[:rng.randint(0, 5)]
    try: json.dumps(data, allow_nan=False)
    except ValueError: return web(rng, folder)   # no JSON: draw again
    if not good or not known or n_bad or p not in prompts: want = REFUSED
    elif want is not REFUSED:
        best = {k: max([r for r in files[k] if r['prompt'] == p][:want['n']], key=lambda r: r['reward'])['response'] for k in want['models']}
        # samples say what they were made with, which those that come with the package do not
        want = dict(want, prompt=p, answers=best, temperature=None, max_new_tokens=None, seed=None)
    def got():
        event_id = json.loads(ask_page(f'/gradio_api/call/{name}', dict(data=data), host))['event_id']
        event, said = '', ''
        for l in ask_page(f'/gradio_api/call/{name}/{event_id}', None, host).split('\n'):
            key, _, v = l.partition(': ')
            if key == 'event': event = v
            elif key == 'data' and event == 'error': said = v
            elif key == 'data' and event == 'complete': c = json.loads(v)[0]
        if event == 'error':
            if said in ('null', '') or not json.loads(said).get('error'): raise RuntimeError(f'an error without a word: {said!r}')
            raise ValueError(said)
        return {**{k: c[k] for k in (*rules, 'prompt')}, 'answers': {k: a['response'] for k, a in c['answers'].items()}}
    return Case(f'POST {name} {data!r:.300} Host {host}', got, REFUSED if want is REFUSED else lambda g: same(g, want), plain=want is not REFUSED)


def one(rng, folder):
    return rng.choice([question]*4+[prompt]*4+[vote]*2+[export, limit, limit, web])(rng, folder)
