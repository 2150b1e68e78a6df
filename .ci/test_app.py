"The app in a real browser (headless Chromium), over HTTP, under load, and with folders that are not right"
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny  # noqa: F401 (one thread, no GPU)
from tiny import require

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "0", "NO_PROXY": "127.0.0.1"}

import http.client

from load_app import load
from playwright.sync_api import expect, sync_playwright
from test_chat import data as chat_pairs  # noqa: F401 (a fixture)
from test_chat import model as chat_model  # noqa: F401 (a fixture)
from test_chat import train
from transformers import AutoTokenizer
from rlhf_nb.cards import card,dialogue
from rlhf_nb.cards import _limit
from rlhf_nb.cards import mk_prompt
from rlhf_nb.desk import Desk
from rlhf_nb.guard import host_name
from rlhf_nb.app import launch
from rlhf_nb.core import write_json
from rlhf_nb.settings import load_config
from rlhf_nb.text import HH
from rlhf_nb.run import Run
from rlhf_nb.data import load_preferences
from rlhf_nb.evaluate import sample_records
from rlhf_nb.detect import detect
from rlhf_nb.votes import read_votes
from rlhf_nb.models import mk_reward_model
from rlhf_nb.load import mk_policy,save_model
from rlhf_nb.sources import mk_scorer
from rlhf_nb.world import gold_reward,make_world,world_tokenizer

expect.set_options(timeout=60_000)
same_text = lambda a, b: re.sub(r"[\W\d_]+", "", a) == re.sub(r"[\W\d_]+", "", b)  # HTML has no control characters
shots = os.environ.get("APP_SHOTS")  # a folder for pictures of the pages
names = ["reference", "ppo", "grpo", "dpo"]
small = ["world.n_corpus=300", "world.n_facts=50", "world.n_pairs=40", "world.n_dev=8", "world.n_test=8", "world.n_ood=4", "model.n_layer=1", "model.n_embd=16", "model.n_head=2",
         "eval.n_prompts=6", "data.max_prompt=100", "eval.max_new_tokens=24", "sft.updates=3", "reward.updates=3", "jobs=1"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "A run of tiny models with random weights: config, models, samples of the test prompts"
    run = Run(tmp_path_factory.mktemp("app")/"run", load_config("demo", small))
    c = run.config
    w = make_world(c.world, c.seed)
    tok = world_tokenizer(w)
    models = {k: mk_policy(c.model, tok, i) for i, k in enumerate(names)}
    rm = mk_reward_model(models["reference"], "last_token", 0)
    for k, m in models.items():
        save_model(m, tok, run/(k if k == "reference" else f"{k}_model"))
    save_model(rm, tok, run/"reward_model")
    prompts = list(dict.fromkeys(p["prompt"] for p in w.test))[:c.eval.n_prompts]
    recs = sample_records(models, prompts, tok, mk_scorer((rm, tok), tok), mk_scorer(gold_reward, tok), c.eval, c.data.max_prompt, c.seed)
    for k, rs in recs.items():
        write_json(run/"output_samples"/f"{k}_samples.json", rs)
    return run.path


@pytest.fixture(scope="session")
def app(folder):
    a = launch(folder, inline=False)
    while a.desk.state == "loading":
        time.sleep(.05)
    yield a
    a.close()


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=require("browser"), args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield b
        b.close()


def visit(browser, app, width=1280, height=900, **kw):
    "A page that is filled; its errors and requests are kept"
    page = browser.new_context(viewport={"width": width, "height": height}, **kw).new_page()
    page.errors, page.outside = [], []
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.on("request", lambda r: page.outside.append(r.url) if not r.url.startswith((app.local_url, "data:", "blob:")) else None)
    page.goto(app.local_url, wait_until="domcontentloaded")
    expect(page.locator("#top .mode")).not_to_have_text("loading the models")
    return page


@pytest.fixture
def page(browser, app):
    p = visit(browser, app)
    yield p
    assert not p.errors and not p.outside
    p.context.close()


def shot(page, name):
    if shots:
        page.wait_for_timeout(500)
        page.screenshot(path=Path(shots)/f"{name}.png", full_page=True)


watch = """() => { window.seen = []; document.querySelector('#status p').dataset.old = 1;
  addEventListener('click', () => window.t0 = performance.now(), {once: true, capture: true});
  if (window.eye) window.eye.disconnect();
  window.eye = new MutationObserver(() => { const l = [...document.querySelectorAll('#board .answer')].map(e => e.innerText.length);
    if (l.length) window.seen.push([performance.now()-window.t0, ...l]); });
  window.eye.observe(document.querySelector('#board'), {childList: true, subtree: true, characterData: true}); }"""  # when which column had how many letters


def settings(page, **values):
    "Fill number fields of the settings, by the ids of their components"
    if not page.locator("#seed input").is_visible():
        page.locator("#settings button").first.click()
    for k, v in values.items():
        page.locator(f"#{k} input[type=number]").first.fill(str(v))
        page.locator(f"#{k} input[type=number]").first.press("Tab")


def compare(page, prompt):
    expect(page.locator("#board article").first).to_be_visible()  # on which the page opens
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.evaluate(watch)
    page.locator("#go").click()


def done(page):
    expect(page.locator("#status p:not([data-old])")).to_contain_text("Done in")


def test_four_columns(page, app):
    "Text within a second, four columns that grow together; numbers, colours, bars; the records of `evaluate`"
    settings(page, length=100, n=4)
    for attempt in range(3):  # a busy machine is no reason to fail
        compare(page, f"Hello {attempt}")
        done(page)
        seen = page.evaluate("window.seen")
        if seen[0][0] < 1000:
            break
    assert seen[0][0] < 1000, f"first text after {seen[0][0]:.0f} ms"
    assert len({tuple(s[1:]) for s in seen}) > 3 and {len(s) for s in seen} == {5}
    half = seen[len(seen)//2][1:]
    assert all(1 < n < m for n, m in zip(half, seen[-1][1:])), f"columns did not grow together: {seen}"
    settings(page, length=24, n=1)

    stored = {k: json.loads((app.desk.path/"output_samples"/f"{k}_samples.json").read_text())[1] for k in names}
    compare(page, stored["ppo"]["prompt"].strip())
    done(page)
    cards = page.locator("#board article")
    for i, (k, r) in enumerate(stored.items()):
        assert cards.nth(i).get_attribute("aria-label") == app_title(k)
        assert same_text(cards.nth(i).locator(".copy").get_attribute("data-copy"), r["response"])
    c = list(app.desk.comparisons.values())[-1]
    assert c["prompt"] == stored["ppo"]["prompt"]
    for k, r in stored.items():
        a = c["answers"][k]
        assert (a["response"], a["n_tokens"], a["finished"]) == (r["response"], r["n_tokens"], r["finished"])
        for f in ("reward", "kl", "kl_per_token", "gold_reward"):
            assert abs(a[f]-r[f]) < 1e-4, (k, f)
        kls = [float(re.match(r"KL (−?[\d.]+)", t)[1].replace("−", "-")) for t in cards.nth(names.index(k)).locator(".tok").evaluate_all("ts => ts.map(t => t.title)")]
        assert abs(sum(kls)-r["kl"]) < .001*len(kls)
    marks = cards.nth(1).locator(".tok").evaluate_all("ts => ts.map(t => [+t.style.getPropertyValue('--x'), getComputedStyle(t).backgroundColor, getComputedStyle(t).borderBottomWidth])")
    assert max(m[0] for m in marks) > 0 and len({m[1] for m in marks}) > 1
    expect(page.locator("#board .legend")).to_contain_text("KL to the reference")
    expect(page.locator("#board .bar")).to_have_count(12)  # three numbers of four models
    page.get_by_label("log-probability").check()
    expect(page.locator("#board .legend")).to_contain_text("surprise")
    page.get_by_label("nothing").check()
    expect(page.locator("#board .tok")).to_have_count(0)
    page.get_by_label("KL to the reference").check()
    expect(page.locator("#board .tok").first).to_be_visible()
    page.locator("#board summary").nth(1).click()
    expect(page.locator("#board article").nth(1).locator("details table tr")).to_have_count(len(c["answers"]["ppo"]["tokens"])+1)
    with page.expect_download() as d:
        page.locator("#save").click()
    assert json.loads(Path(d.value.path()).read_text())["answers"]["ppo"]["response"] == stored["ppo"]["response"]
    page.get_by_label("Prompt", exact=True).fill("by key")
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(page.locator("#board .turns")).to_contain_text("by key")
    done(page)


def app_title(k):
    return {"reference": "Reference"}.get(k, k.upper())


contrast = """sel => Math.min(...[...document.querySelectorAll(sel)].filter(e => e.offsetParent && e.innerText.trim()).map(e => {
  const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = s => { c.clearRect(0, 0, 1, 1); c.fillStyle = s; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; };
  const light = a => { const f = v => (v /= 255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4; return .2126*f(a[0])+.7152*f(a[1])+.0722*f(a[2]); };
  let ground = e; while (ground.parentElement && rgb(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(rgb(getComputedStyle(ground).backgroundColor))].sort();
  return (b+.05)/(a+.05); }))"""  # of the text in the elements to the first ground below it that is not transparent: WCAG's 4.5 is the least


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_widths(browser, app, scheme):
    "On a phone, a tablet and a desk, in light and dark: nothing is wider than the window on any tab, and the answers can be read"
    p = visit(browser, app, 1280, 900, color_scheme=scheme)
    compare(p, "Größe 🙂 שלום "+"nice"*12)
    done(p)
    dark = p.evaluate("getComputedStyle(document.querySelector('#board article')).backgroundColor") == "rgb(25, 28, 34)"
    assert dark == (scheme == "dark")
    for tab in ("Explore", "Votes", "API", "Compare"):
        p.set_viewport_size({"width": 1280, "height": 900})     # on a narrow page the tabs go into a menu, a moment after it became narrow
        p.wait_for_timeout(300)
        p.get_by_role("tab", name=tab).click()
        for width, height in ((320, 640), (390, 844), (820, 1180), (1280, 900)):
            p.set_viewport_size({"width": width, "height": height})
            p.wait_for_timeout(300)
            assert p.evaluate("document.documentElement.scrollWidth") <= width, (tab, width, scheme)
            if tab == "Compare":
                assert p.evaluate(contrast, "#board .answer, #board dd b, #board dt, #board .turns p, #board .gain, #top p, #top dd, #go, #guess, #after button, [role=tab]") >= 4.5, (width, scheme)
                assert len(p.screenshot(full_page=True)) > 10_000
                shot(p, f"page_{width}_{scheme}")
    p.context.close()


def test_best_of_n(page, app):
    settings(page, n=3, length=8)
    compare(page, "Hi")
    done(page)
    c = list(app.desk.comparisons.values())[-1]
    for a in c["answers"].values():
        assert len(a["samples"]) == 3 and a["reward"] == max(s["reward"] for s in a["samples"])
    expect(page.locator("#board h3 small").first).to_have_text("best of 3")


def test_first_sight(browser):
    "Nothing is clicked: what this is, who answers, what the numbers mean, and a coloured comparison with its sentence stand on the first screen; a story runs on a click"
    a = launch(inline=False)
    for width, height in ((1440, 900), (390, 844)):
        p = visit(browser, a, width, height)
        expect(p.locator("#board article")).to_have_count(4)
        for sel in ("#top h1", "#top .terms", "#top .terms div >> nth=-1", "#go", "#guess", "#examples", "#board .headline", "#board article >> nth=1 >> .answer"):
            box = p.locator(sel).first.bounding_box()
            assert box and box["y"] >= 0 and box["y"]+min(box["height"], 60) <= height, (sel, width, box)
        assert p.evaluate("document.documentElement.scrollWidth") <= width
        expect(p.locator("#board .headline")).to_have_text(re.compile(r"(PPO|GRPO|DPO): \+\d\.\d reward, [+−]?\d\.\d true reward, for \d+\.\d nats of drift"))
        if "tokens" in a.desk.records["ppo"][0]:
            assert p.locator("#board .tok").count() > 20
        assert [p.evaluate("e => e.tagName", h.element_handle()) for h in p.locator("#top h1, #board h2, #board h3").all()][:3] == ["H1", "H2", "H3"]
        shown = p.locator("#board .turns").inner_text()
        p.locator("#examples button").nth(1).click()
        expect(p.locator("#board .turns")).not_to_have_text(shown)
        done(p)
        assert not p.errors and not p.outside
        p.context.close()
    a.close()


def test_tokens_link_picture(browser, app):
    "A token says what else could have stood there, by mouse and by keyboard; a link asks the same again; a picture is drawn without the network"
    p = visit(browser, app)
    settings(p, length=8, seed=5)
    compare(p, "Which word?")
    done(p)
    tok = p.locator("#board article").nth(1).locator(".tok").first
    tok.focus()
    p.keyboard.press("Enter")
    expect(p.locator("#tip .choices table")).to_have_count(2)
    expect(p.locator("#tip .choices table").first.locator("tr")).to_have_count(5)
    p.keyboard.press("Escape")
    tok.focus()
    p.keyboard.press("ArrowRight")
    assert p.evaluate("document.activeElement.dataset.i") == "1"
    for where, says in (("header", "had not ended"), ("dl", "people like")):    # a badge says what it means, a number too
        p.locator(f"#board {where} .hint").first.click()
        expect(p.locator("#tip")).to_contain_text(says)
        p.keyboard.press("Escape")
    p.get_by_label("words that changed").check()
    expect(p.locator("#board article").nth(1).locator("ins").first).to_be_visible()
    with p.expect_download() as d:
        p.locator("#picture").click()
    assert Path(d.value.path()).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and Path(d.value.path()).stat().st_size > 20_000
    said = p.locator("#board article").nth(1).locator(".copy").get_attribute("data-copy")
    p.locator("#link").click()
    expect(p.locator("#status")).to_contain_text("link")
    assert "q=Which+word" in p.url and "seed=5" in p.url
    p.goto(p.url, wait_until="domcontentloaded")
    done_there = p.locator("#board .turns")
    expect(done_there).to_contain_text("Which word?")
    expect(p.locator("#status")).to_contain_text("Done in")
    assert p.locator("#board article").nth(1).locator(".copy").get_attribute("data-copy") == said
    assert not p.errors and not p.outside
    p.context.close()


def test_stop(page, app):
    "Stop ends the decoding, not only the picture of it; and so does a visitor who leaves"
    settings(page, length=150, n=4)
    compare(page, "A long one")
    page.locator("#board article").first.wait_for()
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped after")
    n = int(re.search(r"after (\d+)", page.locator("#status").inner_text())[1])
    assert 0 < n < 150
    c = list(app.desk.comparisons.values())[-1]
    assert c["state"] == "stopped" and {a["n_tokens"] for a in c["answers"].values()} <= set(range(n+2))
    assert not app.desk.running


def test_leaving_stops_too(browser, app):
    p = visit(browser, app)
    settings(p, length=150, n=5)
    compare(p, "Nobody will read this")
    p.locator("#board article").first.wait_for()
    p.context.close()
    for _ in range(100):
        if not app.desk.running:
            break
        time.sleep(.1)
    assert not app.desk.running and not any("Nobody" in c["prompt"] for c in app.desk.comparisons.values())


def test_refused_and_shown_as_text(page, app):
    compare(page, "coal "*200)
    expect(page.locator("#status [role=alert]")).to_contain_text("The prompt is too long")
    page.locator("#prompt textarea").evaluate("e => e.removeAttribute('maxlength')")
    compare(page, "c"*9000)
    expect(page.locator("#status [role=alert]")).to_contain_text("the limit is 8000")
    compare(page, "  ")
    expect(page.locator("#status [role=alert]")).to_contain_text("Type a prompt first")
    bad = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1> ${window.hacked=1} {{x}} `y` </div>"
    settings(page, length=4)
    compare(page, bad)
    done(page)
    expect(page.locator("#board .turns")).to_contain_text(bad)
    assert page.evaluate("window.hacked") is None
    settings(page, seed="1.5")
    compare(page, "Hi")
    expect(page.locator("#status [role=alert]")).to_contain_text("seed: expected a whole number, got 1.5")
    settings(page, seed="")
    compare(page, "Hi")
    done(page)
    assert list(app.desk.comparisons.values())[-1]["seed"] == 0
    odd = "Größe 🙂👩‍👧 שלום "+"nice"*12
    compare(page, odd)
    done(page)
    expect(page.locator("#board .turns")).to_contain_text(odd)


def test_answers_are_text(browser, folder, tmp_path):
    "Stored prompts, answers and names that would run as HTML are shown as they are, in Compare, Explore and Votes"
    bad = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>\"><svg onload='window.hacked=1'> ${window.hacked=1} {{x}} `y` &lt;i&gt; [a](javascript:window.hacked=1)"
    shutil.copytree(folder/"output_samples", tmp_path/"s")
    for k in ("reference", "ppo"):
        f = tmp_path/"s"/f"{k}_samples.json"
        rows = json.loads(f.read_text("utf-8"))
        for r in rows:
            r.update(prompt=f"\n\nHuman: {bad} {r['prompt'].split('Human:')[-1]}", response=f" {bad}")
        write_json(f, rows)
    for k in ("grpo", "dpo"):
        (tmp_path/"s"/f"{k}_samples.json").unlink()
    rows = [dict(r, model="<b onclick=window.hacked=1>x") for r in rows]
    write_json(tmp_path/"s"/"<b onclick=window.hacked=1>x_samples.json", rows)
    a = launch(tmp_path/"s", inline=False)
    p = visit(browser, a)
    assert a.desk.names()[-1] == "<b onclick=window.hacked=1>x", a.desk.problems
    p.evaluate(watch)
    p.get_by_label("Stored prompt").wait_for()
    p.locator("#go").click()
    done(p)
    assert [t.strip() for t in p.locator("#board .answer").all_inner_texts()] == [bad]*3
    expect(p.locator("#board .turns")).to_contain_text(bad)
    expect(p.locator("#board h3").nth(2)).to_have_text("<b onclick=window.hacked=1>x")
    p.get_by_role("tab", name="Explore").click()
    expect(p.locator("#x-board .answer").first).to_have_text(bad)
    c = list(a.desk.comparisons.values())[-1]
    a.desk.vote(c["id"], a.desk.names()[-1])
    p.get_by_role("tab", name="Votes").click()
    expect(p.locator("#v-board")).to_contain_text("1 votes")
    assert p.evaluate("window.hacked") is None and not p.errors
    ours = "[aria-label$='over KL']"                      # the dots beside best-of-n
    foreign = f"#board img, #board svg:not({ours}), #board svg svg, #board script, #board [onload], #board [onerror], #x-board img, #v-board [onclick]"
    assert p.locator(f"#board svg{ours}").count() and not p.locator(foreign).count()
    p.context.close()
    a.close()


def test_dialogue(page):
    settings(page, length=4)
    compare(page, "First question")
    done(page)
    page.locator("#continue").click()
    expect(page.locator("#past")).to_contain_text("First question")
    compare(page, "Second question")
    expect(page.locator("#board .turn")).to_have_count(3)
    done(page)


def test_blind_vote(page, app):
    "Shuffled and unnamed until the vote, by button and by key; stored, exported, read by the loader"
    before = len(read_votes(app.desk.votes)) if app.desk.votes.exists() else 0
    settings(page, length=8)
    page.get_by_label("Blind vote").check()
    expect(page.get_by_role("radiogroup", name="Colour of the tokens")).to_be_visible()
    orders = set()
    for i, vote in enumerate(("button", "2", "t", "b")):
        compare(page, f"Blind {i}")
        done(page)
        expect(page.locator("#vote-1")).to_be_visible()
        html = page.locator("#board").inner_html()
        assert not re.search(r"(?<![a-z0-9])(reference|ppo|grpo|dpo|reward|KL)(?![a-z0-9])", re.sub(r"class=\"[^\"]*\"", "", html), re.I)
        c = list(app.desk.comparisons.values())[-1]
        orders.add(tuple(c["order"]))
        texts = [c["answers"][k]["response"].strip() for k in c["order"]]
        assert all(same_text(*o) for o in zip(page.locator("#board .copy").evaluate_all("bs => bs.map(b => b.dataset.copy)"), texts, strict=True))
        if vote == "button":
            shot(page, "vote")
            page.locator("#vote-1").click()
        else:
            page.locator("#status").click()
            page.keyboard.press(vote)
        expect(page.locator("#status")).to_contain_text(f"Saved: vote {before+i+1}")
        expect(page.locator("#board .voted")).to_be_visible()
        expect(page.locator("#vote-1")).not_to_be_visible()
        row = read_votes(app.desk.votes)[-1]
        assert row["vote"] == {"button": c["order"][0], "2": c["order"][1], "t": "tie", "b": "bad"}[vote] and row["order"] == c["order"]
        assert {"prompt", "answers", "order", "vote", "time", "reward"} <= set(row) and "gold_reward" not in row  # "Blind 1" is no prompt of the world
    page.get_by_role("tab", name="Votes").click()
    expect(page.locator("#v-board")).to_contain_text(f"{before+4} votes, 1 ties, 1 all bad")
    with page.expect_download() as d:
        page.locator("#v-export").click()
    pairs = load_preferences(str(app.desk.votes.with_name("preferences.jsonl")))
    assert Path(d.value.path()).read_text() == app.desk.votes.with_name("preferences.jsonl").read_text() and len(pairs) == 6
    expect(page.locator("#v-status")).to_contain_text("training needs 3 at least")  # the pairs are of two prompts
    page.locator("#v-train").click()
    expect(page.locator("#v-status [role=alert]")).to_contain_text("more, then a model can learn")


def test_explore(page, app):
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator("#x-status")).to_contain_text("1 of 6 found among 6 prompts")
    first = page.locator("#x-board .turns").inner_text()
    page.locator("#x-next").click()
    expect(page.locator("#x-status")).to_contain_text("2 of 6 found")
    assert page.locator("#x-board .turns").inner_text() != first
    page.locator("#x-back").click()
    expect(page.locator("#x-board .turns")).to_have_text(first)
    page.get_by_label("Text in prompt or answer").fill("no such text anywhere")
    expect(page.locator("#x-status")).to_contain_text("No stored answer is like that")
    page.get_by_label("Text in prompt or answer").fill("")
    page.locator("#x-limits button").first.click()
    page.get_by_label("Reward gap to the reference at least").fill("many")
    expect(page.locator("#x-status")).to_contain_text("A limit is a number")
    page.get_by_label("Reward gap to the reference at least").fill("0")
    gap = [a["reward"]-b["reward"] for a, b in zip(app.desk.records["ppo"], app.desk.records["reference"])]
    expect(page.locator("#x-status")).to_contain_text(f"1 of {sum(g >= 0 for g in gap)} found" if any(g >= 0 for g in gap) else "No stored")
    shot(page, "explore")


def test_keyboard_and_labels(page):
    "Every control has a name, and the tab key reaches the prompt, Compare and the settings"
    for b in page.locator("button:visible, input:visible, textarea:visible").all():
        assert b.evaluate("e => (e.ariaLabel || e.innerText || e.title || [...(e.labels || [])].map(l => l.innerText).join('') || e.getAttribute('aria-labelledby') || '').trim()"), b.evaluate("e => e.outerHTML")
    page.get_by_label("Prompt", exact=True).focus()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]:not(input)')?.id || document.activeElement.innerText"))
    assert {"go", "guess"} <= reached and any("Options" in r or "settings" in r for r in reached | {page.locator("#settings button").inner_text()}), reached


def test_samples_only(browser, folder, tmp_path):
    "Files alone: no models, the same page"
    shutil.copytree(folder/"output_samples", tmp_path/"s")
    a = launch(tmp_path/"s", inline=False)
    p = visit(browser, a)
    expect(p.locator("#top .mode")).to_have_text("samples only")
    expect(p.locator("#prompt")).not_to_be_visible()
    expect(p.locator("#board article")).to_have_count(4)  # nothing was clicked
    r = next(r for r in a.desk.records["ppo"] if HH.asked(r["prompt"]) in p.locator("#board .turn p").inner_text())
    assert same_text(p.locator("#board .copy").nth(1).get_attribute("data-copy"), r["response"])
    expect(p.locator("#board .headline")).to_contain_text("reward")
    expect(p.locator("#continue")).not_to_be_visible()    # stored answers do not go on
    p.locator("#guess").click()                           # one click, and the second is a vote
    p.locator("#vote-3").click()
    expect(p.locator("#status")).to_contain_text("Saved: vote 1")
    assert not a.desk.players and not p.errors and len(read_votes(tmp_path/"s"/"votes.jsonl")) == 1
    p.context.close()
    a.close()


def test_page_before_models(folder):
    "The first page, all stored answers and votes need nothing that takes seconds to import: not transformers, not the training loop"
    code = """if True:
        import sys
        from rlhf_nb.cards import board,votes_html
        from rlhf_nb.ballots import vote_summary
        from rlhf_nb.cards import find
        from rlhf_nb.cards import mk_prompt
        from rlhf_nb.desk import Desk
        from rlhf_nb.app import mk_app
        d = Desk(sys.argv[1], live=False).load()
        mk_app(d)
        board(d.stored(d.ask(d.prompts[0])))
        find(d.records, "ppo", failure="empty")
        mk_prompt("Human: a Assistant: b Human: c")
        vote = dict(prompt=d.prompts[0], answers=dict(reference="a", ppo="b"), order=["reference", "ppo"], vote="ppo", reward=dict(reference=0., ppo=1.))
        votes_html(vote_summary([vote]*3))
        print(len(d.records), d.state, [m for m in ("transformers", "accelerate", "datasets", "matplotlib") if m in sys.modules])"""
    r = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert r.stdout.strip() == f"{len(names)} samples []", r.stdout+r.stderr


def test_makes_the_demo(browser, tmp_path):
    "Without a run: samples of the package, and a button that makes the demo's run, here a tiny one, and opens it"
    flags = [f for o in small for f in ("--set", o)]
    a = launch(demo=(tmp_path/"demo", ("--stages", "sft", "reward", *flags)), inline=False)
    p = visit(browser, a)
    expect(p.locator("#top")).to_contain_text("samples that come with the package")
    shot(p, "no_run")
    p.locator("#make").click()
    expect(p.locator("#making progress")).to_be_visible()
    p.reload()                                            # the progress is there again
    expect(p.locator("#making progress")).to_be_visible()
    expect(p.locator("#top")).to_contain_text(str(tmp_path/"demo"), timeout=180_000)
    expect(p.locator("#top .mode")).to_have_text("live")
    expect(p.locator("#prompt")).to_be_visible()
    p.context.close()
    made, make = a.desk.maker, next(i for i, f in a.fns.items() if f.api_name == "on_make")
    join = lambda i: raw(a, "POST", "/gradio_api/queue/join", json.dumps(dict(data=[], fn_index=i, session_hash="late")).encode(), **{"Content-Type": "application/json"})
    assert join(make)[0] == 200  # a visitor whose page is old: told that it is done, nothing is made again
    assert b"Done: " in raw(a, "GET", "/gradio_api/queue/data?session_hash=late")[1] and a.desk.maker is made
    a.close()


@pytest.mark.parametrize("what", ["missing", "half", "broken model", "foreign samples", "empty"])
def test_bad_folders(folder, tmp_path, capfd, what):
    "A message in the terminal and on the page; what is usable is used"
    run = tmp_path/"run"
    if what != "missing":
        shutil.copytree(folder, run, ignore=shutil.ignore_patterns("votes*"))
    if what in ("half", "empty"):
        for d in run.iterdir():
            if d.is_dir() and (what == "empty" or d.name != "output_samples"):
                shutil.rmtree(d)
    if what == "broken model":
        f = run/"grpo_model"/"model.safetensors"
        f.write_bytes(f.read_bytes()[:1000])
    if what == "foreign samples":
        write_json(run/"output_samples"/"ppo_samples.json", [{"instruction": "x", "output": "y"}])
    desk = Desk(run).load()
    said = capfd.readouterr().err
    want = {"missing": "no such folder", "half": "reference", "broken model": "grpo", "foreign samples": "ppo_samples.json", "empty": "neither finished models nor samples"}[what]
    state = {"missing": "samples", "half": "samples", "broken model": "live", "foreign samples": "live", "empty": "empty"}[what]
    assert want in said and desk.state == state and any(want in s for s in desk.problems)
    if what == "broken model":
        assert desk.names() == ["reference", "ppo", "dpo"]


def test_problems_stand_on_the_page(browser, tmp_path):
    a = launch(tmp_path/"nothing", inline=False)
    p = visit(browser, a)
    expect(p.locator("#top .problems")).to_contain_text("no such folder")
    p.context.close()
    a.close()


def raw(app, method, path, body=b"", **headers):
    "A request as it stands, without a client that tidies the path"
    c = http.client.HTTPConnection("127.0.0.1", app.server_port, timeout=60)
    c.putrequest(method, path, skip_host="Host" in headers)
    sized = {} if "Transfer-Encoding" in headers else {"Content-Length": str(len(body))}    # both at once are no request
    for k, v in {**sized, **headers}.items():
        c.putheader(k, v)
    c.endheaders(body)
    r = c.getresponse()
    return r.status, r.read()


def test_no_file_gets_out_or_in(app, tmp_path):
    secret = tmp_path/"secret.txt"
    secret.write_text("open sesame")
    inside = app.desk.path/"config.yaml"
    up = "../"*12
    for f in (secret, inside):
        for base in ("/file=", "/gradio_api/file=", "/gradio_api/file/", "/gradio_api//file=", "/assets/", "/static/", "/gradio_api/static/", "/theme/", "/svelte/", "/gradio_api/proxy=http://127.0.0.1/", "/custom_component/"):
            for path in (str(f), up+str(f), up.replace("/", "%2f")+str(f), str(f).replace("/", "%2F"), "....//"*8+str(f)):
                status, body = raw(app, "GET", base+path)
                assert b"sesame" not in body and b"preset:" not in body, (base, path, status)
    boundary = b"--x\r\nContent-Disposition: form-data; name=\"files\"; filename=\"a.txt\"\r\n\r\nhi\r\n--x--\r\n"
    for base in ("/upload", "/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/%75pload"):
        assert raw(app, "POST", base, boundary, **{"Content-Type": "multipart/form-data; boundary=x"})[0] in (404, 405)
    assert raw(app, "POST", "/gradio_api/call/compare", b"x"*300_000)[0] == 413
    assert raw(app, "POST", "/gradio_api/call/compare", b"0\r\n\r\n", **{"Transfer-Encoding": "chunked"})[0] == 413


def test_api(app):
    from gradio_client import Client
    c = Client(app.local_url, verbose=False)
    updates = list(c.submit("What is the colour of coal?", ["reference", "ppo"], 1., 24, 3, 2, api_name="/compare"))
    assert len(updates) > 2 and updates[0]["state"] == "writing" and updates[-1]["state"] == "done"
    with pytest.raises(Exception, match="limit is"):
        c.predict("x", None, 1., 1024, 0, 64, api_name="/compare")
    with pytest.raises(Exception, match="already"):
        [c.predict(updates[-1]["id"], "tie", api_name="/vote") for _ in "ab"]
    assert {e["path"] if isinstance(e, dict) else e for e in c.view_api(return_format="dict")["named_endpoints"]} == {"/compare", "/vote"}


@pytest.fixture
def locked(folder):
    a = launch(folder/"output_samples", password="Größe", inline=False)
    yield a
    a.close()


def log_in(a, word, name="me", **headers):
    return raw(a, "POST", "/login", f"username={name}&password={word}".encode(), **{"Content-Type": "application/x-www-form-urlencoded", **headers})[0]


def test_password(locked):
    a = locked
    assert raw(a, "GET", "/config")[0] == 401 and raw(a, "POST", "/gradio_api/run/vote", b'{"data": ["a", "tie"]}', **{"Content-Type": "application/json"})[0] == 401
    assert log_in(a, "wrong") == 400 and log_in(a, "") == 400 and log_in(a, "Gr%C3%B6%C3%9Fe") == 200 and log_in(a, "Gr%C3%B6%C3%9Fe", name="") == 200


def test_password_in_the_browser(browser, locked):
    "A wrong password empties the field of the name; the right one then opens the page all the same"
    p = browser.new_page()
    p.goto(locked.local_url)
    name, word = p.locator("input").nth(0), p.locator("input").nth(1)
    name.fill("me")
    word.fill("wrong")
    p.get_by_role("button", name="Login").click()
    expect(p.get_by_text("Incorrect Credentials")).to_be_visible()
    word.fill("Größe")
    p.get_by_role("button", name="Login").click()
    expect(p.locator("#top .mode")).to_have_text("samples only")
    p.close()


def test_a_password_cannot_be_guessed(locked):
    "In three seconds a few tries are looked at, from however many addresses a proxy may name; the right password still opens the page"
    codes, t0 = [], time.perf_counter()
    def guess(i):
        while time.perf_counter()-t0 < 3:
            codes.append(log_in(locked, f"guess{i}", **({"X-Forwarded-For": f"10.{i}.{len(codes) % 250}.1"} if i % 2 else {})))
    threads = [threading.Thread(target=guess, args=(i,)) for i in range(60)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    looked_at, took = codes.count(400), time.perf_counter()-t0
    assert set(codes) == {400, 429} and looked_at <= 20+1+5*took, (looked_at, took, len(codes))
    end = time.perf_counter()+30
    while (code := log_in(locked, "Gr%C3%B6%C3%9Fe")) == 429 and time.perf_counter() < end:
        time.sleep(.5)
    assert code == 200


def status(a, host, path="/config", data=None, **headers):
    return raw(a, "POST" if data else "GET", path, json.dumps(data).encode() if data else b"", Host=host, **{"Content-Type": "application/json"} if data else {}, **headers)[0]


def test_only_names_of_this_machine(app, folder):
    "DNS rebinding and requests from other sites: the names in Host and Origin are read, for pages, calls and streams"
    port, six = app.server_port, dict(data=["hi", None, 1.0, 4, 0, 1])
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", "localhost.:80", f"[::1]:{port}", "127.1.2.3"):
        assert status(app, host) == 200, host
    assert status(app, f"localhost:{port}", "/gradio_api/call/compare", six, Origin=f"http://localhost:{port}") == 200
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "10.1.2.3", "[fd00::1]", f"localhost:{port}:80", "localhost@evil.example", ""):
        for path, data in (("/", None), ("/config", None), ("/assets/index.js", None), ("/gradio_api/call/compare", six), ("/gradio_api/run/vote", dict(data=["a", "tie"])), ("/gradio_api/queue/data?session_hash=a", None), ("/login", dict(a=1))):
            assert status(app, host, path, data) in (403, 400), (host, path)
    for origin in ("http://evil.example", "null", f"http://localhost.evil.example:{port}", "https://10.1.2.3"):
        assert status(app, f"localhost:{port}", "/gradio_api/call/compare", six, Origin=origin) == 403, origin
    a = launch(folder/"output_samples", host="0.0.0.0", password="x", allow_host=["proxy.example", ".lab.example"], inline=False)
    mine = socket.gethostname()
    assert {status(a, h) for h in ("localhost", "proxy.example", "PROXY.example.:443", "a.lab.example", mine, mine.upper(), f"0.0.0.0:{a.server_port}")} == {401}
    assert {status(a, h) for h in ("evil.example", "lab.example", "xlab.example", "proxy.example.evil.example", "10.1.2.3")} == {403}
    a.close()


def test_preflight_of_another_site(app):
    "OPTIONS, which gradio answers by itself, is read like everything else"
    port = app.server_port
    ask = lambda host, origin, path="/gradio_api/call/compare": raw(app, "OPTIONS", path, Host=host, Origin=origin, **{"Access-Control-Request-Method": "POST"})[0]
    assert ask(f"localhost:{port}", f"http://localhost:{port}") == 200
    for host, origin in ((f"evil.example:{port}", f"http://evil.example:{port}"), ("evil.example", f"http://localhost:{port}"), (f"localhost:{port}", "http://evil.example"), ("localhost", "null")):
        assert {ask(host, origin, path) for path in ("/", "/config", "/gradio_api/call/compare", "/gradio_api/queue/join", "/login", "/nothing")} == {403}, (host, origin)


def test_only_functions_of_the_page(app):
    "The page calls by number, a program calls two functions by name; nothing else is there"
    post = lambda path, **o: raw(app, "POST", f"/gradio_api/{path}", json.dumps(o).encode(), **{"Content-Type": "application/json"})[0]
    fns = json.loads(raw(app, "GET", "/config")[1])["dependencies"]
    assert not any("make" in str(f["api_name"]) for f in fns)
    private = [f["api_name"] for f in fns if f["api_visibility"] == "private"]
    for way in ("call", "call/v2", "run", "api"):
        assert {post(f"{way}/{name}", data=[]) for name in private} == {404}, way
    count = next(f["id"] for f in fns if f["api_name"] == "on_count")
    assert post("run/predict", data=[], fn_index=count, session_hash="a") == 200
    assert post("run/on_count", data=[], fn_index=count, session_hash="a") == 404
    assert {post("queue/join", data=[], fn_index=i, session_hash="a") for i in (-1, 10**6, True, str(count), 1.5, [], {})} == {404}
    assert {post("call/compare", data=d) for d in ([], ["hi"], ["hi", None, 1., 4, 0, 1, 2])} == {422}


def test_wrong_types_are_named(app, capfd):
    "A value of another type, by the API: an error that says which; no traceback in the terminal"
    from gradio_client import Client
    c = Client(app.local_url, verbose=False)
    capfd.readouterr()
    for args, said in ((["hi", ["ppo", "ppo"]], "named twice"), (["hi", "ppo"], "list of names"), (["hi", None, "hot"], "temperature: expected a number"), (["hi", None, 1., 2.5], "length: expected a whole number"),
                       (["hi", None, 1., 4, 0, "2"], "samples: expected a whole number"), (["hi", None, 1., 4, 1.5], "seed: expected a whole number"), ([5], "prompt: expected text"), (["hi", []], "one to four models")):
        with pytest.raises(Exception, match=said):
            c.predict(*args, api_name="/compare")
    for args in ((None, "ppo"), ([], "tie"), ("x", {})):
        with pytest.raises(Exception, match="gone"):
            c.predict(*args, api_name="/vote")
    assert "Traceback" not in capfd.readouterr().err
    assert c.predict("hi", None, None, 4, None, None, api_name="/compare")["seed"] == 0


def test_no_text_takes_long():
    "Whatever stands in a prompt, an answer or a filter, reading and showing it takes no more than its length: 100,000 characters, a CPU-second or two"
    units = ["\n", " \n", "\n\n", " ", "\t", "\r\n", "a", "a ", ". ", ".", "`", "<", "&", "{", "Human:", "\nHuman", "\n\nHuman:", "\nAssistant:\n", "n't ", "abcabd", "is it true that ", "i am just really ", "1,", "\u2028", "🙂", "-"]
    desk, slow = Desk(live=False).load(), {}
    for u in units:
        for text in (u*(100_000//len(u))+"x", "Human: x"+u*(100_000//len(u))+"Assistant"):
            r = dict(desk.records["ppo"][0], prompt=f"\n\nHuman: {text}\n\nAssistant:", response=text, tokens=[dict(text=text, kl=.5, log_prob=-1.)])
            for name, f in dict(mk_prompt=lambda: mk_prompt(text), detect=lambda: detect(r), dialogue=lambda: dialogue(r["prompt"]), card=lambda: card(r, text), limit=lambda: _limit(text), host=lambda: host_name(text)).items():
                t = time.process_time()
                try:
                    f()
                except ValueError:
                    pass
                if (t := time.process_time()-t) > 2:
                    slow[name, text[:20]] = t
    assert not slow, slow


def test_deleted_run(browser, folder, tmp_path):
    "A run that is deleted while its page is open: it is not made again by a vote, and who comes later can still ask"
    shutil.copytree(folder, tmp_path/"run", ignore=shutil.ignore_patterns("votes*", "preferences*"))
    a = launch(tmp_path/"run", inline=False)
    while a.desk.state == "loading":
        time.sleep(.05)
    shutil.rmtree(tmp_path/"run")
    p = visit(browser, a)
    settings(p, length=4)
    p.get_by_label("Blind vote").check()
    compare(p, "Still there?")
    done(p)
    p.locator("#vote-1").click()
    expect(p.locator("#status [role=alert]")).to_contain_text("this folder is gone")
    assert not (tmp_path/"run").exists()
    p.context.close()
    a.close()


def test_votes_train_a_policy(folder, tmp_path):
    "The documented command: DPO on exported votes"
    desk = Desk(folder, live=False, votes=tmp_path/"votes.jsonl").load()
    for p in desk.prompts*1:
        c = desk.ask(p)
        desk.stored(c)
        desk.vote(c["id"], "ppo")
    pairs = desk.export_votes()
    flags = ["--set", "sft.skip=true", "--model", str(folder/"reference"), "--data", str(pairs), "--out", str(tmp_path/"out"), "--set", "dpo.updates=2", "--set", "data.test_size=0.3"]
    r = subprocess.run([sys.executable, "-c", "from rlhf_nb.cli import main; main()", "run", "--stages", "sft", "dpo", *flags], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert (tmp_path/"out"/"dpo_model"/"model.safetensors").exists()


def test_a_space_starts_offline(folder, tmp_path):
    "What `rlhf_nb app RUN --space FOLDER` writes is a page by itself, without models and without network"
    said = subprocess.run([sys.executable, "-m", "rlhf_nb", "app", str(folder), "--space", str(tmp_path/"space")], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": str(port)}
    server = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path/"space", env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline().startswith("http"), "it did not start"
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        c.request("GET", "/config")
        assert c.getresponse().status == 200
    finally:
        server.terminate()
        server.wait()
    with pytest.raises(ValueError, match="without models"):
        launch(folder, host="0.0.0.0", public=True, inline=False)


def part_of(folder, to, keep, **data):
    "A copy of a run with some of its folders, and with other settings of its data"
    to.mkdir()
    for k in keep:
        shutil.copytree(folder/k, to/k)
    text = (folder/"config.yaml").read_text("utf-8")
    for k, v in data.items():
        text, n = re.subn(rf"\b{k}: \d+", f"{k}: {v}", text)
        assert n == 1, k
    (to/"config.yaml").write_text(text, "utf-8")
    return to


def test_a_run_with_dpo_alone(browser, folder, tmp_path):
    "No samples and no reward model: the page is live, counts its answers in words, and takes a prompt"
    a = launch(part_of(folder, tmp_path/"run", ["reference", "dpo_model"]), inline=False)
    p = visit(browser, a)
    expect(p.locator("#top .mode")).to_have_text("live")
    expect(p.locator("#top h1")).to_have_text("One prompt, two answers")
    expect(p.locator("#top .problems")).to_contain_text("answers come without a reward")
    settings(p, length=6)
    p.get_by_label("Prompt", exact=True).fill("Hello")
    p.get_by_label("Prompt", exact=True).press("Enter")
    expect(p.locator("#status")).to_contain_text("Done in")
    expect(p.locator("#board h3")).to_have_text(["Reference", "DPO"])
    assert all(t.strip() for t in p.locator("#board .answer").all_inner_texts()) and not p.errors
    p.context.close()
    a.close()


def test_the_longest_answer_is_written(browser, folder, tmp_path):
    "A model of 256 positions whose prompts may take 246: no answer can be asked for that has no room, and the longest is written, to the longest prompt too"
    a = launch(part_of(folder, tmp_path/"run", ["reference", "ppo_model", "reward_model", "output_samples"], max_prompt=246), inline=False)
    p = visit(browser, a)
    expect(p.locator("#top .mode")).to_have_text("live")
    expect(p.locator("#board article")).to_have_count(2)          # the run's own 24 tokens have no room either
    settings(p)
    field = p.locator("#length input[type=range]")
    assert (field.get_attribute("max"), field.input_value()) == ("10", "10")
    tok, words = a.desk.players["ppo"].template.tok, 200
    while len(tok.encode(mk_prompt("coal "*words))) > 246:
        words -= 1
    compare(p, "coal "*words)
    done(p)
    cut = [o["n_tokens"] for o in list(a.desk.comparisons.values())[-1]["answers"].values() if not o["finished"]]
    assert set(cut) <= {10} and not p.errors
    p.context.close()
    a.close()


@pytest.mark.parametrize("field", ["seed", "temperature", "n", "length"])
def test_an_emptied_field(page, app, field):
    "A number that is deleted stands for its default, or for the least there is: Compare answers, whichever it is"
    settings(page, length=4)
    box = page.locator(f"#{field} input[type=number]").first
    box.fill("")
    compare(page, f"Without {field}")
    done(page)
    assert list(app.desk.comparisons.values())[-1]["prompt"] == mk_prompt(f"Without {field}")


def test_the_program_on_the_page_runs(page, app, locked, browser):
    "The API tab names the address of this page, and a password where one is asked for; what stands there works as it is"
    page.get_by_role("tab", name="API").click()
    code = page.locator("#snippet code").inner_text()
    assert f"Client('{app.local_url}')" in code and "auth" not in code
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0 and [line.split()[0] for line in r.stdout.splitlines() if line.split()[0] in names] == names, r.stdout+r.stderr
    p = browser.new_page()
    p.goto(locked.local_url)
    p.locator("input").nth(0).fill("me")
    p.locator("input").nth(1).fill("Größe")
    p.get_by_role("button", name="Login").click()
    p.get_by_role("tab", name="API").click()
    code = p.locator("#snippet code").inner_text()
    assert f"Client('{locked.local_url}', auth=('me', 'PASSWORD'))" in code
    ask = code.replace("PASSWORD", "Größe").replace("'What is the colour of coal?'", repr(locked.desk.prompts[0]))
    r = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert r.returncode == 0 and "ppo" in r.stdout, r.stdout+r.stderr
    p.close()


def next_one(p, act):
    "Do something that brings the next prompt; what it is, once it can be voted on"
    p.wait_for_timeout(800)                # a second press within .7 s is none
    before = p.locator("#board .turns").inner_text()
    act()
    expect(p.locator("#board .turns")).not_to_have_text(before, use_inner_text=True)
    expect(p.locator("#vote-tie")).to_be_visible()
    return p.locator("#board .turns").inner_text()


@pytest.mark.parametrize("live", [False, True])
def test_votes_flow(browser, folder, tmp_path, live):
    "After a vote the next prompt comes by itself, by button and by key, unnamed; what was voted is said, and taken back; two presses are one vote; a prompt can be skipped; at the end it says so"
    shutil.copytree(folder, tmp_path/"run", ignore=shutil.ignore_patterns("votes*", "preferences*"))
    a = launch(tmp_path/"run", inline=False, live=live)
    p = visit(browser, a, 390, 844)
    expect(p.locator("#board article")).to_have_count(4)
    file, seen = tmp_path/"run"/"votes.jsonl", []
    if live:
        settings(p, length=6)
    shown = lambda: list(a.desk.comparisons.values())[-1]
    p.locator("#guess").click()
    expect(p.locator("#vote-tie")).to_be_visible()
    box = p.locator("#vote-1").bounding_box()
    assert box["y"]+box["height"] <= 844, "the buttons of a vote stay in view"
    for press in ("button", "2", "t"):
        c = shown()
        seen.append(c["prompt"])
        next_one(p, p.locator("#vote-1").click if press == "button" else lambda: p.keyboard.press(press))
        row = read_votes(file)[-1]
        assert (row["prompt"], row["blind"]) == (c["prompt"], True) and row["vote"] == {"button": c["order"][0], "2": c["order"][1], "t": "tie"}[press]
        expect(p.locator("#voted")).to_contain_text(f"Vote {len(seen)}: {'a tie' if press == 't' else app_title(row['vote'])}")
        assert all(app_title(k) in p.locator("#voted").inner_text() for k in names)
        assert p.locator("#board h3").all_inner_texts() == [f"Answer {x}" for x in "ABCD"]      # the next is as blind as the first
    assert len(set(seen)) == 3
    p.keyboard.press("u")
    expect(p.locator("#status")).to_contain_text("Taken back: 2 votes are left")
    expect(p.locator("#vote-1")).to_contain_text(app_title(c["order"][0]))      # whose they are is known: the buttons say so
    expect(p.locator("#board .turns")).to_contain_text(HH.asked(seen[-1]))
    next_one(p, lambda: p.keyboard.press("2"))
    row = read_votes(file)[-1]
    assert (row["prompt"], row["vote"], row["blind"], len(read_votes(file))) == (seen[-1], c["order"][1], False, 3)
    skipped = shown()["prompt"]
    next_one(p, lambda: p.keyboard.press("s"))
    assert len(read_votes(file)) == 3 and shown()["prompt"] not in (*seen, skipped)
    next_one(p, lambda: (p.keyboard.press("3"), p.keyboard.press("3")))
    p.wait_for_timeout(1000)
    assert len(read_votes(file)) == 4                         # nobody has read the one that came between
    next_one(p, lambda: p.keyboard.press("b"))
    assert shown()["prompt"] == skipped                       # it waits at the end
    p.wait_for_timeout(800)
    p.keyboard.press("1")
    expect(p.locator("#status")).to_contain_text("a vote on every stored prompt")
    assert len({v["prompt"] for v in read_votes(file)}) == 6 and not p.errors
    p.context.close()
    a.close()


def test_one_click_trains_on_the_votes(browser, folder, tmp_path, monkeypatch):
    "The last vote that is needed brings a button; its click trains, follows it on the tab of the votes, and the model can be compared"
    monkeypatch.setattr("rlhf_nb.booth.enough_votes", 4)
    shutil.copytree(folder, tmp_path/"run", ignore=shutil.ignore_patterns("votes*", "preferences*"))
    a = launch(tmp_path/"run", inline=False)
    p = visit(browser, a)
    expect(p.locator("#top .mode")).to_have_text("live")
    settings(p, length=6)
    p.locator("#guess").click()
    expect(p.locator("#vote-tie")).to_be_visible()
    for i in range(4):
        expect(p.locator("#train-now")).not_to_be_visible()
        next_one(p, lambda: p.keyboard.press("1"))
    p.locator("#train-now").click()
    expect(p.locator("#v-status progress")).to_be_visible()
    expect(p.locator("#v-status")).to_contain_text("learned from", timeout=180_000)
    assert "your_votes" in a.desk.names() and not p.errors
    p.context.close()
    a.close()


on_axis = """svg => { const ticks = [...svg.querySelectorAll('text:not([class*=e])')].filter(t => t.getAttribute('text-anchor') === 'middle' && !isNaN(t.textContent)).map(t => [+t.textContent, +t.getAttribute('x')]);
  return [ticks, [...svg.querySelectorAll('.dot')].map(d => [d.getAttribute('aria-label'), +d.querySelector('circle').getAttribute('cx'), +d.querySelector('circle').getAttribute('cy')])]; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_answers_as_dots(browser, folder, app, scheme):
    "Each answer stands where the numbers of its axes say, higher where its reward is higher; the mean of many is a ring; it can be read on a phone, by keyboard, and not before a vote"
    p = visit(browser, app, 390, 844, color_scheme=scheme)
    settings(p, n=16, length=8)
    compare(p, f"Where do they stand? {scheme}")
    done(p)
    c = list(app.desk.comparisons.values())[-1]
    ticks, dots = p.locator("#board .plane svg.reward").evaluate(on_axis)
    (a, at), (b, to) = ticks[0], ticks[-1]
    assert len(ticks) > 1 and len(dots) == 8
    for k, o in c["answers"].items():
        one = next(d for d in dots if d[0].startswith(f"{app_title(k)}: "))
        mean = next(d for d in dots if d[0].startswith(f"{app_title(k)}, mean of 16"))
        kls, rewards = ([s[x] for s in o["samples"]] for x in ("kl", "reward"))
        for d, kl, reward in ((one, o["kl"], o["reward"]), (mean, sum(kls)/16, sum(rewards)/16)):
            assert abs(a+(d[1]-at)/(to-at)*(b-a)-kl) < .02*max(1, b), (k, d, kl)
            assert f"reward {reward:.2f}".replace("-", "−") in d[0]
        assert same_text(one[0].partition(" nats. ")[2], o["response"][:300]) or len(o["response"]) > 300
    by_reward = sorted(c["answers"].values(), key=lambda o: o["reward"])
    heights = [next(d[2] for d in dots if d[0].startswith(app_title(o["model"])+": ")) for o in by_reward]
    assert heights == sorted(heights, reverse=True)
    expect(p.locator("#board .plane")).to_contain_text("on this prompt, from 16 answers")
    drawn = contrast.replace("e.offsetParent && e.innerText.trim()", "e.textContent.trim()").replace("getComputedStyle(e).color", "getComputedStyle(e).fill")
    assert p.evaluate(drawn, "#board .plane text") >= 4.5 and p.evaluate(contrast, "#board .plane figcaption, #board .plane b") >= 4.5
    assert p.evaluate("Math.min(...[...document.querySelectorAll('#board .plane text')].map(t => parseFloat(getComputedStyle(t).fontSize)*t.getScreenCTM().a))") >= 10
    assert p.evaluate("document.documentElement.scrollWidth") <= 390
    p.locator("#board .plane .dot").first.focus()
    p.keyboard.press("Enter")
    expect(p.locator("#tip")).to_contain_text("nats")
    p.keyboard.press("Escape")
    shot(p, f"dots_{scheme}")
    p.get_by_label("Blind vote").check()
    compare(p, "And before a vote?")
    done(p)
    expect(p.locator("#board .plane")).to_have_count(0)
    assert not p.errors
    p.context.close()


def test_a_named_mark_is_one(browser):
    "On a phone no question mark stands on a line of its own: it goes with the last word before it"
    a = launch(inline=False)
    for width in (320, 360, 390):
        p = visit(browser, a, width, 844)
        expect(p.locator("#board article")).to_have_count(4)
        alone = p.locator("#board dt .last").evaluate_all("es => es.filter(e => e.getClientRects().length > 1).length")
        beyond = p.locator("#board article").evaluate_all("es => es.flatMap(e => [...e.querySelectorAll('dd b, .gain, dt')].map(o => o.getBoundingClientRect().right-e.getBoundingClientRect().right)).filter(x => x > 0).length")
        assert (alone, beyond) == (0, 0), width
        p.context.close()
    a.close()


def test_chat_model_on_the_page(browser, chat_model, chat_pairs, tmp_path):  # noqa: F811
    "A chat model with its own template: nothing of the embedded world, a system turn of one's own and those of the data, several turns, any script, and a link that asks for all of it again"
    train(chat_model, chat_pairs, tmp_path/"run", "--stages", "sft", "reward", "dpo", "evaluate", "--set", "dpo.lr=0.02")  # far enough that no two write the same
    a = launch(tmp_path/"run", inline=False)
    p = visit(browser, a, 390, 844)
    expect(p.locator("#board article")).to_have_count(2)
    shown = lambda: list(a.desk.comparisons.values())[-1]
    said = p.locator("body").inner_text()
    assert "rue reward" not in said and "world" not in said and "One prompt, two answers" in said
    own = AutoTokenizer.from_pretrained(chat_model)
    settings(p, length=12)
    p.get_by_label("System turn").fill("Answer in verse.")
    compare(p, "**bold** שלום 🙂")
    done(p)
    c = shown()
    told = [dict(role="system", content="Answer in verse."), dict(role="user", content="**bold** שלום 🙂")]
    assert a.desk._encode(c)["dpo"] == own.apply_chat_template(told, add_generation_prompt=True, return_dict=False, enable_thinking=False)
    expect(p.locator("#board .turn b")).to_have_text(["System", "Human"])
    expect(p.locator("#board .turn p").nth(1)).to_have_text("**bold** שלום 🙂")     # as it was typed: nobody's text becomes markup
    assert "rue reward" not in p.locator("#board").inner_text() and p.locator("#board .gold_reward").count() == 0
    p.locator("#continue").click()
    compare(p, "שלום 🙂 hello")
    done(p)
    expect(p.locator("#board .turn b")).to_have_text(["System", "Human", "Assistant", "Human"])
    assert p.locator("#board .turn p").nth(3).evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert p.evaluate("document.documentElement.scrollWidth") <= 390
    asked = shown()["prompt"]
    p.locator("#link").click()
    expect(p.locator("#status")).to_contain_text("link")
    p.goto(p.url, wait_until="domcontentloaded")
    expect(p.locator("#status")).to_contain_text("Done in")
    assert shown()["prompt"] == asked
    p.locator("#guess").click()
    systems = 0
    for _ in range(6):                     # a third of the prompts have a system turn
        expect(p.locator("#votes")).to_be_visible()
        systems += shown()["prompt"].startswith("Be brief.")
        if systems:
            expect(p.locator("#board .turn b").first).to_have_text("System")
            break
        next_one(p, lambda: p.keyboard.press("s"))
    assert systems and not p.errors and not p.outside
    shot(p, "chat")
    p.context.close()
    a.close()


def test_a_function_as_reward(browser, chat_model, tmp_path):  # noqa: F811
    "Sums, scored by a check: the page says what scores, gives a prompt of the data its reward, and none to a prompt that the check knows nothing about"
    rows = [dict(prompt=[dict(role="user", content=f"What is {i} + {i}?")], answer=str(2*i)) for i in range(40)]
    (tmp_path/"sums.jsonl").write_text("".join(json.dumps(r)+"\n" for r in rows), "utf-8")
    sets = [o for s in ("sft.skip=true", "grpo.reward=checks:exact_number", "ppo.reward=checks:exact_number") for o in ("--set", s)]
    train(chat_model, tmp_path/"sums.jsonl", tmp_path/"run", "--stages", "sft", "grpo", "evaluate", *sets)
    a = launch(tmp_path/"run", inline=False)
    p = visit(browser, a)
    expect(p.locator("#board article")).to_have_count(2)
    expect(p.locator("#top .terms")).to_contain_text("what the function checks:exact_number says of an answer")
    assert "rue reward" not in p.locator("body").inner_text()
    expect(p.locator("#board .stat.reward .hint").first).to_have_attribute("data-hint", re.compile("what the function checks:exact_number says"))
    assert "stands for what people like" not in " ".join(p.locator("#top, [data-hint]").evaluate_all("es => es.map(e => e.dataset.hint || e.innerText)"))
    c = list(a.desk.comparisons.values())[-1]
    asked = int(re.search(r"What is (\d+)", c["prompt"])[1])
    for o in c["answers"].values():
        numbers = re.findall(r"\d+", o["response"])
        if all(n.isascii() for n in numbers) and not re.search(r"\d[.,/e]|[-−]\d", o["response"]):    # no number that is written in two parts
            assert o["reward"] == float(bool(numbers) and int(numbers[-1]) == 2*asked)
    settings(p, length=6)
    compare(p, "What is the best fruit?")
    done(p)
    expect(p.locator("#board .stat.reward dd.none")).to_have_text(["none: here is nothing that the function could check"]*2)
    expect(p.locator("#board .headline")).to_have_text("")
    assert not p.errors and not p.outside
    p.context.close()
    a.close()


def test_load_and_kill(folder, tmp_path):
    "32 clients at once, then SIGKILL: only an orderly 'queue full', no lost or doubled vote, memory flat"
    r = load(folder, 32, 10, votes=tmp_path/"votes.jsonl")
    print(r)
    assert set(r["counts"]) <= {"voted", "full"} and r["acknowledged"] > 3, r
    assert not r["lost"] and not r["doubled"] and r["whole"] and r["in_file"] >= r["acknowledged"]
    assert r["mb"][-1]-r["mb"][4] < 40, r
