"A run goes to the Hub as its own client sends it: here to a stand-in of the Hub's API on this machine, never to the network"
import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlhf_nb.run import Run
from rlhf_nb.settings import load_config

root = Path(__file__).resolve().parent.parent


class Hub(BaseHTTPRequestHandler):
    "What `create_repo` and `create_commit` call; weights go the way of large files"

    def log_message(self, *_): pass

    def answer(self, o, code=200):
        body = json.dumps(o).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self):
        data = self.body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self):
        self.answer({"error": "Not found"}, 404)

    def do_POST(self):
        server, path = self.server, self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path.endswith("/commit/main"):
            return self.commit(path, self.body().decode())
        o = json.loads(self.body() or b"{}")
        if path == "/api/repos/create":
            name = f"{o.get('organization') or 'me'}/{o['name']}"
            server.repos[o.get("type") or "model", name] = dict(private=o.get("private") or o.get("visibility") == "private", files={})
            return self.answer({"url": f"{server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            def mode(f): return "lfs" if f["path"].endswith(".safetensors") else "regular"
            return self.answer({"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False, "oid": None} for f in o["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            put = {"upload": {"href": f"{server.url}/put"}}
            return self.answer({"transfer": "basic", "objects": [dict(f, actions=put) for f in o["objects"]]})
        self.answer({"error": path}, 404)

    def commit(self, path, lines):
        _, _, kind, who, name, *_ = path.split("/")
        files = self.server.repos[kind.removesuffix("s"), f"{who}/{name}"]["files"]
        for line in map(json.loads, lines.splitlines()):
            o = line["value"]
            if line["key"] == "file":
                files[o["path"]] = base64.b64decode(o["content"])
            if line["key"] == "lfsFile":
                files[o["path"]] = self.server.large[o["oid"]]
        self.answer({"commitUrl": f"{self.server.url}/{who}/{name}/commit/abc", "commitOid": "abc", "hookOutput": "", "success": True})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.repos, server.large = f"http://127.0.0.1:{server.server_port}", {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def run(tmp_path):
    "A folder with what a run leaves"
    run = Run(tmp_path/"run", load_config())
    weights = bytes(range(256))*40
    for f, text in {"ppo_model/config.json": b"{}", "ppo_model/README.md": b"---\ntags: [rlhf]\n---\n# ppo\n", "results/ANALYSIS.md": b"# A\n",
                    "ppo_model/model.safetensors": (2).to_bytes(8, "little")+b"{}"+weights, "output_samples/ppo_samples.json": b"[]",
                    "votes.jsonl": b"{}\n", "checkpoints/ppo.pt": b"x"}.items():
        (run.path/f).parent.mkdir(parents=True, exist_ok=True)
        (run.path/f).write_bytes(text)
    return run


def push(hub, run, *flags, token="hf_test"):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= dict(HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HOME=str(run.path.parent/"hf"), PYTHONPATH=str(root), HF_HUB_DISABLE_XET="1",
                HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")
    command = [sys.executable, "-m", "rlhf_nb", "push", "run", "me/my-run", *flags]
    return subprocess.run(command, cwd=run.path.parent, env=env, capture_output=True, text=True, timeout=300)


def test_push(hub, run):
    "Every file arrives as it is, in a repository of its own for each model; what is private stays at home"
    said = push(hub, run, "--dry-run")
    assert said.returncode == 0, said.stderr
    assert not hub.repos and "ppo_model" not in said.stdout and "model.safetensors" in said.stdout
    said = push(hub, run, "--private")
    assert said.returncode == 0, said.stderr
    model, data = hub.repos["model", "me/my-run-ppo"], hub.repos["dataset", "me/my-run"]
    assert model["private"] and data["private"] and len(hub.repos) == 2
    assert model["files"] == {f.name: f.read_bytes() for f in (run.path/"ppo_model").iterdir()}
    page = data["files"].pop("README.md").decode()
    assert "me/my-run-ppo" in page
    want = "config.yaml", "results/ANALYSIS.md", "output_samples/ppo_samples.json"
    assert data["files"] == {k: (run.path/k).read_bytes() for k in want}
    for repo in ("me/my-run-ppo", "me/my-run"):
        assert f"{repo}: {hub.url}/" in said.stdout


def test_refused(hub, run):
    "A secret or a path of this machine stops all; who is not known is told so in a line"
    (run.path/"results"/"ANALYSIS.md").write_text("a key: "+"hf_"+"a1"*18)
    said = push(hub, run)
    assert said.returncode == 2 and not hub.repos and len(said.stderr.splitlines()) == 1
    assert "results/ANALYSIS.md, line 1: a token of the Hub (hf_a1a...)" in said.stderr
    said = push(hub, run, "--without", "results/*", token="hf_other")
    assert said.returncode == 2 and len(said.stderr.splitlines()) == 1
    assert "me/my-run-ppo: not uploaded: " in said.stderr and "hf auth login" in said.stderr
