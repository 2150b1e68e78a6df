"Generated inputs, 400 of each class (1,000 in `.ci/run full`): each is read right or refused in words; see fuzz/__init__.py"
import importlib, os, sys
from pathlib import Path

import pytest

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
