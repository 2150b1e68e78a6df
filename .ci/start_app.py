"""Start to a usable page, in Chromium: python .ci/start_app.py RUN [--times 5]

Seconds from the command to: the first answer over HTTP; the page drawn; its prompts and settings filled; a stored answer on Explore, after one click; models loaded. The browser is
there already and draws on the same cores. Nothing is asserted: the numbers are the machine's."""
import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

from playwright.sync_api import sync_playwright

what = "http", "drawn", "filled", "explored", "live"


def start(browser, run):
    "Seconds to each of `what`, for one start"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    page, url, out = browser.new_context().new_page(), f"http://127.0.0.1:{port}/", []
    t0 = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-m", "rlhf_nb", "app", run, "--port", str(port)], stdout=subprocess.DEVNULL)

    def reached():
        out.append(time.perf_counter()-t0)
    try:
        while not out:
            try:
                urllib.request.urlopen(url, timeout=5).read()
                reached()
            except OSError:
                if server.poll() is not None:
                    sys.exit("the app did not start")
                time.sleep(.02)
        page.goto(url, wait_until="domcontentloaded")
        page.locator("#top .mode").wait_for()
        reached()
        page.locator("#examples, #stored").locator("visible=true").first.wait_for()
        reached()
        page.get_by_role("tab", name="Explore").click()
        page.locator("#x-board article").first.wait_for()
        reached()
        page.wait_for_function("document.querySelector('#top .mode').innerText != 'loading the models'", timeout=60_000)
        reached()
    finally:
        server.terminate()  # an interrupt is ignored by what a script started in the background
        server.wait()
        page.context.close()
    return out


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("run", help="a run folder")
    p.add_argument("--times", type=int, default=5)
    a = p.parse_args()
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox", "--disable-dev-shm-usage"])
        rows = []
        for _ in range(a.times):
            rows.append(start(browser, a.run))
            print(*(f"{k} {v:.2f}" for k, v in zip(what, rows[-1])), flush=True)
    print(f"median of {a.times}, slowest:", *(f"{k} {statistics.median(v):.2f}, {max(v):.2f};" for k, v in zip(what, zip(*rows))))
