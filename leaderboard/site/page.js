"use strict";

/* Each row of the board is a <tbody> of two <tr>: the figures and the details. */
for (const section of document.querySelectorAll("section.board")) {
  const table = section.querySelector("table");
  const headers = [...table.querySelectorAll("thead th")];
  const bodies = () => [...table.tBodies];

  const value = (body, index) => {
    const cell = body.rows[0].cells[index];
    if (!cell || cell.dataset.sort === undefined) return null;
    return index === 0 || index === headers.length - 1 ? cell.dataset.sort : Number(cell.dataset.sort);
  };

  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);

  const sort = (index, direction) => {
    const sorted = bodies().map((body) => [value(body, index), body]);
    sorted.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : direction * compare(a, b)));
    table.append(...sorted.map(([, body]) => body));
    headers.forEach((th, i) => th.setAttribute("aria-sort", i !== index ? "none" : direction > 0 ? "ascending" : "descending"));
  };

  headers.forEach((th, index) => {
    th.querySelector("button").addEventListener("click", () => {
      const first = th.dataset.first === "descending" ? -1 : 1;
      const current = th.getAttribute("aria-sort");
      sort(index, current === "none" ? first : current === "ascending" ? -1 : 1);
    });
  });

  const search = section.querySelector("input[type=search]");
  const count = section.querySelector("output");
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const body of bodies()) {
      const text = body.textContent.toLowerCase();
      body.hidden = !words.every((word) => text.includes(word));
    }
    count.textContent = `${bodies().filter((body) => !body.hidden).length} of ${bodies().length} rows`;
  });

  table.addEventListener("click", (event) => {
    const button = event.target.closest("button.toggle");
    if (!button) return;
    const open = button.closest("tbody").classList.toggle("open");
    button.setAttribute("aria-expanded", String(open));
  });
}
document.documentElement.classList.add("js");
