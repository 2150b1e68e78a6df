"""Files for `rlhf_nb generate --prompts`: bare texts, objects and messages in JSON, CSV and TSV, lines of text; odd texts, names and damages.

The independent reading: every row is one prompt, a person's turn unless the file says otherwise; one bad row refuses the file."""
import gzip

from fuzz import REFUSED, Case
from fuzz.data import csv_file, extra, json_file, names, text

def whole(q): return f'\n\nHuman: {q}\n\nAssistant:'

def prompt(rng, kind):
    "(what stands in the file, the prompt that it means)"
    q = text(rng)
    U, A, S = (lambda s, r=r: dict(role=r, content=s) for r in ('user', 'assistant', 'system'))
    plain = [(q, whole(q)), (whole(q), whole(q)), (f'Human: {q}', whole(q)), (whole(q) + ' ', whole(q)), (whole(q) + ' So', whole(q) + ' So'),
             (f'Be brief.\n\nHuman: {q}', 'Be brief.' + whole(q)), (f'\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: {q}', '\n\nHuman: Hi\n\nAssistant: Ho' + whole(q))]
    if kind in ('csv', 'tsv', 'txt'): return rng.choice(plain)
    return rng.choice(plain + [([U(q)], whole(q)), ([S(''), U(q)], whole(q)), ([S('Be brief.'), U(q)], 'Be brief.' + whole(q)), ([U('Hi'), A('Ho'), U(q)], '\n\nHuman: Hi\n\nAssistant: Ho' + whole(q)), ([U(q), A('So')], whole(q) + ' So')])

def bad(rng, q): return rng.choice((dict(question=q), dict(prompt=None), dict(prompt=''), dict(prompt=' \n'), dict(prompt=3), dict(prompt=[q]), dict(prompt=[]), 7, None, '', ' ', True,
    dict(prompt=[{'from': 'human', 'value': q}]), dict(prompt=[dict(role='tool', content=q)]), dict(prompt=[dict(role='user', content=None)]), dict(prompt=q + '\ud83d'), {}))

def one(rng, folder):
    kind = rng.choice(('jsonl', 'json', 'ndjson', 'csv', 'tsv', 'txt', 'txt', 'md', ''))
    given = [prompt(rng, kind) for _ in range(rng.randint(1, 9))]
    want, spoilt = [w for _, w in given], rng.random() < .12
    if kind in ('csv', 'tsv'):
        rows = [['id', 'prompt', 'note']] + [[str(i), p, str(extra(rng)).replace('\ud83d', '?')] for i, (p, _) in enumerate(given)]
        if spoilt: rows.insert(rng.randint(1, len(rows)), rng.choice((['x', ' ', ''], ['x'], ['1', 'p', 'n', 'more'])))
        data = csv_file(rng, rows, ',' if kind == 'csv' else '\t')
        if spoilt and ['x'] in rows: want = REFUSED
    elif kind in ('jsonl', 'json', 'ndjson'):
        rows = [{'prompt': p, **{k: extra(rng) for k in ('note', 'id') if rng.random() < .3}} if not isinstance(p, str) or rng.random() < .6 else p for p, _ in given]
        if spoilt: rows.insert(rng.randint(0, len(rows)), bad(rng, text(rng)))
        data = json_file(rng, rows, kind)
    else:
        ends = rng.choice(('\n', '\r\n'))
        lines = [q.replace('\r\n', ' ').replace('\n', ' ') for q in (text(rng) for _ in given)]
        lines = [q if q.strip() and not q.startswith(('Human:', 'Assistant:')) else 'why' for q in lines]
        lines[0] = lines[0].lstrip('\ufeff') or 'why'
        want, spoilt = [whole(q) for q in lines], False
        data = (rng.choice(('', '\ufeff')) + ends.join(o for q in lines for o in ([''] * (rng.random() < .1) + [q])) + rng.choice(('', ends))).encode()
    if spoilt: want = REFUSED
    damage = rng.choice((None,) * 9 + ('byte', 'utf16', 'empty', 'cut gzip', 'folder'))
    zipped = damage == 'cut gzip' or rng.random() < .2
    if damage == 'byte': i = rng.randrange(len(data)); data = data[:i] + b'\xff' + data[i:]
    if damage == 'utf16': data = data.decode().encode('utf-16')
    if damage == 'empty': data = rng.choice((b'', b'\n \n', b'\xef\xbb\xbf\r\n'))
    raw = gzip.compress(data) if zipped else data
    if damage == 'cut gzip': raw = raw[:-rng.randint(1, 12)]
    if damage: want = REFUSED
    name = rng.choice(names) + f'.{kind}' * bool(kind) + '.gz' * zipped
    f = folder/name
    f.mkdir() if damage == 'folder' else f.write_bytes(raw)
    from rlhf_nb.formats import read_prompts
    return Case(f'{name}, {damage or ("a bad row" if spoilt else "undamaged")}: {data[:500]!r}', lambda: read_prompts(f), want, plain=want is not REFUSED)
