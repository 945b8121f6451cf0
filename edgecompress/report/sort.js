// Makes the head of the layer table sort it. Without this script the page reads the same, in the model's order.
for (const table of document.querySelectorAll("table.layers")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const key = (row, column) => row.cells[column].dataset.v ?? "";
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("n");
      const order = numeric ? ["descending", "ascending", null] : ["ascending", "descending", null];
      const next = order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      const rows = [...original];
      if (next) {
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const known = (row) => key(row, column) !== "";
        rows.sort((a, b) => {
          const [x, y] = [key(a, column), key(b, column)];
          if (known(a) !== known(b)) return known(a) ? -1 : 1;
          return sign * (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true }));
        });
      }
      body.append(...rows);
    });
  });
}
