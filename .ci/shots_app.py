"""Pictures of the page for README: python .ci/shots_app.py [RUN] [--out results/app] [--quick]

The page opens by itself on a finished comparison; nothing is clicked. Without RUN: the samples that come with the package."""
import argparse
import shutil
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from rlhf_nb.app import launch

p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
p.add_argument("run", nargs="?")
p.add_argument("--out", type=Path, default=Path("results/app"))
p.add_argument("--full", action="store_true", help="the whole page, not the first screen alone")
p.add_argument("--only", nargs="*", default=["compare", "compare_dark", "phone_dark"])
a = p.parse_args()
sizes = dict(compare=(1440, 900, "light"), compare_dark=(1440, 900, "dark"), phone_dark=(390, 844, "dark"), phone=(390, 844, "light"), tablet=(1024, 768, "light"))
app = launch(a.run, port=0, inline=False)
while app.desk.state == "loading":
    time.sleep(.1)
with sync_playwright() as pw:
    browser = pw.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox", "--disable-dev-shm-usage"])
    for name in a.only:
        width, height, scheme = sizes[name]
        page = browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme).new_page()
        page.goto(app.local_url, wait_until="domcontentloaded")
        page.locator("#board article").first.wait_for(timeout=120_000)
        page.wait_for_timeout(2500)
        page.screenshot(path=a.out/f"{name}.png", full_page=a.full)
        print(name, page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"))
    browser.close()
app.close()
