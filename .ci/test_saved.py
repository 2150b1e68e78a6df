"README's page and the final analysis are run again: what they print from results/ is what was saved"
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def said(path):
    "{id: text of the outputs} of each code cell that trains nothing: small runs end elsewhere on another processor"
    out = {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "train_" not in "".join(cell["source"]):
            out[cell["id"]] = [text(o) for o in cell["outputs"] if o.get("name") != "stderr"]
    return out


def text(output):
    "An output without its pictures and their sizes"
    data = output.get("data") or {output["output_type"]: output.get("text")}
    said = {k: "".join(v) for k, v in data.items() if not k.startswith("image/") and isinstance(v, (str, list))}
    return {k: v for k, v in said.items() if " size " not in v or not v.startswith("<")}


@pytest.mark.parametrize("name", ["nbs/index.ipynb", "nbs/tutorials/final_analysis.ipynb"])
def test_saved_outputs_are_those_of_results(name, tmp_path):
    for folder in ("nbs", "results", "output_samples"):
        shutil.copytree(root/folder, tmp_path/folder)
    subprocess.run([sys.executable, root/".ci"/"run_nbs.py", tmp_path/name], cwd=tmp_path, check=True, capture_output=True, timeout=600)
    assert said(tmp_path/name) == said(root/name)
    assert sum(map(bool, said(root/name).values())) > 1, "nothing is compared"
