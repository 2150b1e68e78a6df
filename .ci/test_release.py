"What is released holds what it needs: a source archive installs from itself, a wheel has the package's data, and PyPI shows README's pictures"
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def package():
    "Every file of the package"
    return [f for f in (root/"rlhf_nb").rglob("*") if f.is_file() and f.suffix != ".pyc"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The archive and the wheel that was made of it, without anything from the network"
    copy, out = tmp_path_factory.mktemp("repo"), tmp_path_factory.mktemp("dist")
    for f in (*package(), *(o for o in root.iterdir() if o.is_file())):
        (copy/f.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, copy/f.relative_to(root))
    # as `python -m build`: the wheel is made of the archive, so that what the archive lacks the wheel lacks, or can't be made
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", str(out), str(copy)], check=True, capture_output=True)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_source(built):
    "setup.py reads these, and who builds from source has them"
    with tarfile.open(built[0]) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    assert {"setup.py", "settings.ini", "README.md", "LICENSE", "MANIFEST.in"} <= names
    assert {f.relative_to(root).as_posix() for f in (root/"rlhf_nb").glob("*.py")} <= names


def test_wheel(built):
    "Every file of the package, none of which is code alone"
    want = {f.relative_to(root).as_posix() for f in package()}
    assert {Path(n).suffix for n in want} >= {".py", ".typed", ".css", ".js", ".json", ".jsonl"}
    with zipfile.ZipFile(built[1]) as z:
        names = set(z.namelist())
        meta = message_from_bytes(z.read(next(n for n in names if n.endswith(".dist-info/METADATA"))))
        assert "rlhf_nb = rlhf_nb.__main__:command" in z.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert want == {n for n in names if n.startswith("rlhf_nb/")}
    cfg = ConfigParser(delimiters=["="])
    cfg.read(root/"settings.ini", encoding="utf-8")
    cfg = cfg["DEFAULT"]
    assert (meta["Version"], meta["Requires-Python"]) == (cfg["version"], ">="+cfg["min_python"])
    assert any("Python :: 3.11" in c for c in meta.get_all("Classifier"))
    text = meta.get_payload(decode=True).decode("utf-8")
    # what README links to is there, under its whole address; code is as it was
    prose = "".join(re.split(r"```.*?```", text, flags=re.S))
    links = re.findall(r"(?:\]\(|src=\"|href=\")([^)\"\s]+)", prose)
    assert not [o for o in links if not re.match(r"[a-z]+:|#", o)]
    raw, blob = cfg["git_url"].replace("github.com", "raw.githubusercontent.com"), cfg["git_url"]+"/blob/v"+cfg["version"]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", prose)
    assert any(o.startswith(raw) for o in pictures) and not [o for o in pictures if o.startswith(blob)]
    here = [o.partition(f"/v{cfg['version']}/")[2].partition("#")[0] for o in links if o.startswith((raw, blob))]
    assert len(here) > 50 and not [o for o in here if not (root/o).exists()]
    readme = (root/"README.md").read_text("utf-8")
    assert re.findall(r"```.*?```", text, flags=re.S) == re.findall(r"```.*?```", readme, flags=re.S)
