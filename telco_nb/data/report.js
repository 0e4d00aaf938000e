"use strict";
// Sortable tables: a button in the head sorts its column; empty cells stay last.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    const key = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent.trim();
    const number = (text) => (text !== "" && isFinite(text) ? Number(text) : null);
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const p = number(x), q = number(y);
      const order = p !== null && q !== null ? p - q : x.localeCompare(y);
      return down ? -order : order;
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
    fold(table);
  });
}
// A long table shows its first rows; a button below it shows all, and paper has all.
const FIRST_ROWS = 50;
function fold(table) {
  [...table.tBodies[0].rows].forEach((row, i) => { row.hidden = table.classList.contains("folded") && i >= FIRST_ROWS; });
}
document.querySelectorAll("table.wide").forEach((table, number) => {
  const n = table.tBodies[0].rows.length;
  if (n <= FIRST_ROWS) return;
  const button = document.createElement("button"), said = document.createElement("span"), line = document.createElement("p");
  table.id ||= `table-${number}`;
  line.className = "more-rows";
  said.className = "soft";
  said.setAttribute("role", "status");
  button.type = "button";
  button.className = "plain";
  button.setAttribute("aria-controls", table.id);
  const set = (folded) => {
    table.classList.toggle("folded", folded);
    fold(table);
    button.setAttribute("aria-expanded", !folded);
    button.textContent = folded ? `Show all ${n} rows` : `Show the first ${FIRST_ROWS} rows`;
    said.textContent = folded ? ` Rows 1 to ${FIRST_ROWS} of ${n}, as sorted.` : ` All ${n} rows.`;
  };
  button.addEventListener("click", () => { set(!table.classList.contains("folded")); reach(); });
  set(true);
  line.append(button, said);
  table.parentNode.after(line);
});
// One button folds or unfolds everything of a kind.
for (const button of document.querySelectorAll("button[data-fold]")) {
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", open);
    for (const part of document.querySelectorAll(button.dataset.fold)) part.open = open;
  });
}
// What scrolls can be reached, and so scrolled, by keyboard.
function reach() {
  for (const part of document.querySelectorAll(".scroll, .output_area")) {
    if (part.scrollWidth > part.clientWidth || part.scrollHeight > part.clientHeight) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}
reach();
addEventListener("resize", reach);
// On paper everything but code is unfolded.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not(.code)")) part.open = true;
});
