"Other machines: a locale that is not UTF-8, CRLF line ends, paths with blanks and emoji, a package folder that nobody may write to"
import ast
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import timeless

root = Path(__file__).resolve().parent.parent
modules = sorted((root/"rlhf_nb").glob("*.py"))
small = dict([o.split("=") for o in """data.max_prompt=48 data.max_response=16 data.n_pairs=40 model.n_layer=1 model.n_embd=16 model.n_head=1 model.n_positions=96
sft.updates=2 sft.batch_size=4 reward.updates=2 reward.batch_size=4 reward.n_normalise=8 grpo.updates=1 grpo.batch_size=2 grpo.group_size=2 grpo.max_new_tokens=4
eval.n_prompts=3 eval.max_new_tokens=4 jobs=1 device=cpu""".split()])
rows = [dict(prompt=f"\n\nHuman: Is {i} plus {i} möglich? 🙂\n\nAssistant:", chosen=f" Ja, {2*i} „ist“ es.", rejected=f" Nein \u2028 {i}!") for i in range(60)]


def text_calls(tree):
    "Calls that open a text file or a pipe, as (line, the call)"
    for n in ast.walk(tree):
        if not isinstance(n, ast.Call):
            continue
        attr = isinstance(n.func, ast.Attribute)
        name = n.func.attr if attr else getattr(n.func, "id", "")
        said = {k.arg: k.value for k in n.keywords}
        place = 0 if attr and getattr(n.func.value, "id", "") not in ("gzip", "bz2", "lzma", "io", "os", "codecs") else 1
        mode = said.get("mode") or (n.args[place] if len(n.args) > place else None)
        mode = mode.value if isinstance(mode, ast.Constant) and isinstance(mode.value, str) else ""
        zipped = attr and getattr(n.func.value, "id", "") in ("gzip", "bz2", "lzma")
        opens = name in ("open", "fdopen") and "b" not in mode and ("t" in mode or not zipped) and (not attr or mode or zipped or getattr(n.func.value, "id", "") == "os")
        pipe = name in ("run", "Popen", "check_output") and ("text" in said or "universal_newlines" in said)
        whole = attr and name in ("read_text", "write_text") and getattr(n.func.value, "id", "") not in ("core",)
        if (opens or pipe or whole) and "encoding" not in said:
            yield n.lineno, ast.unparse(n)[:100]


@pytest.mark.parametrize("f", modules, ids=lambda f: f.stem)
def test_encoding_is_named(f):
    "Where a text file is opened its encoding stands beside it: the default is the machine's"
    assert not list(text_calls(ast.parse(f.read_text("utf-8"))))


def test_encoding_sees():
    bad = "open(p)", "open(p, 'w')", "f.open('r')", "f.read_text()", "f.write_text(s)", "gzip.open(p, 'rt')", "os.fdopen(n, 'w')", "subprocess.run(c, text=True)"
    good = "open(p, 'rb')", "open(p, encoding='utf-8')", "desk.open(run)", "gzip.open(p)", "f.read_text(encoding='utf-8')", "subprocess.run(c)", "f.open('ab')"
    assert [bool(list(text_calls(ast.parse(s)))) for s in bad+good] == [True]*len(bad)+[False]*len(good)


def tokenizer(path):
    "A token for each byte"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE(vocab={o: i for i, o in enumerate(["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<end>", pad_token="<pad>").save_pretrained(path)


def run(package, here, end, env=(), limit=500):
    "A few stages in folder `here`, all files with line ends `end`: what the command says, logs and samples"
    here.mkdir(parents=True)
    tokenizer(here/"tok")
    (here/"pairs ü.jsonl" if here.name.isascii() is False else here/"pairs.jsonl").write_bytes("".join(json.dumps(r, ensure_ascii=False)+end for r in rows).encode())
    data = next(here.glob("pairs*"))
    lines = ["preset: demo"]
    nested = {}
    for k, v in small.items():
        *a, b = k.split(".")
        (nested.setdefault(a[0], {}) if a else nested)[b] = v
    for k, v in nested.items():
        lines += [f"{k}:", *(f"  {b}: {c}" for b, c in v.items())] if isinstance(v, dict) else [f"{k}: {v}"]
    (here/"my.yaml").write_bytes(end.join([*lines, ""]).encode())
    e = {**{k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONUTF8"))}, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", **dict(env)}
    base = ["--config", "my.yaml", "--data", data.name, "--tokenizer", "tok"]
    said = []
    for args in (["explore", *base, "--out", "look"], ["run", *base, "--out", "run", "--stages", "sft", "reward", "grpo", "evaluate", "judge", "failures", "analyze"]):
        p = subprocess.run([sys.executable, "-m", "rlhf_nb", *args], cwd=here, env=e, capture_output=True, timeout=limit)
        assert p.returncode == 0, (p.stdout+p.stderr).decode("utf-8", "replace")[-2000:]
        said.append(p.stdout)
    logs = {f.stem: timeless([json.loads(l) for l in f.read_text("utf-8").splitlines()]) for f in (here/"run"/"logs").glob("*.jsonl")}
    samples = {f.name: json.loads(f.read_text("utf-8")) for f in (here/"run"/"output_samples").glob("*_samples.json")}
    return said, logs, samples


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(root, tmp_path_factory.mktemp("plain")/"here", "\n", {"LC_ALL": "C.UTF-8"})


def same(got, want):
    assert got[1:] == want[1:] and set(want[1]) >= {"sft", "reward", "grpo"} and len(want[2]) == 2


def test_locale(plain, tmp_path):
    "LC_ALL=C without Python's UTF-8 mode: files are read and written as UTF-8 all the same"
    same(run(root, tmp_path/"here", "\n", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}), plain)


def tree(d):
    return {str(f.relative_to(d)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(d.rglob("*")) if f.is_file()}


def test_checkout(plain, tmp_path):
    "A checkout and data with CRLF, in a folder with blanks and emoji whose package nobody may write to"
    place = tmp_path/"mit Leer zeichen 🙂 [1]"
    shutil.copytree(root/"rlhf_nb", place/"rlhf_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for f in place.rglob("*"):
        if f.suffix in (".py", ".css", ".js", ".md", ".json", ".jsonl", ".txt"):
            f.write_bytes(f.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    before = tree(place)
    for f in [*place.rglob("*"), place]:
        f.chmod(stat.S_IMODE(f.stat().st_mode) & ~0o222)
    try:
        same(run(place, tmp_path/"läuft 🙂 hier", "\r\n", {"LC_ALL": "C.UTF-8"}), plain)
        assert tree(place) == before
    finally:
        for f in [place, *place.rglob("*")]:
            f.chmod(stat.S_IMODE(f.stat().st_mode) | 0o700)
