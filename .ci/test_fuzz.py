"Generated inputs, 400 of each class (1,000 in `.ci/run full`): each is read right or refused in words; see fuzz/__init__.py"
import importlib, os, sys
from pathlib import Path

import pytest
from rlhf_nb.settings import load_config

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import fuzz

classes = sorted(f.stem for f in (Path(__file__).parent/'fuzz').glob('*.py') if not f.stem.startswith('_'))
N = 1000 if os.environ.get('RLHF_NB_FULL') else 400

@pytest.mark.parametrize('name', classes)
def test_fuzz(name):
    counts, faults = fuzz(importlib.import_module(f'fuzz.{name}').one, N, seed=0)
    print(name, dict(counts))
    assert not any(counts[k] for k in ('silent', 'traceback', 'turned away')), f'{dict(counts)}\n' + '\n'.join(faults)
    assert counts['right'] >= N/5, f'too much is refused to say anything: {dict(counts)}'

def test_python():
    "The table of configurations holds for values that are set in Python too, at both ends of each"
    c, n = load_config(), 0
    def takes(o, k, v):
        try: setattr(o, k, v)
        except ValueError as e:
            assert str(e).startswith(f'{k}: ') and str(e).endswith(f', got {v!r}'), e
            return False
        return True
    for section, keys in importlib.import_module('fuzz.config').table.items():
        for k, t in keys.items():
            o = getattr(c, section) if section else c
            right, wrong = [None]*t['null'], [[[1]], {}]+[None]*(not t['null'])
            if t['kind'] == 'words': right, wrong = [*right, *t['words']], [*wrong, 'x', 1, True]
            elif t['kind'] is bool: right, wrong = [*right, True, False], [*wrong, 1, 'true']
            elif t['kind'] is str: right, wrong = [*right, 'x'], [*wrong, 1, 1.5, True]
            else:
                lo, hi, step = t['lo'], t['hi'], 1 if t['kind'] is int else (t['hi']-t['lo'])/1e3
                right += [lo+step*t['open_lo'], hi-step*t['open_hi']]
                wrong += ['1', True, lo-step*(not t['open_lo']), *([hi+step*(not t['open_hi'])] if hi != 1e6 else [])]
            for v in right: assert takes(o, k, v), (section, k, v)
            for v in wrong: assert not takes(o, k, v), (section, k, v)
            n += len(right)+len(wrong)
    assert n > 900
