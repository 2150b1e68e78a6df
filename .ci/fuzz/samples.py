"""Folders of samples, whole and damaged, and what is read, counted, compared and written of them.

The independent reading is the input itself: the generator knows every record that it writes, so means, wins and ties are sums over plain
Python lists, and it knows which damage nobody can read. Reports are parsed by markdown-it: no element in them may come from a text or a name."""
import json, math, re, unicodedata
from itertools import combinations, product
from math import comb

from markdown_it import MarkdownIt

from fuzz import REFUSED, Case
from rlhf_nb.report import mk_report,read_runs
from rlhf_nb.run import read_samples
from rlhf_nb.stats import holm,mean_ci,paired_test,too_few,win_rate
from rlhf_nb.frontier import best_of_n
from rlhf_nb.evaluate import compare,comparison_table,summarise,summary_table
from rlhf_nb.records import file_source,samples_md,samples_source,split_source,write_samples
from rlhf_nb.failures import examples_md,failure_analysis,failures_md
from rlhf_nb.judge import judge_run

names = ['ppo', 'grpo', 'dpo', 'my model', 'a.b', '<img src=evil onerror=f()>', 'a|b', '`x`', '``', '**evil**', '[evil](http:evil)', '![evil](http:evil)', '$x$', '日本語', '\x1b[31mevil', '\u202eevil', '_evil_',
         'two\nlines', '# evil', '~~evil~~', 'x_samples', '{0}', '%s', '&lt;', '\\', 'a\\|b', '|', '---', 'www.evil.example', 'evil@x.example', "it's", 'a, b', '<b>|`<i>']
bits = ['yes', 'Lima is the capital.', '\n', '\n\n', ' ', '<b>evil</b>', '<img src=http://evil.example/a.png>', '![evil](http://evil.example)', '[evil](http://evil.example)', '<http://evil.example>', '# evil', '```', '````', '~~~',
        '`', '| evil | b |\n|---|---|\n', '> evil', '- evil', '1. evil', '**evil**', '    evil', '\t', '===', '---', '&lt;', '\\', '$evil$', '<!--', '-->', '<script>evil()</script>', 'Human: ', 'Assistant:', 'I am sorry, I can not help.',
        'Yes, you are right!', '日本語', '🙂', '\x1b[31m', '\x07', '\x00', '\r', '\x85', '\u2028', '\u202e', '\u200b', '\ufeff', '[evil]: http://evil.example', '</details>', 'a'*40]
acts = {c for c in map(chr, range(0x3000)) if unicodedata.category(c) == 'Cc' and c not in '\n\t'} | set('\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\ufeff')


def text(rng): return ''.join(rng.choice(bits) for _ in range(rng.randint(0, 6)))
def tokens(md): return [t for o in MarkdownIt('commonmark', {'html': True}).enable('table').parse(md) for t in (o, *(o.children or ()))]

def dead(md, links=()):
    "Nothing in a report that acts; it says what does"
    # what is folded is HTML of ours; no tag is left in a title
    md = re.sub(r'^</?details>(<summary>[^<>\n]*</summary>)?$', '', md, flags=re.M)
    for t in tokens(md):
        if t.type in ('html_inline', 'html_block', 'image') or t.type == 'link_open' and t.attrs['href'] not in links: return f'{t.type} {t.content[:60]!r} {t.attrs}'
        if t.type == 'inline' and any(o.type in ('em_open', 'strong_open') and 'evil' in n.content for o, n in zip(t.children, t.children[1:]) if n.type == 'text'): return f'emphasis in {t.content[:60]!r}'
    ts = tokens(md)
    if (h := next((b.content for a, b in zip(ts, ts[1:]) if a.type == 'heading_open' and 'evil' in b.content and '`' not in b.content and '&#' not in b.content), None)): return f'heading {h!r}'
    if (c := acts & set(md)): return f'characters {c!r}'
    return ''

def near(a, b): return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


class World:
    "Samples as they should be, and in numbers"
    def __init__(self, rng):
        few = rng.random() < .4
        self.models = ['reference', *rng.sample(names, rng.randint(0 if few else 1, 3))]
        self.prompts = [f'\n\nHuman: {i} {text(rng)}\n\nAssistant:' for i in range(rng.randint(1, 3) if few else rng.randint(4, 12))]
        self.n = rng.choice((1, 1, 1, 2, 3))
        gold = rng.random() < .5
        self.records = {}
        for m in self.models:
            rs = self.records[m] = []
            for p, i in product(self.prompts, range(self.n)):
                r = dict(prompt=p, response=f' {m[:1]}{i}{text(rng)}', model=m, reward=rng.randint(-3, 3)*rng.choice((1, .25, 1e6)), kl=rng.randint(0, 40)/8, n_tokens=rng.randint(0, 9), finished=rng.random() < .8)
                if m != 'reference' and rng.random() < .15: r.update({k: self.records['reference'][len(rs)][k] for k in ('response', 'reward')})      # a twin
                if rng.random() < .3: r['kl_per_token'] = r['kl']/max(1, r['n_tokens'])
                if gold: r['gold_reward'] = r['reward']/2 if rng.random() < .7 else 0.
                rs.append(r)
        seen = {}                           # the same text has one score, whoever wrote it
        for rs in self.records.values():
            for r in rs:
                o = seen.setdefault((r['prompt'], r['response']), r)
                r.update({k: o[k] for k in ('reward', 'gold_reward') if k in o})
        self.key = 'gold_reward' if gold else 'reward'

    def write(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for m, rs in self.records.items(): (folder/f'{m}_samples.json').write_text(json.dumps(rs), encoding='utf-8')

    def count(self, m, key=None):
        "(wins, ties, losses) against the reference, and the win rate"
        x, y = ([r[key or self.key] for r in self.records[k]] for k in (m, 'reference'))
        w, l = sum(a > b for a, b in zip(x, y)), sum(a < b for a, b in zip(x, y))
        return w, len(x)-w-l, l, (w+(len(x)-w-l)/2)/len(x)

    def mean(self, m, key): return sum(float(r[key]) for r in self.records[m])/len(self.records[m])


def whole(rng, folder):
    "An undamaged folder: what each command makes of it"
    w, at = World(rng), folder/rng.choice(('', 'output_samples', 'run ü/output_samples'))
    w.write(at)
    run = at.parent if at.name == 'output_samples' else at
    what = rng.choice(('numbers', 'numbers', 'markdown', 'judge', 'report', 'failures', 'source'))
    case = lambda got, want: Case(f'{what} of {w.models}, {len(w.prompts)} prompts x {w.n}', got, want, plain=True)
    n = len(w.prompts)

    if what == 'numbers':
        def right(got):
            s, c, table = got
            for m in w.models:
                if any(not near(s[m][k]['mean'], w.mean(m, k)) or s[m][k]['n'] != n for k in ('reward', 'kl', 'n_tokens', 'finished', w.key)): return False
                if not near(s[m]['kl_per_token']['mean'], sum(r['kl']/max(1, r['n_tokens']) for r in w.records[m])/len(w.records[m])): return False
                if m == 'reference': continue
                o = s[m]['win_rate']
                if (o['wins'], o['ties'], o['losses']) != w.count(m)[:3] or not near(o['rate'], w.count(m)[3]) or n < 6 and o.verdict in ('better', 'worse'): return False
            for r in c:
                if not near(r['mean'], w.mean(r['a'], r['metric'])-w.mean(r['b'], r['metric'])) or n < 6 and r['p_holm'] <= .05: return False
            cells = [t.content for t in tokens(summary_table(s)) if t.type == 'inline']
            plain = [''.join(o.content for o in t.children) for t in tokens(summary_table(s)) if t.type == 'inline']
            wide = len(cells)//(len(w.models)+1)
            shown = [plain[wide*(i+1)] for i in range(len(w.models))]
            if any(not acts & set(m) and s.strip() != m.replace('\n', '↵').strip() for s, m in zip(shown, got[0])): return False
            return not dead(table) and len(c) == len(w.models)*(len(w.models)-1)//2*(4 if w.key == 'gold_reward' else 3)
        def numbers():
            recs = read_samples(run)
            s, c = summarise(recs), compare(recs)
            return s, c, summary_table(s)+'\n\n'+comparison_table(c)
        return case(numbers, right)

    if what == 'markdown':
        def right(md):
            texts = [t for p in w.prompts for t in (p, *(next(r['response'] for r in w.records[m] if r['prompt'] == p) for m in w.models))]
            blocks = [t.content for t in tokens(md) if t.type == 'fence']
            same = all(acts & set(t) or b == t.strip()+'\n' for t, b in zip(texts, blocks))
            return not dead(md) and len(blocks) == len(texts) and same and all(t.content == 'Samples' or t.content.isdigit() for o, t in zip(tokens(md), tokens(md)[1:]) if o.type == 'heading_open')
        def markdown():
            recs = read_samples(run)
            return samples_md({k: recs[k] for k in w.models})
        return case(markdown, right)

    if what == 'judge':
        keys = ['gold', 'reward'] if w.key == 'gold_reward' else ['reward']
        def right(got):
            rates, md = got
            if len(w.models) > 1 and list(rates) != keys: return False
            for j in rates:
                for m in w.models[1:]:
                    a, t, b, rate = w.count(m, dict(gold='gold_reward').get(j, j))
                    if (rates[j][m]['wins'], rates[j][m]['ties'], rates[j][m]['losses'], rates[j][m]['n']) != (a, t, b, n) or not near(rates[j][m]['rate'], rate): return False
            return not dead(md) and 'split of' not in md and 'unknown prompts' in md and (not too_few(n) or 'nothing can be concluded' in md)
        def judge():
            rates = judge_run(run, command=f'rlhf_nb judge --out {text(rng)}')
            return rates, (run/'results'/'WIN_RATES.md').read_text(encoding='utf-8')
        return Case(f'judge of {w.models}', judge, right, plain=len(w.models) > 1)

    if what == 'report':
        def right(md):
            if dead(md, ('DETAILS.md',)) or 'split.' in md.split('##')[0] or 'unknown prompts' not in md: return False
            if n < 6 and ('**better**' in md or '**worse**' in md or 'above' in md.split('\n\n')[1] or 'nothing can be concluded' not in md): return False
            return all(any(f"{w.mean(m, 'reward')+e:.2f} [" in md for e in (-1e-6, 0, 1e-6)) for m in w.models)      # halves may be rounded either way
        return case(lambda: mk_report(read_runs(run), f'rlhf_nb analyze --out {text(rng)}')[0], right)

    if what == 'failures':
        def right(got):
            d, md, ex = got
            row = {(r['model'], r['metric']): r['value'] for r in d['rows'] if r['set'] == text_set}
            for m in w.models:
                if not near(row[m, 'never_stops'], 1-w.mean(m, 'finished')): return False
                if not near(row[m, 'empty'], sum(not any(c.isalnum() or c == '_' for c in r['response']) for r in w.records[m])/len(w.records[m])): return False
            return not dead(md, ('examples.md', 'rates.csv')) and not dead(ex) and (n >= 6 or not any(r.get('p_holm', 1) < .05 for r in d['rows']))
        text_set = rng.choice(('test', 'prompts of <b>evil</b>|`.txt'))
        def failures():
            d = failure_analysis({text_set: read_samples(run)}, about=dict(command=text(rng), source=text(rng)))
            return d, failures_md(d), examples_md(d)
        return case(failures, right)

    # whose prompts: what is written beside them, and what is made of it after a change
    mine = folder/rng.choice(('mine.txt', 'my <b>evil<i> file.txt', 'p[1].jsonl'))
    mine.write_text('x', encoding='utf-8')
    src, name = rng.choice(((file_source(mine), f'prompts of {mine.name}'), (split_source('test', 'world'), 'test'), (None, 'unknown prompts')))
    change = rng.choice(('none', 'answers', 'prompts', 'order', 'gone', 'damaged'))
    if len(w.prompts) == 1 and change == 'order': change = 'none'
    def source():
        recs = {k: v for k, v in read_samples(run).items()}
        write_samples(at, recs, src)
        md = (at/'samples.md').read_text(encoding='utf-8')
        if change == 'answers': w.records[w.models[-1]][0]['response'] += '!'
        if change == 'prompts':
            for rs in w.records.values():
                for r in rs: r['prompt'] += '!'
        if change == 'order':
            for k, rs in w.records.items(): w.records[k] = [r for p in w.prompts[::-1] for r in rs if r['prompt'] == p]
        if change != 'none': w.write(at)
        if change == 'gone': (at/'samples.json').unlink()
        if change == 'damaged': (at/'samples.json').write_text(rng.choice(('{', 'null', '[]', '{"source": 3}', '"x"', '\ufeff{}')), encoding='utf-8')
        return samples_source(run, read_samples(run)), md
    def right(got):
        o, md = got
        want = name if change in ('none', 'answers') else 'unknown prompts'
        return o['name'] == want and o['split'] == ('test' if want == 'test' else None) and ('are not those that' in o['text']) == (change == 'answers') and not dead(o['md']) and not dead(md)
    return Case(f'source {src}, {change}, of {w.models}', source, right, plain=True)


def damaged(rng, folder):
    "One thing is wrong with one file: a refusal that names the file, unless the thing does not matter"
    w = World(rng)
    m = rng.choice(w.models)
    rs, i = w.records[m], rng.randrange(len(w.records[m]))
    f, r = folder/f'{m}_samples.json', rs[i]
    num = ('reward', 'kl', 'n_tokens')
    kinds = ['drop', 'type', 'nan', 'null', 'huge', 'tokens', 'optional', 'twice', 'swap', 'fewer', 'uneven', 'model', 'shape', 'empty', 'bytes', 'cut', 'deep', 'folder', 'half', 'unknown key', 'gold part', 'gold null', 'other file', 'bom']
    kind, want = rng.choice(kinds), REFUSED
    raw = None
    if kind == 'drop': del r[rng.choice(('prompt', 'response', 'model', 'reward', 'kl', 'n_tokens', 'finished'))]
    if kind == 'type':
        k = rng.choice(('prompt', 'response', 'model', 'finished', *num))
        r[k] = rng.choice([v for v in (3, 'x', True, [1], {'a': 1}, 1.5) if not ((k in num and type(v) in (int, float)) or k == 'finished' and v is True or k in ('prompt', 'response', 'model') and v == 'x')])
    if kind == 'nan': r[rng.choice(num)] = rng.choice((math.nan, math.inf, -math.inf))
    if kind == 'null': r[rng.choice(('prompt', 'response', 'model', 'finished', *num))] = None
    if kind == 'huge': r[rng.choice(('reward', 'kl'))] = rng.choice((10**400, 1e300, -1e200, 10**120))
    if kind == 'tokens': r['n_tokens'] = rng.choice((-1, 2.5, 1e300, -.5))
    if kind == 'optional': r[rng.choice(('gold_reward', 'kl_per_token', 'log_prob'))] = rng.choice(('x', [1], True, math.nan, math.inf))
    if kind == 'model': r['model'] = r['model']+'x'
    if kind == 'fewer':
        if len(w.models) == 1: return whole(rng, folder)
        del rs[-w.n:]
        if not rs: rs.append(dict(r, prompt='another'))
    if kind == 'uneven': rs.append(dict(rs[0], response='once more'))
    if kind == 'uneven' and len(w.prompts) == 1 and len(w.models) == 1: return whole(rng, folder)
    if kind == 'swap':
        if len(w.prompts) == 1: return whole(rng, folder)
        if len(w.models) == 1 and w.n == 1: rs[-1]['prompt'] = rs[0]['prompt']
        else: rs[0], rs[-1] = rs[-1], rs[0]
        if len(w.prompts) == 2 and len(w.models) == 1 and w.n == 1: return whole(rng, folder)
    if kind == 'unknown key': r[rng.choice(('note', 'seed', 'tokens'))], want = rng.choice((None, 'x', [1])), w
    if kind == 'gold null':
        for o in w.records.values():
            for q in o: q['gold_reward'] = None
        w.key, want = 'reward', w
    if kind == 'gold part':
        if sum(map(len, w.records.values())) == 1: return whole(rng, folder)
        for o in w.records.values():
            for q in o: q['gold_reward'] = 1.
        r['gold_reward'], w.key, want = None, 'reward', w
    w.write(folder)
    body = f.read_text(encoding='utf-8')
    if kind == 'twice': k = rng.choice(('"reward"', '"prompt"', '"response"')); raw = body.replace(k, f'{k}: 1, {k}', 1)
    if kind == 'shape': raw = rng.choice(('null', '3', '"x"', '{"a": 1}', '[[]]', '[null]', '[3]', json.dumps({'samples': 1})))
    if kind == 'empty': raw = rng.choice(('[]', '', ' ', '\n'))
    if kind == 'cut': raw = body[:rng.randint(1, len(body)-2)]
    if kind == 'deep': raw = '['*100000
    if kind == 'half': r['response'] = '\ud83d'; raw = json.dumps(rs)
    if raw is not None: f.write_text(raw, encoding='utf-8')
    if kind == 'bytes': f.write_bytes(body.encode()[:-2]+b'\xff\xfe"]')
    if kind == 'bom':
        f.write_bytes(b'\xef\xbb\xbf'+body.encode()); want = w                # accepted or refused: both are right
    if kind == 'folder': f.unlink(); f.mkdir()
    if kind == 'other file': (folder/'notes.json').write_text('{'); (folder/'samples.md').write_text('x'); want = w
    action = rng.choice((read, read, judge_run, lambda d: mk_report(read_runs(d))[0]))
    def got():
        try: recs = read_samples(folder)
        except (ValueError, OSError) as e:
            either = kind in ('fewer', 'swap', 'uneven') and f"'{m}'" in str(e) and '_samples.json' in str(e)       # two files part: the later one is named, with both models
            if f.name not in str(e) and repr(f.name)[1:-1] not in str(e) and not either: raise AssertionError(f'the file is not named: {e}')
            if action is not read: action(folder)              # the same, or a report of its own that says what is wrong
            raise
        return summarise(recs)
    def right(s): return all(near(s[k]['reward']['mean'], w.mean(k, 'reward')) and ('gold_reward' in s[k]) == (w.key == 'gold_reward') for k in w.models)
    return Case(f'{kind} in {f.name!r} of {w.models}', got, REFUSED if want is REFUSED else right, plain=want is not REFUSED and kind != 'bom')

def read(d): return read_samples(d)


def handful(rng, folder):
    "Statistics of lists with holes: sums over plain Python lists, every sign tried"
    n = rng.randint(0, 9)
    hole = lambda: rng.choice((None, math.nan))
    xs, ys = ([hole() if rng.random() < .15 else rng.randint(-3, 3)*rng.choice((1, 1, .5, 1e9)) for _ in range(n)] for _ in 'ab')
    lost = lambda v: v is None or v != v
    if rng.random() < .1 and n: xs[rng.randrange(n)] = rng.choice((math.inf, -math.inf))
    what = rng.choice(('mean', 'rate', 'test', 'holm', 'best'))
    have = [x for x in xs if not lost(x)]
    bad = not have or any(math.isinf(x) for x in have)
    if what == 'mean':
        def right(o):
            m = sum(have)/len(have)
            if not near(o['mean'], m) or o['n'] != len(have) or o.get('missing', 0) != n-len(have): return False
            if len(have) == 1: return (o['low'], o['high']) == (-math.inf, math.inf)
            sd = (sum((x-m)**2 for x in have)/(len(have)-1))**.5
            t = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060}[len(have)-1]
            return math.isclose(o['high']-m, t*sd/len(have)**.5, rel_tol=1e-4, abs_tol=1e-6*max(1, abs(m)))
        return Case(f'mean_ci {xs}', lambda: mean_ci(xs), REFUSED if bad else right, plain=not bad)
    if what == 'rate':
        both = [(x, y) for x, y in zip(xs, ys) if not lost(x) and not lost(y)]
        def right(o):
            w, l = sum(x > y for x, y in both), sum(x < y for x, y in both)
            return (o['wins'], o['losses'], o['ties'], o['n'], o.get('missing', 0)) == (w, l, len(both)-w-l, len(both), n-len(both)) and near(o['rate'], (w+(len(both)-w-l)/2)/len(both)) and (
                len(both) >= 6 or o.verdict == 'no difference shown') and 0 <= o['low'] <= o['rate']+1e-12 and o['rate']-1e-12 <= o['high'] <= 1
        return Case(f'win_rate {xs} {ys}', lambda: win_rate(xs, ys), right if both else REFUSED, plain=bool(both))
    if what == 'test':
        def right(p):
            s = abs(sum(have))-1e-9*sum(map(abs, have))
            flips = [abs(sum(a*b for a, b in zip(have, o))) for o in product((1, -1), repeat=len(have))]
            return near(p, sum(f >= s for f in flips)/len(flips))
        return Case(f'paired_test {xs}', lambda: paired_test(xs), REFUSED if bad else right, plain=not bad)
    if what == 'holm':
        ps = [rng.choice((0., 1., rng.random(), rng.random()/100, .05)) for _ in range(n)]
        broken = rng.random() < .2 and n > 0
        if broken: ps[rng.randrange(n)] = rng.choice((math.nan, -.1, 1.1, math.inf))
        def right(o):      # p_i times the tests that are not smaller, never below a smaller one's
            rank = sorted(range(n), key=lambda i: ps[i])
            want = [max(min(1., (n-k)*ps[j]) for k, j in enumerate(rank[:rank.index(i)+1])) for i in range(n)]
            return all(map(near, o, want)) and len(o) == n
        return Case(f'holm {ps}', lambda: holm(ps), REFUSED if broken else right, plain=not broken)
    N = rng.randint(1, 9)
    grid = [[rng.randint(-5, 5)+rng.random() for _ in range(N)] for _ in range(rng.randint(1, 4))]
    broken = rng.random() < .2
    if broken: rng.choice(grid)[0] = rng.choice((math.nan, math.inf, None))
    def right(rows):
        for r in rows:
            k = r['n']
            want = [sum(map(max, combinations(g, k)))/comb(N, k) for g in grid]      # every choice of k answers
            if not near(r['reward']['mean'], sum(want)/len(want)) or r['reward']['n'] != len(grid): return False
        return [r['n'] for r in rows] == [k for k in (1, 2, 4, 8) if k <= N]
    return Case(f'best_of_n {grid}', lambda: best_of_n(grid), REFUSED if broken else right, plain=not broken)


def one(rng, folder): return rng.choice((whole, whole, damaged, handful))(rng, folder)
