"use strict";
// The answer explorer. Its data stand in the page; all text goes into text nodes, so that no answer can be markup.
const { columns, judges, questions, credits: from, ...packing } = JSON.parse(document.getElementById("data").content.textContent);
for (const q of questions) { // as answer_explorer.packed has packed it
  q.answers = q.answers.map((answer) => answer && Object.fromEntries(packing.parts.map((part, i) => [part, answer[i]])));
  q.verdicts = q.verdicts.map((pairs) => pairs.replace(/./g, (pair) => {
    const place = packing.pairs.indexOf(pair), n = packing.letters.length;
    return packing.letters[Math.floor(place / n)] + packing.letters[place % n];
  }));
}
const filters = document.getElementById("filters");
const field = Object.fromEntries([...filters.querySelectorAll("[name]")].map((part) => [part.name, part]));
const names = columns.map((column) => column.name);
const LETTERS = { unsafe: "U", "asks for secret": "S", looping: "L", empty: "E", cut: "C" };
const WORDS = { A: "clearly better", a: "better", t: "equally good", b: "worse", B: "clearly worse",
  x: "not decided: asked again, the judge changed its verdict", ".": "not compared" };
const MIRROR = { A: "B", a: "b", b: "a", B: "A" };
let current = null, rows = [];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}
const percent = (share) => (share === null ? "·" : `${Math.round(100 * share)}`);
const brief = (text) => (text.length > 110 ? `${text.slice(0, 110)}…` : text);
const question = (q) => q.said.at(-1)[1];

// What judge `judge` says about column i against column j: a letter of WORDS.
function verdict(q, judge, i, j) {
  if (i === j) return ".";
  const [low, high] = i < j ? [i, j] : [j, i];
  const letter = q.verdicts[judge][low * names.length - (low * (low + 1)) / 2 + high - low - 1];
  return i < j ? letter : MIRROR[letter] ?? letter;
}

// ---- filters

function fill(name, texts, first) {
  const options = texts.map((text) => (Array.isArray(text) ? text : [text, text]));
  field[name].replaceChildren(...[["", first], ...options].map(([value, text]) => make("option", { value }, text)));
}
function shown() { // places of the chosen columns: all, one, or two
  const chosen = [field.left.value, field.right.value].map((name) => names.indexOf(name));
  if (chosen[0] < 0) return names.map((_, i) => i);
  return chosen[1] < 0 || chosen[1] === chosen[0] ? chosen.slice(0, 1) : chosen;
}
function matches(q, places) {
  for (const name of ["set", "term", "kind", "context"]) if (field[name].value && field[name].value !== q[name]) return false;
  const answers = places.map((i) => q.answers[i]).filter((answer) => answer);
  const flag = field.flag.value, text = field.text.value.trim().toLowerCase();
  if (flag && !answers.some((answer) => answer.flags.includes(flag))) return false;
  const searched = [q.id, q.term, ...q.said.map((line) => line[1]), ...answers.map((answer) => answer.text)];
  if (text && !searched.some((part) => part.toLowerCase().includes(text))) return false;
  if (!field.verdict.value || places.length !== 2) return true;
  const said = new Set(judges.map((_, k) => verdict(q, k, ...places).toLowerCase()).filter((letter) => letter !== "."));
  return field.verdict.value === "differ" ? said.size > 1 : said.has(field.verdict.value);
}
function apply() {
  const places = shown(), chosen = new Set(places), two = places.length === 2;
  field.right.disabled = !field.left.value;
  field.verdict.disabled = !two;
  const left = names[places[0]], right = names[places[1]];
  for (const [value, text] of [["a", `${left} better`], ["b", `${right} better`]])
    field.verdict.querySelector(`[value=${value}]`).textContent = two ? text : "choose two first";
  const mean = (q) => {
    const known = places.map((i) => q.answers[i]?.coverage ?? null).filter((share) => share !== null);
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : 2;
  };
  const order = [...rows];
  if (field.order.value) order.sort((a, b) => mean(a.q) - mean(b.q));
  for (const { row, q } of order) {
    row.hidden = !matches(q, places);
    for (let i = 0; i < names.length; i++) row.cells[i + 1].hidden = !chosen.has(i);
    row.parentNode.append(row);
  }
  const head = document.querySelector("#matrix thead tr");
  for (let i = 0; i < names.length; i++) head.cells[i + 1].hidden = !chosen.has(i);
  const found = visible();
  if (!found.includes(current)) current = found[0] ?? null;
  show();
}
const visible = () => [...document.querySelectorAll("#matrix tbody tr")].filter((row) => !row.hidden);

// ---- the table of questions

function cell(answer) {
  if (!answer) return make("td", {});
  const letters = answer.flags.map((flag) => LETTERS[flag] ?? "").join("");
  const level = answer.coverage === null ? null : `level${Math.min(4, Math.floor(answer.coverage * 5))}`;
  return make("td", { class: level, title: answer.flags.join(", ") || null },
    percent(answer.coverage), letters ? make("b", {}, ` ${letters}`) : null);
}
function build() {
  const head = ["question", ...names].map((name, i) => make("th", { scope: "col", title: i ? columns[i - 1].about || null : null }, name));
  const body = questions.map((q) => {
    const button = make("button", { type: "button" }, brief(question(q)), make("small", {}, `${q.term}, ${q.set}`));
    const row = make("tr", {}, make("th", { scope: "row" }, button), ...q.answers.map(cell));
    button.addEventListener("click", () => { current = row; show(); });
    rows.push({ row, q });
    return row;
  });
  document.getElementById("matrix").append(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
}

// ---- the chosen question

function points(q, credits) {
  const item = (point, i) => {
    const [mark, word] = credits[i] >= from.made ? ["✓", "made"] : credits[i] >= from.partly ? ["½", "partly made"] : ["✗", "missed"];
    return make("li", { class: word.split(" ")[0] }, make("span", { class: "mark", role: "img", "aria-label": word }, mark), " ", point);
  };
  const list = (origin, head) => {
    const items = q.points.map(item).filter((_, i) => !origin || q.origins[i] === origin);
    return items.length ? [head ? make("p", { class: "soft" }, head) : "", make("ul", { class: "points" }, ...items)] : [];
  };
  if (!q.origins.length) return make("div", {}, ...list(null, null));
  return make("div", {}, ...list("card", "Points of the card:"), ...list("gold", "Further points of the gold answer:"));
}
function record(q, i) { // wins, ties and losses of an answer on this question, per judge
  return judges.map((judge, k) => {
    const letters = names.map((_, j) => verdict(q, k, i, j).toLowerCase());
    const count = (letter) => letters.filter((other) => other === letter).length;
    return count("a") + count("b") + count("t") ? `${judge}: ${count("a")} won, ${count("t")} tied, ${count("b")} lost` : null;
  }).filter((line) => line);
}
function card(q, i, folded) {
  const answer = q.answers[i], column = columns[i];
  const head = make("h3", {}, column.name, column.about ? make("small", {}, ` ${column.about}`) : null);
  if (!answer) return make("article", { class: "card" }, head, make("p", { class: "soft" }, "No answer."));
  const flags = answer.flags.map((flag) => make("span", { class: LETTERS[flag] ? "tag bad" : "tag" }, flag));
  const number = answer.coverage === null ? null : `Makes ${percent(answer.coverage)} % of a full answer's points; content ${answer.content} (points made, less what unsafe advice costs).`;
  const list = answer.credits && q.points.length ? points(q, answer.credits) : null;
  const made = list && folded ? make("details", {}, make("summary", {}, "Points made and missed"), list) : list;
  return make("article", { class: "card" }, head, flags.length ? make("p", { class: "tags" }, ...flags) : null,
    make("blockquote", {}, answer.text || "(empty answer)"), number ? make("p", {}, number) : null, made,
    ...(i ? record(q, i).map((line) => make("p", { class: "soft" }, line)) : []));
}
function verdicts(q, [i, j]) {
  const lines = judges.map((judge, k) => {
    const letter = verdict(q, k, i, j), reason = q.reasons[k][[i, j].sort((a, b) => a - b).join(" ")];
    const text = "AabB".includes(letter) ? `${names[i]} is ${WORDS[letter]} than ${names[j]}` : WORDS[letter];
    return make("li", {}, make("b", {}, `${judge}: `), `${text}.`, reason ? make("blockquote", {}, reason) : null);
  });
  return make("section", { class: "verdicts" }, make("h3", {}, "Verdicts"), make("ul", {}, ...lines));
}
function step(by) {
  const found = visible(), place = found.indexOf(current) + by;
  if (place < 0 || place >= found.length) return;
  current = found[place];
  show();
  current.scrollIntoView({ block: "nearest" });
}
function show() {
  const found = visible(), place = found.indexOf(current), detail = document.getElementById("detail");
  const status = found.length === questions.length ? `${found.length} questions.` : `${found.length} of ${questions.length} questions.`;
  document.getElementById("status").textContent = found.length ? status : `${status} Nothing matches: widen or clear the filters.`;
  for (const { row } of rows) row.querySelector("button").setAttribute("aria-current", row === current);
  detail.replaceChildren();
  if (!current) return;
  const q = rows.find((entry) => entry.row === current).q, places = shown(), all = places.length > 2;
  const move = (text, by) => {
    const button = make("button", { type: "button", class: "plain" }, text);
    button.disabled = !found[place + by];
    button.addEventListener("click", () => { step(by); document.querySelector(`#detail [data-by="${by}"]`).focus(); });
    button.dataset.by = by;
    return button;
  };
  const said = q.said.map(([role, text]) => make("div", { class: "said" }, make("b", {}, role === "user" ? "Customer" : "Agent"), make("blockquote", {}, text)));
  const facts = [q.term, q.problem, q.kind, q.context, q.set].filter((fact) => fact).map((fact) => make("span", { class: "tag" }, fact));
  const cards = places.filter((i) => i !== 0).map((i) => card(q, i, all));
  detail.append(make("h2", {}, `Question ${place + 1} of ${found.length} `, move("Previous", -1), " ", move("Next", 1)), make("p", { class: "tags" }, ...facts),
    make("div", { class: "answers" }, make("div", { class: all ? "whole" : null }, ...said, q.answers[0] ? card(q, 0, false) : null), ...cards));
  if (places.length === 2) detail.append(verdicts(q, places));
  location.replace(`#${new URLSearchParams({ q: q.id, left: field.left.value, right: field.right.value })}`);
}

// ---- start

const distinct = (name) => [...new Set(questions.map((q) => q[name]).filter((text) => text))].sort();
for (const name of ["set", "term", "kind", "context"]) fill(name, distinct(name), "all");
fill("flag", [...new Set(questions.flatMap((q) => q.answers.flatMap((answer) => answer?.flags ?? [])))].sort(), "any");
fill("left", names.slice(1), "all");
fill("right", names, "none");
fill("verdict", [["a", ""], ["t", "a tie"], ["b", ""], ["differ", "judges differ"], ["x", "changed when asked again"]], "any");
build();
const asked = new URLSearchParams(location.hash.slice(1).replace(/^answers-([\w-]+)$/, "left=$1&right=reference"));
for (const name of ["left", "right"]) if (names.includes(asked.get(name))) field[name].value = asked.get(name);
current = (rows.find(({ q }) => q.id === asked.get("q")) ?? rows[0])?.row ?? null;
apply();
filters.addEventListener("input", apply);
document.getElementById("clear").addEventListener("click", () => {
  for (const part of Object.values(field)) part.value = "";
  apply();
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
  if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1);
  else if (event.key === "/") { event.preventDefault(); field.text.focus(); }
});
