// What gradio's parts do not do: files, hints, copying, shortcuts, names of groups. No text of anybody becomes HTML here.
function rlhf_save(text, name) {
  if (!text) return;
  const a = document.createElement('a');
  a.href = URL.createObjectURL(new Blob([text], {type: 'application/json'})); a.download = name;
  document.body.append(a); a.click(); a.remove(); setTimeout(() => URL.revokeObjectURL(a.href), 1000);
}

// one small card beside the thing it explains; Escape or a click elsewhere closes it
function rlhf_tip(at, fill) {
  let tip = document.getElementById('tip');
  if (!tip) { tip = document.createElement('div'); tip.id = 'tip'; tip.popover = 'auto'; tip.setAttribute('role', 'status'); (document.querySelector('.gradio-container') || document.body).append(tip); }
  typeof fill === 'string' ? tip.textContent = fill : tip.replaceChildren(...fill);
  if (!tip.matches(':popover-open')) tip.showPopover();
  const r = at.getBoundingClientRect(), below = r.bottom+8+tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(8, Math.min(r.left, innerWidth-tip.offsetWidth-8))+'px';
  tip.style.top = (below ? r.bottom+6 : Math.max(8, r.top-tip.offsetHeight-6))+'px';
  return tip;
}

// the answers come into view once they are asked for
function rlhf_show(sel) {
  const seen = s => { const e = document.querySelector(s); return e && e.offsetHeight ? e : null; };
  const e = seen(sel) || seen('#board'), r = e && e.getBoundingClientRect();     // an empty line has no place on a phone
  if (r && (r.top > innerHeight*.6 || r.top < 0)) e.scrollIntoView({block: 'start', behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'});
}

document.addEventListener('click', e => {
  const b = e.target.closest && e.target.closest('.copy, .hint, .dot');
  if (!b) return;
  if (!b.matches('.copy')) return void rlhf_tip(b, b.dataset.hint);
  const said = ok => { const t = b.firstChild.nodeValue; b.firstChild.nodeValue = ok ? 'Copied' : 'Select and copy by hand'; setTimeout(() => b.firstChild.nodeValue = t, 1500); };
  navigator.clipboard ? navigator.clipboard.writeText(b.dataset.copy).then(() => said(true), () => said(false)) : said(false);
});

document.addEventListener('keydown', e => {
  const dot = e.target.closest && e.target.closest('.dot');
  if (dot && (e.key === 'Enter' || e.key === ' ')) { rlhf_tip(dot, dot.dataset.hint); e.preventDefault(); }
});

// two votes within a blink are one vote and a slip: the next prompt is there at once, and nobody has read it
document.addEventListener('click', e => {
  const vote = e.target.closest && e.target.closest('#votes button'), now = performance.now();
  if (vote && vote.id !== 'skip' && now-(window.rlhf_cast ?? -1e9) < 700) { e.stopImmediatePropagation(); e.preventDefault(); return; }
  window.rlhf_cast = vote ? now : undefined;
}, true);

// shortcuts: the buttons that can be seen; letters that are typed into a field stay there
document.addEventListener('keydown', e => {
  const arrow = e.key.startsWith('Arrow');
  if (e.ctrlKey || e.altKey || e.metaKey || e.target.closest('input, textarea, select, [contenteditable], [role=listbox], summary, .tok')) return;
  if (!arrow && e.target.closest('[role=tab]')) return;
  const at = {'1': 'vote-1', '2': 'vote-2', '3': 'vote-3', '4': 'vote-4', 't': 'vote-tie', 'b': 'vote-bad', 's': 'skip', 'u': 'undo', 'ArrowLeft': 'x-back', 'ArrowRight': 'x-next'}[e.key];
  const b = at && document.getElementById(at);
  if (b && b.offsetParent && !b.disabled && (arrow || !e.repeat)) { b.click(); e.preventDefault(); }
});

// what changes on the page: groups of choices get their names, and an open vote takes the keyboard from the prompt
new MutationObserver(() => {
  for (const f of document.querySelectorAll('fieldset:not([aria-label])')) {
    const name = f.querySelector('[data-testid=block-info]');
    if (name) { f.setAttribute('aria-label', name.innerText.trim()); if (f.querySelector('[type=radio]')) f.setAttribute('role', 'radiogroup'); }
  }
  for (const c of document.querySelectorAll('[data-here]')) if (!c.dataset.done) { c.dataset.done = 1; c.textContent = c.textContent.replace('{url}', location.origin+location.pathname); }
  const open = !!document.querySelector('#vote-1')?.offsetParent;
  if (open && !window.rlhf_open && document.activeElement?.closest('#prompt')) document.activeElement.blur();
  window.rlhf_open = open;
}).observe(document.documentElement, {childList: true, subtree: true});

// a link that asks for what is shown, and what it says of itself
function rlhf_said(s) { const p = document.querySelector('#status .status'); if (p) { p.className = 'status'; p.textContent = s; } }
async function rlhf_link() {
  const board = document.querySelector('#board .board[data-link]');
  if (!board) return rlhf_said('Compare first: there is nothing to link to');
  const url = location.origin+location.pathname+'?'+board.dataset.link;
  history.replaceState(null, '', url);
  try { await navigator.clipboard.writeText(url); rlhf_said('Copied: whoever opens this link on this page sees the same question asked again'); }
  catch { rlhf_said('The link stands in the address line'); }
}

// a picture of the answers, drawn by this browser alone: a copy with the styles it has, in an SVG, on a canvas
async function rlhf_picture() {
  const board = document.querySelector('#board .board');
  if (!board) return rlhf_said('Compare first: there is nothing to save');
  const plain = document.createElement('div'); document.body.append(plain);
  const usual = {...Object.fromEntries([...getComputedStyle(plain)].map(k => [k, getComputedStyle(plain).getPropertyValue(k)]))}; plain.remove();
  const inherited = new Set(['color', 'font-family', 'font-size', 'font-weight', 'line-height', 'white-space', 'white-space-collapse', 'text-wrap-mode']);
  const copy = e => {
    if (e.nodeType === 3) return e.cloneNode();
    if (e.nodeType !== 1 || e.matches('button, footer, .out, details')) return document.createTextNode('');
    const c = document.createElement(e.tagName.toLowerCase()), s = getComputedStyle(e);
    for (const k of s) { const v = s.getPropertyValue(k); if (v !== usual[k] || inherited.has(k)) c.style.setProperty(k, v); }
    c.append(...[...e.childNodes].map(copy));
    return c;
  };
  const w = Math.ceil(board.offsetWidth)+32, shown = copy(board), box = document.createElement('div');
  box.setAttribute('xmlns', 'http://www.w3.org/1999/xhtml'); box.style.cssText = 'padding:16px;width:'+(w-32)+'px';
  shown.style.width = (w-32)+'px'; shown.style.removeProperty('height'); shown.style.removeProperty('block-size'); box.append(shown);
  const h = Math.ceil(board.offsetHeight)+32, html = new XMLSerializer().serializeToString(box);
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}"><foreignObject width="100%" height="100%">${html}</foreignObject></svg>`;
  const img = new Image(); img.src = 'data:image/svg+xml;charset=utf-8,'+encodeURIComponent(svg);
  try {
    await img.decode();
    const canvas = document.createElement('canvas'), scale = 2; canvas.width = w*scale; canvas.height = h*scale;
    const pen = canvas.getContext('2d'); pen.scale(scale, scale);
    pen.fillStyle = getComputedStyle(document.querySelector('.gradio-container')).backgroundColor; pen.fillRect(0, 0, w, h); pen.drawImage(img, 0, 0);
    const blob = await new Promise(r => canvas.toBlob(r, 'image/png'));
    const a = document.createElement('a'); a.href = URL.createObjectURL(blob); a.download = 'comparison.png'; document.body.append(a); a.click(); a.remove(); setTimeout(() => URL.revokeObjectURL(a.href), 1000);
  } catch (e) { rlhf_said('This browser draws no picture of the page: take a screenshot'); }
}

// a token: its values at once, then what else could have stood there, once the models have said it
let rlhf_asked = null;
function rlhf_token(t) {
  rlhf_asked = t;
  const tip = rlhf_tip(t, t.title), field = document.querySelector('#board .tok') && t.closest('#board') && document.querySelector('#token textarea, #token input'), whose = t.closest('article')?.dataset.model;
  if (!field || !whose) return;
  field.value = whose+'|'+t.dataset.i; field.dispatchEvent(new Event('input', {bubbles: true}));
  setTimeout(() => document.getElementById('ask-token').click());
}
document.addEventListener('click', e => { const t = e.target.closest && e.target.closest('.tok[data-i]'); if (t) rlhf_token(t); });
document.addEventListener('keydown', e => {
  const t = e.target.closest && e.target.closest('.tok[data-i]');
  if (!t || e.ctrlKey || e.altKey || e.metaKey) return;
  if (e.key === 'Enter' || e.key === ' ') { rlhf_token(t); e.preventDefault(); }
  const step = {ArrowRight: 1, ArrowLeft: -1}[e.key], all = [...t.closest('.answer').querySelectorAll('.tok[data-i]')], to = step && all[all.indexOf(t)+step];
  if (to) { t.tabIndex = -1; to.tabIndex = 0; to.focus(); e.preventDefault(); }
});
new MutationObserver(() => {
  const found = document.querySelector('#choices .choices, #choices .status'), tip = document.getElementById('tip');
  if (found && rlhf_asked && tip?.matches(':popover-open') && found !== window.rlhf_found) {
    window.rlhf_found = found;
    const values = document.createElement('p'); values.textContent = rlhf_asked.title;
    rlhf_tip(rlhf_asked, [found.cloneNode(true), values]);
  }
}).observe(document.documentElement, {childList: true, subtree: true, characterData: true});
document.addEventListener('click', e => {
  const b = e.target.closest && e.target.closest('#link, #picture');
  if (b) b.id === 'link' ? rlhf_link() : rlhf_picture();
});
