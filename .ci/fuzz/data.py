"""Files of preference pairs: JSON lines, JSON, CSV, TSV, gzipped or not, alone or in a folder, with odd texts, odd names and damages.

The independent reading is written from the documented contract of nbs/12_data.ipynb ("One loader") with Python's json and csv:
what is wrong with a row is counted, what is wrong with a file is refused, every other row arrives as it was written."""
import csv, gzip, io, json

from fuzz import REFUSED, Case

odd = ['', ' ', '\u2028', '\u2029', '\x85', '\x0b', '\x0c', '\x1c', '\xa0', '\ufeff', '\u200b', '\x00', '\t', '\n', '\r\n', '\n\n', '"', '""', "'", ',', ';', '\\', '\\n', '|',
       '\U0001f642', 'é', 'e\u0301', '中文', 'עברית', '</s>', '<|endoftext|>', 'None', 'NA', 'null', 'nan', 'true', '1e5', '-', '=1+1', '{"a": 1}', '[1]', 'Human:', 'Assistant:', '#', '%s', '$x$', '<b>']
words = 'what is the colour of a thing when it rains and who says so'.split()
names = ['d', 'p[1]', 'a b', '🙂', 'ü', '-x', '.x', 'x*', 'what?', 'a{b}', "it's", 'x;y', 'a.b', '100%', '#1']

def text(rng, blank=False):
    "A text that is not blank, holds no turn marker and begins and ends as it likes"
    parts = [rng.choice(words) if rng.random() < .7 else rng.choice(odd) for _ in range(rng.randint(1, 8))]
    s = rng.choice((' ', '', ' ')).join(parts)
    s = s.replace('Human:', 'Human;') if '\n\nHuman:' in s or s.startswith('Human:') else s
    s = s.replace('Assistant:', 'Assistant;') if '\n\nAssistant:' in s or s.startswith('Assistant:') or '\nAssistant:' in s else s
    return s if s.strip() else rng.choice(words)

def pair(rng, i):
    "(row, what it means, or a reason why it means nothing)"
    q, a, b = f'{rng.choice(("", "", " ", "  "))}{i} {text(rng)}', text(rng), f'{text(rng)} {i}'
    if a.strip() == b.strip(): a += '!'
    return dict(prompt=q, chosen=a, rejected=b), (q, a, b)

def shaped(rng, row):
    "The same pair in another of the shapes that JSON can hold, and what it means"
    q, a, b = row['prompt'], row['chosen'], row['rejected']
    U, A, S = (lambda s, r=r: dict(role=r, content=s) for r in ('user', 'assistant', 'system'))
    front = rng.choice(([], [S('')], [S(' ')]))
    want, text = (q, a, b), (q, a.removeprefix(' '), b.removeprefix(' '))   # one space in front of an answer that is a string is the separator
    return rng.choice(((row, text), (row, text), *((o, want) for o in (dict(prompt=[*front, U(q)], chosen=[A(a)], rejected=[A(b)]), dict(prompt=None, chosen=[*front, U(q), A(a)], rejected=[U(q), A(b)]),
        dict(chosen=[U(q), A(a)], rejected=[*front, U(q), A(b)]), dict(prompt=q, chosen=[*front, U(q), A(a)], rejected=[U(q), A(b)]),
        dict(prompt=f' {q}\n', chosen=[U(q), A(a)], rejected=[U(q), A(b)]),
        dict(chosen=f'\n\nHuman: {q}\n\nAssistant: {a}', rejected=f'\n\nHuman: {q}\n\nAssistant: {b}'))),
        (dict(prompt=f'\n\nHuman: {q}\n\nAssistant:', chosen=a, rejected=b), text)))

def other(rng, form, q, a, b):
    "The same pair in a shape that a whole file has"
    U, A, F = lambda s: dict(role='user', content=s), lambda s: dict(role='assistant', content=s), lambda w, s: {'from': w, 'value': s}
    parts = lambda s: [dict(type='text', text=s[:3]), dict(type='text', text=s[3:])]
    low, high = sorted(rng.sample(range(-9, 9), 2))
    ranked = [(a, high), (b, low)] + [(' never', (low + high) / 2)] * (rng.random() < .5)
    rng.shuffle(ranked)
    return {
        'alpaca_pairs': lambda: dict(instruction=q, chosen=a, rejected=b, **rng.choice((dict(input=''), dict(input=None, system=' '), {}))),
        'ranking': lambda: dict(instruction=q, input='', output=[a, b]),
        'orca': lambda: dict(question=q, chosen=a, rejected=b, **rng.choice((dict(system=''), dict(system=None), {}))),
        'sharegpt_pairs': lambda: dict(conversations=[F('human', q)], chosen=F('gpt', a), rejected=F('gpt', b)),
        'openai_pairs': lambda: dict(input=dict(messages=[U(q)], tools=[]), preferred_output=[A(a)], non_preferred_output=[A(b)]),
        'shp': lambda: rng.choice((dict(history=q, human_ref_A=a, human_ref_B=b, labels=1), dict(history=q, human_ref_A=b, human_ref_B=a, labels=0))),
        'helpsteer3': lambda: rng.choice((dict(context=[U(q)], response1=a, response2=b, overall_preference=-2), dict(context=[U(q)], response1=b, response2=a, overall_preference=1))),
        'ultrafeedback': lambda: dict(instruction=q, completions=[dict(response=r, overall_score=s, model='m') for r, s in ranked]),
        'scored': lambda: dict(prompt=[U(q)], responses=[r for r, _ in ranked], scores=[s for _, s in ranked]),
        'parts': lambda: dict(prompt=[U(parts(q))], chosen=[A(parts(a))], rejected=[A(b)])}[form]()

forms = 'alpaca_pairs', 'ranking', 'orca', 'sharegpt_pairs', 'openai_pairs', 'shp', 'helpsteer3', 'ultrafeedback', 'scored', 'parts'
as_messages = 'sharegpt_pairs', 'openai_pairs', 'parts'        # an answer is taken as it is: no blank in front of it separates anything

def extra(rng): return rng.choice((None, 1, 1.5, 'n/a', '', [], [1, 'a'], {}, dict(a=[dict(b=1)]), True, 10**30, 'None', float('nan'), '\ud83d'))

def bad_row(rng, row):
    "A row that is JSON and no pair"
    q, a, b = row['prompt'], row['chosen'], row['rejected']
    return rng.choice((dict(row, chosen=None), dict(row, rejected=3), dict(prompt=q, chosen=a), dict(row, chosen=' '), dict(row, rejected=a), [q, a, b], q, 7, None, {},
        dict(row, chosen=[{'from': 'gpt', 'value': a}]), dict(row, chosen=[dict(role='gpt', content=a)]), dict(row, chosen=[dict(role='assistant', content=None)]), dict(row, prompt=5),
        dict(row, chosen=dict(role='assistant', content=a)), dict(row, chosen=[dict(role='assistant', content=[dict(type='image', text=a)])]), dict(row, chosen=a + '\ud83d'),
        dict(prompt=[dict(role='user', content=q), dict(role='tool', content='x')], chosen=a, rejected=b), dict(row, prompt=''), dict(chosen=a, rejected=b),
        dict(prompt='other', chosen=[dict(role='user', content=q), dict(role='assistant', content=a)], rejected=[dict(role='user', content=q), dict(role='assistant', content=b)])))

def meaning(p):
    "What one of our pairs says: question and answers"
    q = p['prompt'].removeprefix('\n\nHuman: ').removesuffix('\n\nAssistant:')
    return q, p['chosen'].removeprefix(' '), p['rejected'].removeprefix(' ')

def read_json_lines(data):
    "The contract, once more: values of the lines, or REFUSED"
    try: s = data.decode('utf-8')
    except UnicodeDecodeError: return REFUSED
    out = []
    for line in s.removeprefix('\ufeff').split('\n'):
        if not line.strip(' \t\r'): continue
        try: out.append(json.loads(line))
        except ValueError: return REFUSED
    return out

def json_file(rng, rows, kind):
    ascii_ = rng.random() < .5
    dump = lambda o: json.dumps(o, ensure_ascii=ascii_ or '\\ud83d' in json.dumps(o))
    if kind == 'json' and rng.random() < .6: return json.dumps(rows, indent=rng.choice((None, 1))).encode()
    end = rng.choice(('\n', '\r\n'))
    lines = []
    for r in rows: lines += [''] * (rng.random() < .1) + [dump(r)]
    return (rng.choice(('', '', '\ufeff')) + end.join(lines) + rng.choice(('', end))).encode()

def csv_file(rng, rows, sep):
    out = io.StringIO(newline='')
    w = csv.writer(out, delimiter=sep, lineterminator=rng.choice(('\n', '\r\n')), quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
    w.writerows(rows)
    return (rng.choice(('', '\ufeff')) + out.getvalue()).encode()

def one(rng, folder):
    kind = rng.choice(('jsonl', 'jsonl', 'ndjson', 'json', 'csv', 'tsv'))
    n = rng.randint(1, 12)
    pairs, rows, want = [pair(rng, i) for i in range(n)], [], []
    if kind in ('csv', 'tsv'):
        head = ['prompt', 'chosen', 'rejected'] + ['note'] * (rng.random() < .4)
        rng.shuffle(head)
        rows = [head]
        for r, m in pairs:
            cells = [dict(r, note=str(extra(rng)).replace('\ud83d', '?'))[k] for k in head]
            if rng.random() < .1: cells = rng.choice((cells + ['x'], cells[:-1], cells + ['']))
            elif rng.random() < .1: cells[head.index('chosen')] = ' '
            else: want.append((m[0], m[1].removeprefix(' '), m[2].removeprefix(' ')))
            rows.append(cells)
        data = csv_file(rng, rows, ',' if kind == 'csv' else '\t')
    elif rng.random() < .4:
        form = rng.choice(forms)
        for _, (q, a, b) in pairs:
            if rng.random() < .1: rows.append(rng.choice((7, None, [q], other(rng, form, q, a, a)))); continue
            rows.append({**other(rng, form, q, a, b), **{k: extra(rng) for k in ('note', 'id') if rng.random() < .3}})
            want.append((q, a, b) if form in as_messages else (q, a.removeprefix(' '), b.removeprefix(' ')))
        data = json_file(rng, rows, kind)
    else:
        for r, m in pairs:
            if rng.random() < .15: rows.append(bad_row(rng, r)); continue
            r, m = shaped(rng, r)
            rows.append({**r, **{k: extra(rng) for k in ('note', 'score', 'id') if rng.random() < .3}}); want.append(m)
        data = json_file(rng, rows, kind)
        if rng.random() < .08 and kind != 'json':            # a key that stands twice spoils its row, where it is needed
            data = data.rstrip(b'\r\n') + b'\n{"prompt":"p","chosen":"a","chosen":"b","rejected":"c"}\n{"prompt":"twice","x":1,"x":2,"chosen":"a","rejected":"c"}\n'
            rows += [{}, {}]; want.append(('twice', 'a', 'c'))
    total = len(rows) - (kind in ('csv', 'tsv'))
    damage = rng.choice((None,) * 12 + ('cut', 'byte', 'utf16', 'empty', 'gzip', 'quote', 'insert'))
    want = want if want else REFUSED
    zipped = rng.random() < .25
    if damage:
        if damage == 'cut': data = data[:rng.randrange(len(data))]
        if damage == 'byte': i = rng.randrange(len(data)); data = data[:i] + bytes([rng.randrange(128, 256)]) + data[i:]
        if damage == 'insert': i = rng.randrange(len(data)); data = data[:i] + rng.choice((b'{', b'}', b'"', b',', b'\n', b'\x00', b'\r', b'[', b' ')) + data[i+1:]
        if damage == 'utf16': data = data.decode().encode('utf-16')
        if damage == 'empty': data = rng.choice((b'', b'\n\n', b'\xef\xbb\xbf', b' \r\n'))
        if damage == 'quote': data = data.replace(b'"', b'', 1)
    raw = gzip.compress(data) if zipped else data
    if damage == 'gzip': zipped = True; raw = rng.choice((raw if not zipped else data, gzip.compress(data)[:-rng.randint(1, 12)], gzip.compress(data)[:5] + b'xxxx'))
    name = rng.choice(names) + '.' + (kind if rng.random() < .8 else kind.upper()) + '.gz' * zipped
    place = folder/rng.choice(names)
    place.mkdir()
    (place/name).write_bytes(raw)
    as_folder = rng.random() < .3 and not name.startswith('.')
    from rlhf_nb.data import load_preferences
    def got():
        p = load_preferences(str(place if as_folder else place/name))
        kept, read = len(p), p.report.read
        assert p.report.kept == kept and read == kept + sum(v['n'] for k, v in p.report.counts.items() if k in p.report.dropped)
        assert all(o['source'].startswith(str(place/name)) for o in p.pairs)
        return [meaning(o) for o in p.pairs], read
    what = f'{name}{" in its folder" if as_folder else ""}, {damage or "undamaged"}: {data[:500]!r}'
    if not damage: return Case(what, got, want if want is REFUSED else (want, total), plain=want is not REFUSED)
    return Case(what, got, lambda o: reread(o, data, raw, zipped, kind))

def reread(o, data, raw, zipped, kind):
    "Is `o` what a damaged file still says? Read once more, strictly, from the bytes"
    if zipped:
        try: data = gzip.decompress(raw)
        except (OSError, EOFError, Exception): return False
    try: s = data.decode('utf-8').removeprefix('\ufeff')
    except UnicodeDecodeError: return False
    if kind in ('csv', 'tsv'):
        try: rows = [r for r in csv.reader(io.StringIO(s, newline=''), delimiter=',' if kind == 'csv' else '\t', strict=True) if len(r) > 1 or ''.join(r).strip()]
        except csv.Error: return False
        head, rows = rows[0], rows[1:]
        values = [dict(zip(head, r)) if len(r) == len(head) else None for r in rows]
    else:
        values = read_json_lines(data)
        if values is REFUSED:
            try: values = json.loads(s)
            except ValueError: return False
            values = values if isinstance(values, list) else [values]
        elif len(values) == 1 and isinstance(values[0], list): values = values[0]
    texts, read = o
    at = 0
    for q, a, b in texts:                                     # each pair stands in a row of its own, in the file's order
        while at < len(values) and not says(values[at], q, a, b): at += 1
        if at == len(values): return False
        at += 1
    return read == len(values)

def strings(v):
    "All texts in a value; those of a message's parts also put together"
    if isinstance(v, str): yield v
    elif isinstance(v, dict): yield from (s for o in v.values() for s in strings(o))
    elif isinstance(v, list):
        if all(isinstance(o, dict) and isinstance(o.get('text'), str) for o in v): yield ''.join(o['text'] for o in v)
        yield from (s for o in v for s in strings(o))

def says(v, q, a, b):
    "Do the texts stand in this row, under their names?"
    if not isinstance(v, dict): return False
    def last(x): return x if isinstance(x, str) else str(x[-1].get('content')) if isinstance(x, list) and x and isinstance(x[-1], dict) else ''
    def all_(x): return x if isinstance(x, str) else ' '.join(str(m.get('content')) for m in x if isinstance(m, dict)) if isinstance(x, list) else ''
    if not v.get('chosen') or not isinstance(v['chosen'], str) or not v.get('prompt'):
        texts = list(strings(v))
        if any(q in o for o in texts) and all(any(o.endswith(x) for o in texts) for x in (a, b)): return True
    return last(v.get('chosen')).endswith(a) and last(v.get('rejected')).endswith(b) and (q in all_(v.get('prompt')) or q in all_(v.get('chosen')))
