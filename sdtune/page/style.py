"""The style sheet of the page, and the script that opens an image large."""

CSS = """
.gradio-container, .gradio-container main { width: 100% !important; }
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#restore .icon-wrap, #add-file .icon-wrap, #train-files .icon-wrap { display: none; }
footer { display: none !important; }
.html-container { padding: 0 !important; }
.page-header { display: flex; align-items: baseline; gap: 10px; flex-wrap: wrap; padding: 4px 2px;
  color: var(--body-text-color-subdued); }
.page-header b { font-size: 1.4rem; letter-spacing: -.02em; color: var(--body-text-color); }
.page-header .activity { margin-left: auto; border-radius: 99px; padding: 3px 13px; font-size: .84rem;
  white-space: nowrap;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); }
.page-header .activity i { display: inline-block; width: 8px; height: 8px; border-radius: 9px; margin-right: 8px;
  background: #3fb26f; }
.page-header .activity.busy i { background: var(--primary-500); animation: beat 1.2s infinite; }
@keyframes beat { 50% { opacity: .3; } }
.status-message { padding: 6px 2px; color: var(--body-text-color-subdued); font-size: .92rem; overflow-wrap: anywhere; }
.status-message.error { color: #b3261e; background: #b3261e12; border: 1px solid #b3261e40; border-radius: 10px;
  padding: 10px 14px; }
.dark .status-message.error { color: #ff9a90; }
.status-message ul { margin: 6px 0 0 18px; list-style: disc; }
.status-bar { height: 8px; border-radius: 9px; background: var(--border-color-primary); overflow: hidden; }
.status-bar div { height: 100%; background: var(--primary-500); border-radius: 9px; transition: width .2s; }
.image-columns { display: flex; align-items: flex-end; gap: 14px; overflow-x: auto; padding: 4px 2px 10px; }
.image-column { flex: 1 1 0; min-width: 150px; max-width: 420px; }
.image-columns h4 { font-weight: 600; font-size: .95rem; margin: 0 0 8px; overflow-wrap: anywhere;
  color: var(--body-text-color); }
.image-columns figure { margin: 0 0 12px; position: relative; }
.image-columns img { width: 100%; border-radius: 12px; display: block; cursor: zoom-in;
  background: var(--border-color-primary); box-shadow: 0 1px 3px #0002, 0 6px 18px #0001; }
.image-columns figcaption { display: flex; justify-content: space-between; padding: 5px 3px 0; font-size: .8rem;
  color: var(--body-text-color-subdued); }
.image-columns figcaption a { color: var(--primary-600); text-decoration: none; }
.image-columns.one-grid .image-column { max-width: none; }
.image-columns.one-grid figure { width: fit-content; }
.image-columns.one-grid img { width: auto; max-width: 100%; border-radius: 8px; }
.empty-result { border: 1.5px dashed var(--border-color-primary); border-radius: 16px; padding: 46px 20px;
  text-align: center; color: var(--body-text-color-subdued); }
.lightbox { position: fixed; inset: 0; z-index: 9999; background: #0b0b10f0; display: flex; flex-direction: column;
  align-items: center; justify-content: center; gap: 14px; color: #eee; font: 15px system-ui, sans-serif; }
.lightbox img { height: min(84vh, 94vw); max-width: 94vw; object-fit: contain; border-radius: 8px; }
.lightbox .row { display: flex; gap: 10px; align-items: center; max-width: 94vw; flex-wrap: wrap;
  justify-content: center; }
.lightbox button, .lightbox a { background: #ffffff1c; border: 0; color: #fff; padding: 8px 16px; border-radius: 99px;
  cursor: pointer; text-decoration: none; font: inherit; }
.card { position: relative; border: 1px solid var(--border-color-primary) !important; border-radius: 14px !important;
  background: var(--block-background-fill); gap: 0 !important; overflow: visible !important; }
.card .block, .card .form { background: none !important; }
.card .remove { position: absolute; right: 8px; top: 6px; width: auto; min-width: 28px !important;
  padding: 2px 6px !important; font-size: .78rem; font-weight: 400;
  background: none; border: 0; box-shadow: none; color: var(--body-text-color-subdued); z-index: 2; }
#add-column { border-radius: 14px; align-self: stretch; white-space: normal; font-weight: 400; }
#new-seed { align-self: stretch; background: var(--block-background-fill); font-weight: 400; }
.file-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr)); gap: 14px;
  padding: 6px 2px; }
.file-card { border: 1px solid var(--border-color-primary); border-radius: 14px; overflow: hidden;
  background: var(--background-fill-primary); font-size: .88rem; }
.file-card img { width: 100%; height: 150px; object-fit: cover; object-position: 100% 9%; display: block; }
.file-card .blank { height: 150px; background: linear-gradient(135deg, var(--primary-100), var(--primary-300)); }
.dark .file-card .blank { background: linear-gradient(135deg, var(--primary-900), var(--primary-700)); }
.file-card.unusable .blank, .file-card.unusable img { filter: grayscale(1); opacity: .5; }
.file-card div.text { padding: 10px 13px 13px; overflow-wrap: anywhere; }
.file-card b { font-size: 1rem; } .file-card p { margin: 3px 0 0; color: var(--body-text-color-subdued); }
.file-card .tag { float: right; border-radius: 99px; padding: 1px 10px; font-size: .78rem; color: var(--primary-700);
  background: var(--primary-100); }
.file-card.unusable .tag { background: #b3261e18; color: #b3261e; }
.caption-thumbnail { flex: 0 0 76px !important; min-width: 76px !important; }
.caption-thumbnail img, .caption-thumbnail .broken { width: 72px; height: 72px; object-fit: contain; display: block;
  border-radius: 10px; }
.caption-thumbnail .broken { background: #b3261e18; color: #b3261e; font-size: .75rem; padding: 22px 8px;
  text-align: center; }
.caption-list { max-height: 460px; overflow-y: auto !important; }
.picture-sheet { max-height: 620px; overflow-y: auto; } .picture-sheet ul { margin: 4px 0 10px; }
.status-message.recommended { color: var(--body-text-color); }
.steps-sheet { font-size: .86rem; } .steps-sheet ul { margin: 8px 0 0 16px; color: var(--body-text-color-subdued); }
.steps-sheet table { display: block; overflow-x: auto; border-collapse: collapse; white-space: nowrap; }
.steps-sheet :is(table, tr, th, td) { border: 0 !important; }
.steps-sheet :is(th, td) { padding: 5px 22px 5px 2px !important; text-align: left; }
.steps-sheet tbody td { border-top: 1px solid var(--border-color-primary) !important; }
.loss-curve { width: 100%; height: auto; display: block; }
.loss-curve text { fill: var(--body-text-color-subdued); font: 11px system-ui, sans-serif; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: 6px !important; }
  button[role=tab] { padding: 0 9px !important; }
  .image-columns { gap: 8px; } .image-column { min-width: 104px; } .image-columns h4 { font-size: .8rem; }
  .image-columns figcaption a span { display: none; }
  #add-column { min-width: 100% !important; min-height: 44px; }
  .page-header .activity { margin-left: 0; }
}
"""

# A click on an image opens it large, and the arrow keys show its neighbours. The listener belongs to the HTML
# component, so it still works after the content has been replaced.
LIGHTBOX = """
element.addEventListener('click', (event) => {
  const clicked = event.target.closest('img.drawn');
  if (!clicked) return;
  const all = [...element.querySelectorAll('img.drawn')];
  let at = all.indexOf(clicked);
  const box = document.createElement('div');
  box.className = 'lightbox';
  box.setAttribute('role', 'dialog');
  const make = (tag, text) => Object.assign(document.createElement(tag), {textContent: text});
  const image = document.createElement('img'), row = document.createElement('div'), title = make('span', '');
  const back = make('button', '←'), next = make('button', '→');
  const save = make('a', 'Download'), close = make('button', 'Close');
  row.className = 'row';
  row.append(...(all.length > 1 ? [back, title, next] : [title]), save, close);
  box.append(image, row);
  const show = (step) => {
    at = (at + step + all.length) % all.length;
    image.src = save.href = all[at].src;
    image.alt = title.textContent = all[at].alt;
    save.download = all[at].dataset.name;
  };
  const moves = {ArrowLeft: () => show(-1), ArrowRight: () => show(1), Escape: () => end()};
  const keys = (e) => moves[e.key] && moves[e.key]();
  const end = () => { box.remove(); document.removeEventListener('keydown', keys); };
  back.onclick = () => show(-1); next.onclick = () => show(1); close.onclick = end;
  box.onclick = (e) => { if (e.target === box) end(); };
  document.addEventListener('keydown', keys);
  document.body.append(box);
  show(0); close.focus();
});
"""
