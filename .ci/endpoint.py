"A fake OpenAI-compatible endpoint on the loopback address: a list of faults, then a judge by a planted rule. As a script it serves until killed"
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def shown(body):
    "Dialogue, first and second answer, and the check code of a question"
    m = body["messages"][-1]["content"]
    check = m.rsplit(" ", 1)[1][:-1]
    return *(re.search(f"<{k} {check}>\n(.*)\n</{k} {check}>", m, re.S)[1] for k in ("dialogue", "first", "second")), check


def completion(text, finish="stop", **message):
    return 200, {}, json.dumps(dict(choices=[dict(index=0, message=dict(role="assistant", content=text, **message), finish_reason=finish)],
                                    usage=dict(prompt_tokens=300, completion_tokens=20)))


def verdict(body, f, **more):
    "The reply of an endpoint that says what `f(prompt, first, second)` says"
    *texts, check = shown(body)
    return completion(json.dumps(dict(check=check, reason="because", verdict=f(*texts), **more)))


def longer(prompt, first, second):
    return "first" if len(first) > len(second) else "second" if len(second) > len(first) else "tie"


class Endpoint:
    "`reply(i, body)` is (status, headers, text) for the i-th request; a float is seconds to stall, a list of (seconds, bytes) a reply that trickles, an iterator of these is all that is sent, headers too"
    def __init__(self, reply):
        self.seen, self.paths, self.times, self.busy, self.most, self.lock = [], [], [], 0, 0, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(h):
                body = json.loads(h.rfile.read(int(h.headers["content-length"])))
                with self.lock:
                    i = len(self.seen)
                    self.paths.append(h.path)
                    self.seen.append((body, {k.lower(): v for k, v in h.headers.items()}))
                    self.times.append(time.monotonic())
                    self.busy += 1
                    self.most = max(self.most, self.busy)
                try:
                    out = reply(i, body)
                    if isinstance(out, float):
                        time.sleep(out)
                        h.close_connection = True
                        return
                    if isinstance(out, list):
                        h.send_response(200)
                        h.send_header("content-length", str(sum(len(b) for _, b in out)))
                        h.end_headers()
                        for wait, b in out:
                            time.sleep(wait)
                            h.wfile.write(b)
                        return
                    if hasattr(out, "__next__"):
                        h.close_connection = True
                        for wait, b in out:
                            time.sleep(wait)
                            h.wfile.write(b)
                        return
                    status, headers, text = out
                    data = text.encode()
                    h.send_response(status)
                    for k, v in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
                        h.send_header(k, v)
                    h.end_headers()
                    h.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    h.close_connection = True
                finally:
                    with self.lock:
                        self.busy -= 1

            def log_message(h, *a):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 64

            def handle_error(server, *a):  # a client that was killed
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


if __name__ == "__main__":
    def slow(i, body):
        sys.stdout.write(json.dumps(shown(body)[:3]) + "\n")  # one write: lines of threads do not mix
        sys.stdout.flush()
        time.sleep(.03)
        return verdict(body, longer)

    with Endpoint(slow) as e:
        print(e.url, flush=True)
        threading.Event().wait()
