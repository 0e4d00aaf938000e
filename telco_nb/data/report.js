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
  });
}
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
