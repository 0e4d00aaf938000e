"use strict";
// The search page. Its data stand in the page; all text goes into text nodes, so that no text can be markup.
const parts = JSON.parse(document.getElementById("data").content.textContent);
const words = document.getElementById("words"), step = document.getElementById("step");
const status = document.getElementById("status"), hits = document.getElementById("hits");
const MOST = 60, AROUND = 110;
for (const part of parts) part.head = `${part.step} ${part.scope} ${part.title}`;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
// A word is found where a word of the text begins with it: "loss" finds losses, not blossom.
function pattern(word, flags) {
  const letters = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return new RegExp(/^[\p{L}\p{N}]/u.test(word) ? `(?<![\\p{L}\\p{N}])${letters}` : letters, flags);
}
// The text around the first place where one of the words stands, each of them marked.
function excerpt(text, asked) {
  const places = asked.map((word) => text.search(pattern(word, "iu"))).filter((place) => place >= 0);
  const start = Math.max(0, (places.length ? Math.min(...places) : 0) - AROUND), shown = text.slice(start, start + 3 * AROUND);
  const pieces = [start ? "… " : ""];
  let at = 0;
  for (const found of shown.matchAll(new RegExp(asked.map((word) => pattern(word, "u").source).join("|"), "giu"))) {
    pieces.push(shown.slice(at, found.index), make("mark", {}, found[0]));
    at = found.index + found[0].length;
  }
  return make("p", {}, ...pieces, shown.slice(at), start + 3 * AROUND < text.length ? " …" : "");
}
// The address of a part, with some words that a browser which knows text fragments scrolls to.
function address(part, asked) {
  const place = Math.min(...asked.map((word) => part.text.search(pattern(word, "iu"))).filter((at) => at >= 0));
  const words = place < Infinity ? part.text.slice(place, place + 60).split(" ").slice(0, 3).join(" ") : "";
  return part.page + (part.anchor || words ? `#${part.anchor}` : "") + (words ? `:~:text=${encodeURIComponent(words).replace(/-/g, "%2D")}` : "");
}
function search() {
  const asked = [...new Set(words.value.toLowerCase().split(/\s+/).filter(Boolean))];
  history.replaceState(null, "", asked.length ? `#${new URLSearchParams({ q: words.value, in: step.value })}` : "#");
  hits.replaceChildren();
  if (!asked.length) { status.textContent = "Type a word."; return; }
  const patterns = asked.map((word) => pattern(word, "iu"));
  const holds = (part) => patterns.every((one) => one.test(part.head) || one.test(part.text));
  const weight = (part) => patterns.filter((one) => one.test(part.head)).length; // a word in the title says more
  const found = parts.filter((part) => (!step.value || part.step === step.value) && holds(part));
  found.sort((a, b) => weight(b) - weight(a)); // a stable sort: else in the order of the study
  const more = found.length > MOST ? ` The first ${MOST} are shown; one more word makes them fewer.` : "";
  status.textContent = found.length ? `${found.length} of ${parts.length} parts hold this.${more}` : "Nothing holds all of these words.";
  for (const part of found.slice(0, MOST)) {
    const link = make("a", { href: address(part, asked) }, part.title || "Start of the notebook");
    hits.append(make("li", {}, link, " ", make("small", {}, `${part.step} ${part.scope}`), excerpt(part.text, asked)));
  }
}
const given = new URLSearchParams(location.hash.slice(1));
words.value = given.get("q") ?? "";
step.value = given.get("in") ?? "";
words.addEventListener("input", search);
step.addEventListener("change", search);
search();
