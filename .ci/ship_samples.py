"""Put a few samples of a run into the package: python .ci/ship_samples.py outputs/demo

`rlhf_nb app` shows them where there is no run yet."""
import json
import sys
from pathlib import Path

from rlhf_nb.core import read_json,write_text
from rlhf_nb.run import Places,read_samples

out, n = Path(__file__).resolve().parent.parent/"rlhf_nb"/"samples", 20
records = read_samples(sys.argv[1])
prompts = list(dict.fromkeys(r["prompt"] for r in records["reference"]))
chosen = prompts[::max(1, len(prompts)//n)][:n]
rounded = lambda r: {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()}
for name, rows in records.items():
    first = {r["prompt"]: r for r in reversed(rows)}
    lines = [json.dumps(rounded(first[p]), ensure_ascii=False) for p in chosen]
    write_text(out/f"{name}_samples.json", "[\n"+",\n".join(lines)+"\n]\n")
if (file := Places(sys.argv[1]).frontier).exists():  # what the best of n is worth: a line on the page
    short = [{k: rounded(v) if isinstance(v, dict) else v for k, v in rounded(r).items()} for r in read_json(file)["best_of_n"]]
    write_text(out/"frontier.json", json.dumps(dict(best_of_n=short))+"\n")
print(f"{len(chosen)} prompts, {len(records)} models, {sum(f.stat().st_size for f in out.glob('*.json')):,} bytes in {out.name}/")
