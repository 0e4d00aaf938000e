"use strict";
// The blind panel: shows pairs in their order, keeps the votes in this browser, and writes them as a votes file.
const { name, pairs } = JSON.parse(document.getElementById("data").content.textContent);
const at = (id) => document.getElementById(id);
const who = at("who"), note = at("note");
let rater = null, votes = [], shownAt = 0;

const place = (person) => `blind-panel.${name}.${person}`;
function read(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}
function stored(person) { // the votes of a person in the order of the pairs; what does not fit is left out
  let found = [];
  try { found = JSON.parse(read(place(person)) ?? "[]"); } catch { /* unreadable: begin anew */ }
  const wrong = pairs.findIndex((pair, i) => found[i]?.pair_id !== pair.pair_id);
  return wrong < 0 ? found.slice(0, pairs.length) : found.slice(0, wrong);
}
function keep() {
  try {
    localStorage.setItem(place(rater), JSON.stringify(votes));
    localStorage.setItem(place(""), rater);
  } catch {
    at("warning").textContent = "This browser keeps nothing here. Download the votes before you close the page.";
    at("warning").hidden = false;
  }
}

function show() {
  const pair = pairs[votes.length];
  at("progress").value = votes.length;
  at("count").textContent = `${votes.length} of ${pairs.length} done`;
  at("pair").hidden = !pair;
  at("done").hidden = Boolean(pair);
  at("undo").disabled = at("download").disabled = votes.length === 0;
  if (!pair) return at("download").focus();
  at("said").replaceChildren(...pair.conversation.flatMap(({ role, content }) => {
    const quote = document.createElement("blockquote"), speaker = document.createElement("b");
    speaker.textContent = role === "user" ? "Customer" : "Agent";
    quote.textContent = content;
    return pair.conversation.length > 1 ? [speaker, quote] : [quote];
  }));
  at("first").textContent = pair.answer_a;
  at("second").textContent = pair.answer_b;
  at("card").textContent = pair.card;
  shownAt = Date.now();
}
function vote(choice) {
  const pair = pairs[votes.length];
  if (!pair) return;
  const seconds = (Date.now() - shownAt) / 1000, reason = note.value.trim();
  const time = new Date().toISOString().replace("Z", "+00:00");
  votes.push({ pair_id: pair.pair_id, vote: choice, seconds, ...(reason && { reason }), rater, time });
  note.value = "";
  keep();
  show();
  scrollTo(0, 0);
}
function undo() {
  const last = votes.pop();
  if (!last) return;
  note.value = last.reason ?? "";
  keep();
  show();
}
function download() {
  const lines = votes.map((line) => `${JSON.stringify(line)}\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = `votes-${rater}-${name}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

for (const button of document.querySelectorAll("[data-vote]")) button.addEventListener("click", () => vote(button.dataset.vote));
at("undo").addEventListener("click", undo);
at("download").addEventListener("click", download);
addEventListener("keydown", (event) => {
  if (event.target === note && event.key === "Escape") note.blur();
  if (!rater || event.target === note || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  document.querySelector(`[data-key="${CSS.escape(event.key.toLowerCase())}"]:not(:disabled)`)?.click();
});
addEventListener("storage", (event) => { // the same rater votes in another tab
  if (!rater || event.key !== place(rater)) return;
  votes = stored(rater);
  show();
});
function tell() {
  const n = stored(who.elements.rater.value).length;
  at("known").textContent = n ? `${n} of ${pairs.length} are done already.` : "";
}
who.elements.rater.value = read(place("")) ?? "";
who.addEventListener("input", tell);
who.addEventListener("submit", (event) => {
  event.preventDefault();
  rater = who.elements.rater.value;
  votes = stored(rater);
  at("start").hidden = true;
  at("vote").hidden = false;
  show();
});
tell();
who.elements.rater.focus();
