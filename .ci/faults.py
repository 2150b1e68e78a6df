"""Plants one fault after another in a copy of the repository and runs the test that should notice: a test that stays green is the fault.

`python .ci/faults.py [name of a list in .ci/faults ...]`. A fault is {"file": "nbs/27_rollout.ipynb", "old": code that stands there
once, "new": what it is replaced by, "test": "nbs/27_rollout.ipynb" or arguments of pytest, "why": what is broken}."""
import json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent

def plant(copy, f):
    "Replace `old` by `new` in one source cell or one line; it must stand there exactly once"
    path = copy/f['file']
    if path.suffix != '.ipynb':
        text = path.read_text(encoding='utf-8')
        n = text.count(f['old'])
        path.write_text(text.replace(f['old'], f['new']), encoding='utf-8')
    else:
        nb, n = json.loads(path.read_text(encoding='utf-8')), 0
        for c in nb['cells']:
            s = ''.join(c['source'])
            if c['cell_type'] == 'code' and '| export' in s.split('\n')[0]:
                n += s.count(f['old'])
                c['source'] = s.replace(f['old'], f['new']).splitlines(keepends=True)
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
    if n != 1: raise SystemExit(f"{f['file']}: {n} places say {f['old']!r}, expected 1")

def caught(copy, f):
    "Does the test notice?"
    env = {**os.environ, 'PYTHONPATH': str(copy), 'OMP_NUM_THREADS': '1'}
    if path_is_nb := f['test'].endswith('.ipynb'): cmd = ['nbdev_test', '--path', f['test']]
    else: cmd = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *f['test'].split(maxsplit=2)]
    subprocess.run(['nbdev_export'], cwd=copy, env=env, check=True, capture_output=True)
    p = subprocess.run(cmd, cwd=copy, env=env, capture_output=True, text=True)
    if not path_is_nb and p.returncode not in (0, 1): raise SystemExit(f"{f['test']}: pytest ended with {p.returncode}: {p.stdout[-500:]}")
    return p.returncode != 0

def main(names):
    lists = {p.stem: json.loads(p.read_text(encoding='utf-8')) for p in sorted((here/'faults').glob('*.json')) if not names or p.stem in names}
    missed, n = [], 0
    for name, faults in lists.items():
        for f in faults:
            with tempfile.TemporaryDirectory(prefix='rlhf_nb_fault_') as d:
                copy = Path(d)/'repo'
                shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.git', '.venv', 'outputs', '__pycache__', '*.egg-info'))
                plant(copy, f)
                ok, n = caught(copy, f), n+1
            print(f"{'caught' if ok else 'MISSED'}  {name}: {f['why']}", flush=True)
            if not ok: missed.append(f['why'])
    print(f'{n-len(missed)} of {n} planted faults caught')
    return bool(missed)

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
