"""Seeded fuzzing. A class of inputs (a module beside this one) makes an input, reads it in a way of its own, and says what the package made of it.

Right: accepted, and the value is that of the independent reading. Refused: a clear error (ValueError, OSError, FloatingPointError) of
at most 1,500 characters. The faults: *silent* (accepted, another value), *traceback* (any other exception), *turned away* (an
undamaged input is refused). To run a class alone and see its faults: `python .ci/fuzz data 1000`."""
import random, tempfile, traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

REFUSED = object()   # what nobody can read

@dataclass
class Case:
    what: str        # The input, to be shown when something is wrong with it
    got: Callable    # Calls the package; returns what it made of the input
    want: Any        # The independent reading, or REFUSED; a function of the value says whether it is right
    plain: bool = False   # Undamaged: refusing it is a fault

def outcome(case):
    "(right | refused | silent | traceback | turned away, what was said)"
    try: got = case.got()
    except (ValueError, OSError, FloatingPointError, SystemExit) as e:
        said = str(e)
        if isinstance(e, UnicodeError) or isinstance(e, SystemExit) and e.code in (0, None): return 'traceback', repr(e)
        if not said.strip() or len(said) > 1500: return 'traceback', f'{type(e).__name__} with a message of {len(said)} characters: {said[:200]}'
        return ('turned away' if case.plain else 'refused'), said
    except Exception as e: return 'traceback', ''.join(traceback.format_exception(e))[-1500:]
    right = case.want(got) if callable(case.want) else case.want is not REFUSED and got == case.want
    return ('right', '') if right else ('silent', f'got {got!r:.600}, want {case.want if case.want is not REFUSED else "a refusal"!r:.600}')

def fuzz(one, n, seed=0, show=5):
    "Run `one(rng, folder) -> Case` n times: (counts, the first faults in words)"
    counts, faults = Counter(), []
    for i in range(n):
        with tempfile.TemporaryDirectory(prefix='rlhf_nb_fuzz_') as d:
            case = one(random.Random(f'{seed} {i}'), Path(d))
            kind, said = outcome(case)
        counts[kind] += 1
        if kind in ('silent', 'traceback', 'turned away') and len(faults) < show: faults.append(f'input {i}, {kind}: {case.what[:800]}\n    {said}')
    return counts, faults
