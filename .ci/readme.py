"""Write README.md from nbs/index.ipynb; with --check, only say what is stale.

A cell with `#| hide` is left out, one with `#| echo: false` shows its output alone. Pictures go to results/readme/, each with
the text of its cell's `#| fig-alt:`.
"""
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
pictures = root / "results" / "readme"


def from_root(markdown):
    "Links and pictures of a notebook in nbs/, as seen from the repository's root"
    def fix(m):
        return m[1] + posixpath.normpath(posixpath.join("nbs", m[2]))
    return re.sub(r'(\]\(|src=")(?![a-z]+:|[#/])([^)"\s]+)', fix, markdown)


def prepare(cell):
    "`cell` as the README shows it, or None"
    if cell.cell_type != "code":
        cell.source = from_root(cell.source)
        return cell
    directives = set(re.findall(r"^# ?\| *(.+?) *$", cell.source, re.M))
    if "hide" in directives:
        return None
    cell.source = re.sub(r"^# ?\|.*\n?", "", cell.source, flags=re.M).strip()
    for o in cell.outputs:
        if "text/markdown" in o.get("data", {}):
            o.data["text/markdown"] = from_root(o.data["text/markdown"])
    alt.extend(d[8:].strip() for d in directives if d.startswith("fig-alt:"))
    if "echo: false" in directives:
        cell.metadata["transient"] = {"remove_source": True}
    return cell


alt = []
nb = nbformat.read(root / "nbs" / "index.ipynb", 4)
nb.cells = [c for c in map(prepare, nb.cells) if c is not None]
nb.metadata["language_info"] = {"name": "python"}  # names the code fences; nbdev_clean drops it
body, parts = MarkdownExporter().from_notebook_node(
    nb, resources={"output_files_dir": "results/readme", "unique_key": "index"})
body = re.sub(r"!\[png\]", lambda m: f"![{alt.pop(0)}]", body)
text = re.sub(r"\n{3,}", "\n\n", re.sub(r"\x1b\[[0-9;]*m", "", body)).strip() + "\n"
files = {root / name: data for name, data in parts["outputs"].items()} | {root / "README.md": text.encode()}
stale = [f for f, data in files.items() if not f.exists() or f.read_bytes() != data]
gone = sorted(set(pictures.glob("*")) - set(files))
if "--check" in sys.argv[1:]:
    if stale or gone:
        sys.exit("stale, run .ci/readme.py: " + ", ".join(str(f.relative_to(root)) for f in stale + gone))
else:
    for f in stale:
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(files[f])
    for f in gone:
        f.unlink()
