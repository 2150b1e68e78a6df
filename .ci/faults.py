"""Plants one fault after another in a copy of the repository and runs the test that should notice: a test that stays green is the fault.

`python .ci/faults.py [--dry | --green] [NAME | NAME:WORDS ...]`: all faults, or those of the lists NAME in .ci/faults, or those of a list
whose `why` holds WORDS; `--dry` only looks whether each can be planted, which is done before the first runs anyway; `--green` runs each test
without any fault too, where it must be green (`.ci/run` has done that). A fault is {"file": "nbs/27_rollout.ipynb", "old": code that stands
there once, "new": what it is replaced by, "test": "nbs/27_rollout.ipynb" or arguments of pytest, "why": what is broken}."""
import argparse, json, multiprocessing, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent
limit = 900                                                         # seconds; a test that a fault never lets end has noticed it
# what takes long to import, and is nobody's fault, is imported once
ctx = multiprocessing.get_context('forkserver')
ctx.set_forkserver_preload(['nbdev.test', 'torch', 'transformers', 'accelerate', 'datasets'])

def planted(path, old, new):
    "The text of a file with `old` replaced by `new` (of a notebook: in cells that are exported), and how often `old` stands there"
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb': return text.replace(old, new), text.count(old)
    nb, n = json.loads(text), 0
    for c in nb['cells']:
        s = ''.join(c['source'])
        if c['cell_type'] == 'code' and '| export' in s.split('\n')[0]:
            n += s.count(old)
            c['source'] = s.replace(old, new).splitlines(keepends=True)
    return json.dumps(nb, indent=1, ensure_ascii=False)+'\n', n

def misplaced(f):
    "What keeps a fault from being planted, or None"
    if not (root/f['test'].split()[0]).exists(): return f"{f['test']}: no such test"
    n = planted(root/f['file'], f['old'], f['new'])[1]
    if n != 1: return f"{f['file']}: {n} places say {f['old']!r}, expected 1 ({f['why']})"

def export(copy, nb):
    "Write the module of a notebook again; it must be Python"
    from nbdev.export import nb_export
    nb_export(copy/nb, copy/'rlhf_nb')
    for f in (copy/'rlhf_nb').glob('*.py'): compile(f.read_text(encoding='utf-8'), f.name, 'exec')

def notebook(copy, changed, test, log):
    "In a process of its own: run a notebook as nbdev_test does. Ends with 3 where it is red"
    os.dup2(os.open(log, os.O_WRONLY|os.O_CREAT), 1); os.dup2(1, 2)
    os.chdir(copy)
    os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS='1')
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p).resolve() not in (root, here))]
    from nbdev.test import test_nb, get_config
    if changed.endswith('.ipynb'): export(copy, changed)
    ok, _ = test_nb(copy/test, skip_flags=get_config().tst_flags.split(), basepath=str(copy))
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0 if ok else 3)

def red(copy, changed, test):
    "Does the test fail in this copy, and with what words?"
    if test.endswith('.ipynb'):
        p = ctx.Process(target=notebook, args=(copy, changed, test, copy.parent/'log'))
        p.start(); p.join(limit)
        if p.is_alive(): p.kill(); return True, 'it never ended'
        code, said = {3: 1}.get(p.exitcode, p.exitcode and 2), (copy.parent/'log').read_text(encoding='utf-8', errors='replace')
    else:
        env = {**os.environ, 'PYTHONPATH': str(copy), 'OMP_NUM_THREADS': '1'}
        subprocess.run(['nbdev_export'], cwd=copy, env=env, check=True, capture_output=True)
        cmd = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '--tb=short', *test.split(maxsplit=2)]
        p = subprocess.run(cmd, cwd=copy, env=env, capture_output=True, text=True)
        code, said = p.returncode, p.stdout
    if code not in (0, 1): raise SystemExit(f'{test} was not run: {said[-1500:]}')
    told = [s for s in said.splitlines() if s.startswith('E  ') or 'Error' in s.split(':')[0]]
    return code == 1, ' '.join((told[-1] if told else said[-200:]).removeprefix('E').split())[:140]

def caught(f=None, test=None):
    "Is the test red where this fault, or none, is planted?"
    with tempfile.TemporaryDirectory(prefix='rlhf_nb_fault_') as d:
        copy = Path(d)/'repo'
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.git', '.venv', 'outputs', '__pycache__', '*.egg-info'))
        if f: (copy/f['file']).write_text(planted(copy/f['file'], f['old'], f['new'])[0], encoding='utf-8')
        return red(copy, f['file'] if f else '', f['test'] if f else test)

def chosen(names):
    "The faults that were asked for, as (list, fault), those of one test together"
    out = []
    for p in sorted((here/'faults').glob('*.json')):
        words = [w for name, _, w in (n.partition(':') for n in names) if name == p.stem]
        out += [(p.stem, f) for f in json.loads(p.read_text(encoding='utf-8')) if not names or any(w in f['why'] for w in words)]
    first = {f['test']: i for i, (_, f) in reversed([*enumerate(out)])}
    return sorted(out, key=lambda o: first[o[1]['test']])

def main(a):
    faults = chosen(a.names)
    if wrong := [w for _, f in faults if (w := misplaced(f))]: raise SystemExit('\n'.join(wrong))
    if a.dry: print(f'{len(faults)} faults can be planted'); return False
    missed, bad = [], []
    for t in dict.fromkeys(f['test'] for _, f in faults) if a.green else ():
        ok, said = caught(test=t)
        if ok: bad.append(t); print(f'RED     {t} without any fault: {said}', flush=True)
    for name, f in faults:
        began = time.time()
        ok, said = caught(f)
        print(f"{'caught' if ok else 'MISSED'}  {time.time()-began:4.0f}s  {name}: {f['why']}{ok*f'   ({said})'}", flush=True)
        if not ok: missed.append(f['why'])
    print(f'{len(faults)-len(missed)} of {len(faults)} planted faults caught')
    return bool(missed or bad)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--dry', action='store_true', help='only look whether each can be planted')
    p.add_argument('--green', action='store_true', help='run each test without any fault too')
    p.add_argument('names', nargs='*')
    sys.exit(main(p.parse_args()))
