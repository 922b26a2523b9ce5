"use strict";
(() => {
  // Hover and focus texts.
  const tip = document.getElementById("tip");
  const show = (event) => {
    const mark = event.target.closest("[data-tip]");
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const at = mark.getBoundingClientRect();
    const x = event.clientX ?? at.left;
    const y = event.clientY ?? at.top;
    tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, y - tip.offsetHeight - 12)}px`;
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("pointerdown", show);

  // Sorting: rows move within their family.
  const value = (row, index, numeric) => {
    const cell = row.children[index];
    const text = cell.dataset.value ?? cell.textContent.trim();
    return numeric ? Number(text) : text.toLowerCase();
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, index) => {
      if (head.dataset.sort === "none") return;
      const numeric = head.dataset.sort === "number";
      const sort = () => {
        const now = head.getAttribute("aria-sort");
        const first = numeric ? "descending" : "ascending";
        const next = now ? (now === "ascending" ? "descending" : "ascending") : first;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        for (const body of table.tBodies) {
          const rows = [...body.rows].filter((row) => !row.classList.contains("family"));
          rows.sort((a, b) => {
            const x = value(a, index, numeric), y = value(b, index, numeric);
            return sign * (x < y ? -1 : x > y ? 1 : 0);
          });
          body.append(...rows);
        }
      };
      head.tabIndex = 0;
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
  }

  // Filter: every word must occur.
  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.querySelectorAll("tr[data-search]")) {
      const text = row.dataset.search.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    for (const head of document.querySelectorAll("tr.family")) {
      head.hidden = ![...head.parentElement.rows].some((row) => !row.hidden && row !== head);
    }
  });

  // Print everything, folded or not.
  const folded = [];
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; folded.push(part); }
  });
  addEventListener("afterprint", () => { while (folded.length) folded.pop().open = false; });
})();
