"What the notebooks' own tests cannot see: the notebooks, modules and pins belong together, and nothing of this machine is in them"
import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from as_in_colab import extras, hidden
from rlhf_nb.flags import commands, own_commands

root = Path(__file__).resolve().parent.parent
notebooks = sorted(f for f in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)
numbered = {f.stem.split("_", 1)[1]: f for f in notebooks if re.match(r"\d\d[a-z]?_", f.name)}
order = {name: f.name.split("_")[0] for name, f in numbered.items()}
modules = {f.stem: f for f in sorted((root/"rlhf_nb").glob("*.py")) if f.stem not in ("__init__", "__main__", "_modidx")}
homes = {"gradio": {"app", "comparison", "question", "tabs"}, "matplotlib": {"plots", "report", "benchmark"}, "openai": {"endpoint"}, "seaborn": {"plots", "report", "benchmark"}}
machine_path = r"(?<![\w.:~-])/(tmp|root|home|work|Users|opt|mnt|private)/"
registry = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|[-]-(extra-)?index-url|[-]-find-links|PIP_(EXTRA_)?INDEX|PIP_[F]IND"
each_notebook = pytest.mark.parametrize("nb", notebooks, ids=lambda f: f.stem)
each_module = pytest.mark.parametrize("name", modules)


def cells(f, kind="code"):
    return [{**c, "source": "".join(c["source"])} for c in json.loads(f.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def outputs(f):
    return [o for c in cells(f) for o in c["outputs"]]


def imports(source):
    "(top package, module of ours or None) of each import, those inside functions too"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["rlhf_nb" if node.level else "", node.module]))
            names = [f"{base}.{a.name}" for a in node.names]  # `from rlhf_nb import core` names a module last
        else:
            continue
        for top, *rest in (n.split(".") for n in names):
            yield top, rest[0] if top == "rlhf_nb" and rest and rest[0] in order else None


@each_notebook
def test_outputs(nb):
    "Saved outputs, no error among them, no code that was run but not cleaned"
    assert outputs(nb), "no saved output: run .ci/run_nbs.py on it"
    assert not [o["evalue"] for o in outputs(nb) if o["output_type"] == "error"]
    assert not [c["execution_count"] for c in cells(nb) if c["execution_count"]], "run nbdev_clean"


def calls(nodes):
    return {ast.unparse(n.func) for node in nodes for n in ast.walk(node) if isinstance(n, ast.Call)}


def without_picture(cells):
    "Cells that draw, by matplotlib, by a function of the notebook that does, or by a plot of ours at the end, and have stored no picture"
    makes, bad = {"plt.subplots", "plt.figure"}, []
    for c in cells:
        body = ast.parse(re.sub(r"^[%!].*", "", c["source"], flags=re.M)).body
        functions = [n for n in body if isinstance(n, ast.FunctionDef)]
        run = calls(n for n in body if n not in functions)
        makes |= {f.name for f in functions if makes & calls([f])}
        ends = body and isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, ast.Call) and ast.unparse(body[-1].value.func).startswith("plot_")
        if (ends or run & makes) and "plt.close" not in run and not any("image/png" in o.get("data", {}) for o in c["outputs"]):
            bad.append(c["source"][:200])
    return bad


@each_notebook
def test_pictures(nb):
    "A run with MPLBACKEND=agg draws everything and stores nothing"
    assert not without_picture(cells(nb))


def test_pictures_see():
    "The check above is not blind, and asks for no picture where none is drawn or a test closes it"
    stored, own = [{"data": {"image/png": ""}}], "def curve(x):\n    ax = plt.subplots()[1]\n    ax.plot(x)"
    for source, bad in (("fig,ax = plt.subplots()", True), ("plot_costs(x)", True), ("curve(x)", True), (own, False), ("plot_costs(x).axes", False), ("curve(x)\nplt.close()", False)):
        drawn = [dict(source=own, outputs=[])]
        assert bool(without_picture([*drawn, dict(source=source, outputs=[])])) == bad, source
        assert not without_picture([*drawn, dict(source=source, outputs=stored)])


@each_notebook
def test_imports_alone(nb):
    "nbdev's docs run each cell that imports, so in a notebook with a module nothing else stands there (installing in Colab apart)"
    mixed = ast.Expr, ast.Assign
    for c in cells(nb):
        if nb not in numbered.values() or c["source"].startswith("#| export") or "google.colab" in c["source"]:
            continue
        source = re.sub(r"^%.*", "", c["source"], flags=re.M)
        kinds = {type(node) for node in ast.walk(ast.parse(source))}
        assert not kinds & {ast.Import, ast.ImportFrom} or not kinds & set(mixed), c["source"][:200]


def exercises(cells):
    "Numbers of the exercises at the end of a notebook: those in brackets, or the only one"
    for c in cells:
        if m := re.search(r"\*\*Exercise(s?)\.\*\*(.*?)(\n\n|\Z)", c["source"], re.S):
            return [int(k) for k in re.findall(r"\((\d+)\)", m[2])] if m[1] else [1]
    return []


def solved(cells):
    "What the headings of solutions name: (file, number)"
    for c in cells:
        for link,k in re.findall(r"^### \[[^\]]+\]\((.+?)\), exercise (\d+)$", c["source"], re.M):
            yield link.split("/")[-1], int(k)


def test_every_exercise_has_a_solution():
    "Each once, in the appendix to the tutorials that the notebook names, and no solution to what nobody asks"
    found = [o for f in notebooks if f.name.startswith("solutions_") for o in solved(cells(f, "markdown"))]
    assert len(set(found)) == len(found), "a solution twice"
    asked = {(f.name, k) for f in notebooks for k in exercises(cells(f, "markdown"))}
    assert len(asked) > 50
    # a heading would hide them from `exercises`
    assert not [f.name for f in notebooks for c in cells(f, "markdown") if re.search(r"^#+ +Exercise", c["source"], re.M)]
    assert asked == set(found), f"without a solution: {sorted(asked-set(found))}, without an exercise: {sorted(set(found)-asked)}"
    named = {f.name: "".join(c["source"] for c in cells(f, "markdown")) for f in notebooks if exercises(cells(f, "markdown"))}
    assert not [name for name, text in named.items() if "Solutions: [solutions_" not in text]


def test_every_exercise_sees():
    "The check above is not blind"
    cell = dict(source="## Takeaways\n\n**Exercises.** (1) One? (2) Two (see .5)?\n\n**On.** (3)")
    assert exercises([cell]) == [1, 2] and exercises([dict(source="**Exercise.** One?")]) == [1] and exercises([dict(source="Exercise")]) == []
    assert list(solved([dict(source="### [28 ppo](../28_ppo.ipynb), exercise 2\n\ntext")])) == [("28_ppo.ipynb", 2)]


@each_notebook
def test_cells_are_cells(nb):
    "No cell of a script (`# %%`) within a cell: such code is never run, and such text is a heading"
    every = [c["source"] for kind in ("markdown", "code") for c in cells(nb, kind)]
    assert not [s for s in every if re.search(r"^# %%", s, re.M)]


@each_notebook
def test_weight(nb):
    assert nb.stat().st_size <= 300_000, f"{nb.stat().st_size:,} bytes; 300,000 is the most: smaller or fewer figures"


@each_notebook
def test_opens_in_colab(nb):
    "A badge that opens this very notebook, and a first code cell that installs the package, in Colab only"
    where = f"/blob/main/{nb.relative_to(root).as_posix()})"
    assert any("colab-badge.svg" in c["source"] and where in c["source"] for c in cells(nb, "markdown")), f"no badge with {where}"
    first = cells(nb)[0]["source"]
    assert "if 'google.colab' in sys.modules:" in first and "pip" in first, f"the first code cell is:\n{first}"


def not_in_colab(nb):
    "What a notebook takes from this machine that its first cell does not bring: modules it imports, files of a clone"
    code = [c["source"] for c in cells(nb) if "eval: false" not in c["source"]]
    code = [re.sub(r"^\s*[%!].*", "", s, flags=re.M) for s in code]
    tops = [n for s in code for n in ast.parse(s).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    found = {top for n in tops for top, _ in imports(ast.unparse(n))} & hidden(*extras(nb))
    if not any("git', 'clone'" in s for s in code):
        found |= {m for s in code for m in re.findall(r"[\"'](\.\./(?:results|output_samples)[^\"']*)", s)}
    return found


@each_notebook
def test_runs_in_colab(nb):
    "Nothing of the extra `dev`, and no file of a clone that is not fetched (`published`); `.ci/as_in_colab.py` runs them so"
    assert not not_in_colab(nb)


def test_runs_in_colab_sees(tmp_path):
    source = ["import jupytext,torch", "read_json('../results/summary.json')", "def f(): import nbdev"]
    (tmp_path/"x.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "source": s} for s in source]}), "utf-8")
    assert not_in_colab(tmp_path/"x.ipynb") == {"jupytext", "../results/summary.json"}


@each_notebook
def test_notebook_imports(nb):
    "Nothing of nbdev; a numbered notebook imports only modules of lower numbers (its own, where processes need it)"
    code = "\n".join(re.sub(r"^\s*[%!].*", "", c["source"], flags=re.M) for c in cells(nb))
    found = set(imports(code))
    assert "nbdev" not in {top for top, _ in found}
    me = nb.name.split("_")[0] if nb in numbered.values() else "~"
    assert not [m for _, m in found if m and order[m] > me]


def unexplained(f):
    "Metrics that a notebook shows in a row before a text above names them, as `name`"
    named, shown = set(), set()
    for c in json.loads(f.read_text("utf-8"))["cells"]:
        if c["cell_type"] == "markdown":
            named |= set(re.findall(r"`(\w+)`", "".join(c["source"])))
        for o in c.get("outputs", []):
            text = "".join(o.get("text", [])) or "".join(o.get("data", {}).get("text/plain", []))
            if "'update':" in text and "'loss':" in text:
                shown |= set(re.findall(r"'(\w+)':", text))-named
    return shown


@each_notebook
def test_metrics_are_explained(nb):
    "What the numbers of a metrics row are is said before the first of them is shown"
    assert not unexplained(nb)


def test_metrics_are_explained_sees(tmp_path):
    row = {"cell_type": "code", "source": [], "outputs": [{"data": {"text/plain": ["{'update': 0,\n", " 'loss': 1.0,\n", " 'kl': 0.1}"]}}]}
    table = {"cell_type": "markdown", "source": ["| `update` | `loss`, of the optimiser |"]}
    for cells, said in (([table, row], {"kl"}), ([row, table], {"update", "loss", "kl"})):
        (tmp_path/"x.ipynb").write_text(json.dumps({"cells": cells}), "utf-8")
        assert unexplained(tmp_path/"x.ipynb") == said


def test_modules_and_notebooks():
    "Each numbered notebook has its module, each module its notebook, and the index names no others"
    assert len(set(order.values())) == len(numbered), "two notebooks with one number"
    assert set(modules) == set(numbered)
    for name, f in modules.items():
        assert f"File to edit: ../nbs/{numbered[name].name}." in f.read_text("utf-8"), f.name
    index = {}
    exec((root/"rlhf_nb"/"_modidx.py").read_text("utf-8"), index)
    # written by hand, for the folders of models: nothing here imports it
    assert {f"rlhf_nb.{m}" for m in modules} == set(index["d"]["syms"])-{"rlhf_nb.remote.log_prob_reward"}


def test_readme_names_everything():
    "Each notebook is in the table of the index, in order and once; each subcommand stands in README"
    index = "".join(c["source"] for c in cells(root/"nbs"/"index.ipynb", "markdown"))
    listed = re.findall(r"^\| \[[^]]+\]\(([^)]+\.ipynb)\)", index, re.M)
    here = [f.relative_to(root/"nbs").as_posix() for f in notebooks if f.stem != "index"]
    assert sorted(listed) == sorted(here)
    chapters = [n for n in listed if "/" not in n]
    assert chapters == sorted(chapters)
    readme = (root/"README.md").read_text("utf-8")
    unnamed = [c.name for c in (*commands, *own_commands) if f"`rlhf_nb {c.name}" not in readme]
    assert not unnamed


@each_module
def test_import_order(name):
    "A module imports only modules of ours with lower numbers; heavy packages stay in the modules that exist for them"
    found = set(imports(modules[name].read_text("utf-8")))
    assert not [m for _, m in found if m and order[m] >= order[name]]
    assert not [top for top, _ in found if top in homes and name not in homes[top]]
    assert "nbdev" not in {top for top, _ in found}


def test_import_order_sees():
    "The check above is not blind"
    source = "import rlhf_nb.core, torch\nfrom .core import x\ndef f():\n    from rlhf_nb import core\n    import gradio as gr"
    assert sorted(imports(source), key=str) == sorted([("rlhf_nb", "core"), ("torch", None)] + 2*[("rlhf_nb", "core")] + [("gradio", None)], key=str)


def test_nothing_of_this_machine():
    "No absolute path and no package registry in what is committed; pictures in notebooks don't count"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True).stdout
    bad = []
    for f in (root/n for n in names.splitlines() if (root/n).is_file()):
        try:
            text = f.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        text = re.sub(r'"image/\w+": ".*?"', "", text)
        bad += [f"{f.relative_to(root)}: {m[0]}" for m in re.finditer(f"{machine_path}|{registry}", text)]
    assert not bad


def test_machine_path_sees():
    for d in ("tmp", "home", "root"):
        assert all(re.search(machine_path, s) for s in (f'open("/{d}/x")', f"at /{d}/me/x.py", f"'/{d}/'"))
        assert not any(re.search(machine_path, s) for s in (f"https://a.org/{d}/x", f"./{d}/x", f"~/{d}/x", f"logs/{d}/x"))


def test_pins():
    "Every package of this environment has the version that the constraints name"
    norm = lambda s: re.sub(r"[-_.]+", "-", s).lower()
    lines = [l for l in (root/".ci"/"constraints.txt").read_text("utf-8").splitlines() if not l.startswith("#")]
    assert not [l for l in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", l)]
    pins = dict(l.split("==") for l in lines)
    assert len(pins) == len(lines), "a package twice"
    have = {norm(d.metadata["Name"]): d.version.split("+")[0] for d in distributions(path=[p for p in sys.path if p.startswith(sys.prefix)])}
    assert have["torch"] == pins["torch"]
    differ = {n: (v, pins.get(n)) for n, v in have.items() if n not in ("pip", "setuptools", "rlhf-nb") and pins.get(n) != v}
    assert not differ, "installed and pinned"


@pytest.fixture(scope="session")
def fastcore2(tmp_path_factory):
    "Environment variables that put a fastcore 2 in front of the one that nbdev needs"
    folder = tmp_path_factory.mktemp("fastcore2")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "fastcore==2.2.39"], check=True)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"}


def test_fastcore_2(fastcore2):
    "nbdev 2 needs fastcore 1; the library works with both"
    code = f"import fastcore, {', '.join('rlhf_nb.'+m for m in modules)}; print(fastcore.__version__)"
    out = subprocess.run([sys.executable, "-c", code], env=fastcore2, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("2.")


def test_command_with_fastcore_2(fastcore2):
    "`rlhf_nb config demo` shows each value with its comment, which comes through fastcore"
    code = "import sys; sys.argv = ['rlhf_nb', 'config', 'demo']; from rlhf_nb.cli import main; main()"
    if "cli" not in modules: code = "from rlhf_nb.core import *; print(config_yaml(load_config('demo')))"
    out = subprocess.run([sys.executable, "-c", code], env=fastcore2, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "preset:" in out.stdout and "# Peak learning rate" in out.stdout


without_dev = """
import sys
class No:  # what only the extra 'dev' brings
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('IPython', 'nbdev', 'execnb', 'ghapi', 'nbconvert', 'nbclient', 'ipykernel', 'jupytext', 'pytest', 'playwright'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, No())
"""


def test_runs_without_dev():
    lines = "\n".join(f"import rlhf_nb.{name}" for name in modules)
    r = subprocess.run([sys.executable, "-c", f"{without_dev}\n{lines}"], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr


def test_runs_without_dev_sees():
    r = subprocess.run([sys.executable, "-c", f"{without_dev}\nimport IPython"], capture_output=True, text=True)
    assert "No module named 'IPython'" in r.stderr


def test_faults():
    "Every planted fault can still be planted: who moves the line that it changes moves it in .ci/faults too. `.ci/run full` plants them"
    p = subprocess.run([sys.executable, root/".ci"/"faults.py", "--dry"], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
