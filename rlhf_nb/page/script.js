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
  const e = document.querySelector(sel), r = e && e.getBoundingClientRect();
  if (r && (r.top > innerHeight*.6 || r.top < 0)) e.scrollIntoView({block: 'start', behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'});
}

document.addEventListener('click', e => {
  const b = e.target.closest && e.target.closest('.copy, .hint');
  if (!b) return;
  if (b.matches('.hint')) return void rlhf_tip(b, b.dataset.hint);
  const said = ok => { const t = b.firstChild.nodeValue; b.firstChild.nodeValue = ok ? 'Copied' : 'Select and copy by hand'; setTimeout(() => b.firstChild.nodeValue = t, 1500); };
  navigator.clipboard ? navigator.clipboard.writeText(b.dataset.copy).then(() => said(true), () => said(false)) : said(false);
});

// shortcuts: the buttons that can be seen; letters that are typed into a field stay there
document.addEventListener('keydown', e => {
  const arrow = e.key.startsWith('Arrow');
  if (e.ctrlKey || e.altKey || e.metaKey || e.target.closest('input, textarea, select, [contenteditable], [role=listbox], summary, .tok')) return;
  if (!arrow && e.target.closest('[role=tab]')) return;
  const at = {'1': 'vote-1', '2': 'vote-2', '3': 'vote-3', '4': 'vote-4', 't': 'vote-tie', 'b': 'vote-bad', 'ArrowLeft': 'x-back', 'ArrowRight': 'x-next'}[e.key];
  const b = at && document.getElementById(at);
  if (b && b.offsetParent) { b.click(); e.preventDefault(); }
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
