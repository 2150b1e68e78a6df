import importlib, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzz import fuzz
name, n, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 400, int(sys.argv[3]) if len(sys.argv) > 3 else 0
counts, faults = fuzz(importlib.import_module(f'fuzz.{name}').one, n, seed, show=20)
print(*faults, dict(counts), sep='\n')
