"""Many clients at once on the app, then a kill: python .ci/load_app.py RUN [--clients 32] [--seconds 60]

Each client compares and votes, again and again, over plain HTTP. Nothing but an orderly 'queue full' may go wrong, the server's memory must stay flat, and after SIGKILL in the middle
every acknowledged vote is in the file, once, and no line is cut."""
import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

serve = "import sys, torch; torch.set_num_threads(1); from rlhf_nb.app import launch; a = launch(sys.argv[1], votes=sys.argv[2]); print(a.local_url, flush=True); sys.stdin.read()"


def rss(pid):
    "Resident memory in MB"
    return int(next(l for l in open(f"/proc/{pid}/status") if l.startswith("VmRSS")).split()[1])/1024


def ask(client, url, data):
    "A comparison through the endpoint that stays as it is; 'full' when the queue is full"
    r = client.post(f"{url}gradio_api/call/compare", json={"data": data})
    if r.status_code == 503 and "ueue is full" in r.text:
        return "full"
    r.raise_for_status()
    with client.stream("GET", f"{url}gradio_api/call/compare/{r.json()['event_id']}") as s:
        event, last = None, None
        for line in s.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                event = value
            elif key == "data" and event in ("generating", "complete") and value != "null":
                last = json.loads(value)[0]
            elif key == "data" and event == "error":
                raise RuntimeError(f"error event: {value}")
    return last


def load(run, clients=32, seconds=60, tokens=32, votes=None):
    "Counts, seconds to the first answer, memory at ten times, votes acknowledged and found"
    votes = Path(votes or Path(run)/"load.jsonl")
    t0 = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-c", serve, str(run), str(votes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    out, acked, counts, lock = dict(clients=clients, seconds=seconds), [], Counter(), threading.Lock()
    try:
        url = server.stdout.readline().strip()
        out["page"] = time.perf_counter()-t0
        with httpx.Client(timeout=120) as c:
            assert "gradio" in c.get(url).text
            ask(c, url, ["Hi", None, 1., tokens, 0, 1])
        out["first_answer"] = time.perf_counter()-t0
        end = time.perf_counter()+seconds
        killed = threading.Event()

        def client(i):
            n = 0
            with httpx.Client(timeout=120) as c:
                while not killed.is_set():
                    n += 1
                    try:
                        a = ask(c, url, [f"client {i} asks {n}", None, 1., tokens, n, 1])
                        if a == "full":
                            what = "full"
                            time.sleep(1)
                        else:
                            r = c.post(f"{url}gradio_api/run/vote", json={"data": [a["id"], a["models"][n % len(a["models"])]]})
                            r.raise_for_status()
                            with lock:
                                acked.append(f"client {i} asks {n}")
                            what = "voted"
                    except (httpx.HTTPError, RuntimeError, ValueError, TypeError) as e:
                        if killed.is_set():
                            return
                        what = f"{type(e).__name__}: {e}"[:200]
                    with lock:
                        counts[what] += 1

        threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(clients)]
        for t in threads:
            t.start()
        out["mb"] = []
        for i in range(10):
            time.sleep(max(0, end-seconds*(9-i)/10-time.perf_counter()))
            out["mb"].append(round(rss(server.pid), 1))
        killed.set()
    finally:
        os.kill(server.pid, signal.SIGKILL)  # in the middle of it
        server.wait()
    for t in threads:
        t.join(120)
    text = votes.read_text("utf-8")
    rows = [json.loads(l) for l in text.splitlines()]
    found = Counter(r["prompt"].split("Human: ")[1].split("\n")[0] for r in rows)
    return dict(out, counts=dict(counts), acknowledged=len(acked), in_file=len(rows), lost=len(set(acked)-set(found)), doubled=sum(n > 1 for n in found.values()), whole=text.endswith("\n") or not text)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run")
    p.add_argument("--clients", type=int, default=32)
    p.add_argument("--seconds", type=float, default=60)
    print(json.dumps(load(**vars(p.parse_args())), indent=1))
