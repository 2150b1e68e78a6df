function rlhf_save(text, name) {
  if (!text) return;
  const a = document.createElement('a');
  a.href = URL.createObjectURL(new Blob([text], {type: 'application/json'})); a.download = name;
  document.body.append(a); a.click(); a.remove(); setTimeout(() => URL.revokeObjectURL(a.href), 1000);
}
document.addEventListener('click', e => {
  const b = e.target.closest && e.target.closest('.copy');
  if (!b) return;
  const said = ok => { const t = b.firstChild.nodeValue; b.firstChild.nodeValue = ok ? 'Copied' : 'Select and copy by hand'; setTimeout(() => b.firstChild.nodeValue = t, 1500); };
  navigator.clipboard ? navigator.clipboard.writeText(b.dataset.copy).then(() => said(true), () => said(false)) : said(false);
});
document.addEventListener('keydown', e => {
  if (e.ctrlKey || e.altKey || e.metaKey || e.target.closest('input, textarea, select, [contenteditable], [role=listbox], [role=tab], summary')) return;
  const at = {'1': 'vote-1', '2': 'vote-2', '3': 'vote-3', '4': 'vote-4', 't': 'vote-tie', 'b': 'vote-bad', 'ArrowLeft': 'x-back', 'ArrowRight': 'x-next'}[e.key];
  const b = at && document.getElementById(at);
  if (b && b.offsetParent) { b.click(); e.preventDefault(); }
});
