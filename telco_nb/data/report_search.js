"use strict";
// The search page. Its data stand in the page; all text goes into text nodes, so that no text can be markup.
const parts = JSON.parse(document.getElementById("data").content.textContent);
const words = document.getElementById("words"), step = document.getElementById("step");
const status = document.getElementById("status"), hits = document.getElementById("hits");
const MOST = 60, AROUND = 110;
for (const part of parts) part.all = `${part.step} ${part.scope} ${part.title} ${part.text}`.toLowerCase();

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
// The text around the first word that stands in it, each word marked.
function excerpt(text, asked) {
  const lower = text.toLowerCase(), places = asked.map((word) => lower.indexOf(word)).filter((place) => place >= 0);
  const start = Math.max(0, (places.length ? Math.min(...places) : 0) - AROUND), shown = text.slice(start, start + 3 * AROUND);
  const pieces = [start ? "… " : ""], low = shown.toLowerCase();
  let at = 0;
  while (at < shown.length) {
    const next = asked.map((word) => [low.indexOf(word, at), word]).filter(([place]) => place >= 0).sort((a, b) => a[0] - b[0])[0];
    if (!next) break;
    const [place, word] = next;
    pieces.push(shown.slice(at, place), make("mark", {}, shown.slice(place, place + word.length)));
    at = place + word.length;
  }
  return make("p", {}, ...pieces, shown.slice(at), start + 3 * AROUND < text.length ? " …" : "");
}
function weight(part, asked) { // a word in the title says more than one in the text
  const title = `${part.step} ${part.scope} ${part.title}`.toLowerCase();
  return asked.filter((word) => title.includes(word)).length;
}
function search() {
  const asked = [...new Set(words.value.toLowerCase().split(/\s+/).filter(Boolean))];
  history.replaceState(null, "", asked.length ? `#${new URLSearchParams({ q: words.value, in: step.value })}` : "#");
  hits.replaceChildren();
  if (!asked.length) { status.textContent = "Type a word."; return; }
  const found = parts.filter((part) => (!step.value || part.step === step.value) && asked.every((word) => part.all.includes(word)));
  found.sort((a, b) => weight(b, asked) - weight(a, asked)); // a stable sort: else in the order of the study
  const more = found.length > MOST ? ` The first ${MOST} are shown; one more word makes them fewer.` : "";
  status.textContent = found.length ? `${found.length} of ${parts.length} parts hold this.${more}` : "Nothing holds all of these words.";
  for (const part of found.slice(0, MOST)) {
    const link = make("a", { href: part.page + (part.anchor ? `#${part.anchor}` : "") }, part.title || "Start of the notebook");
    hits.append(make("li", {}, link, " ", make("small", {}, `${part.step} ${part.scope}`), excerpt(part.text, asked)));
  }
}
const given = new URLSearchParams(location.hash.slice(1));
words.value = given.get("q") ?? "";
step.value = given.get("in") ?? "";
words.addEventListener("input", search);
step.addEventListener("change", search);
search();
