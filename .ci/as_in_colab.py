"""Run notebooks as Colab would after its first cell: in a folder with no clone around it, without the packages that only the extra
`dev` brings, and with GitHub's raw files read from this clone. `as_in_colab.py NOTEBOOK...`; nothing is written back."""
import os
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
# what a kernel brings, wherever it runs
kernel = {"ipykernel", "ipython"}

begins = '''
import os, sys, urllib.request
class No:
    "What only the extra dev brings is not there"
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: it is not among the requirements of rlhf_nb", name=name)
# in the kernel and what it starts; who runs the kernel needs them
if "ipykernel_launcher" in sys.orig_argv:
    os.environ["AS_IN_COLAB"] = "1"
if os.environ.get("AS_IN_COLAB"):
    sys.meta_path.insert(0, No())
    import importlib.util
    find = importlib.util.find_spec
    # who only asks whether a package is there hears no
    importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in {hidden!r} else find(name, package)
read = urllib.request.urlopen
def urlopen(url, *args, **kw):
    "GitHub's raw files are those of the clone"
    raw = "https://raw.githubusercontent.com/rlhf-nb/rlhf_nb/main/"
    if isinstance(url, str) and url.startswith(raw):
        url = {clone!r}+"/"+url.removeprefix(raw)
    return read(url, *args, **kw)
urllib.request.urlopen = urlopen
'''


def norm(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(names):
    "These distributions and all that they require, without their extras"
    found, todo = set(), list(map(norm, names))
    while todo:
        if (name := todo.pop()) in found:
            continue
        try:
            more = [Requirement(r) for r in requires(name) or []]
        except PackageNotFoundError:
            continue
        found.add(name)
        todo += [norm(r.name) for r in more if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def required(*extras):
    "What `pip install rlhf_nb`, with these extras, brings"
    said = ConfigParser()
    said.read(root/"settings.ini", "utf-8")
    lists = ["requirements", *(f"{e}_requirements" for e in extras)]
    return needed(Requirement(r).name for k in lists for r in said["DEFAULT"][k].split())


@cache
def hidden(*extras):
    "Top-level modules that are installed here, but not where `rlhf_nb` with these extras alone was installed"
    has = required(*extras) | needed(kernel) | {"rlhf-nb"}
    return {m for m, ds in packages_distributions().items() if not {norm(d) for d in ds} & has}


def extras(notebook):
    "The extras that a notebook's own first cell installs"
    found = re.search(r"rlhf_nb\[([\w,]+)\] @ git", notebook.read_text("utf-8"))
    return found[1].split(",") if found else []


def run(notebook):
    with tempfile.TemporaryDirectory() as d:
        away, site = Path(d)/"content", Path(d)/"site"
        away.mkdir()
        site.mkdir()
        (site/"sitecustomize.py").write_text(begins.format(hidden=hidden(*extras(notebook)), clone=root.as_uri()), "utf-8")
        (away/notebook.name).write_text(notebook.read_text("utf-8"), "utf-8")
        # the library, by a link: with the clone itself on the path a notebook would find more than was installed
        (site/"rlhf_nb").symlink_to(root/"rlhf_nb")
        return subprocess.run([sys.executable, str(root/".ci"/"run_nbs.py"), notebook.name], cwd=away, env={**os.environ, "PYTHONPATH": str(site)}).returncode


if __name__ == "__main__":
    bad = [f for f in map(Path, sys.argv[1:]) if run(f)]
    if bad:
        sys.exit(f"not as in Colab: {', '.join(map(str, bad))}")
