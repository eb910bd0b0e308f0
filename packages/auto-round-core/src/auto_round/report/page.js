"use strict";
(() => {
  // Drawings know layers and blocks by their rows, which sorting moves.
  const tables = new Map([...document.querySelectorAll("table[id]")].map((table) => [table.id, {
    heads: [...table.tHead.rows[0].cells].map((cell) => cell.textContent),
    rows: [...table.tBodies[0].rows],
  }]));

  const order = new Intl.Collator("en", { numeric: true });
  const words = new Map([["row", Infinity], ["exact", Infinity], ["inf", Infinity], ["-inf", -Infinity]]);
  // What is not there, NaN and -, comes last in either direction.
  const number = (text) => words.get(text) ?? Number(text.replace(/,/g, "").replace("%", ""));

  const sort = (table, column, down) => {
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => ({ row, text: row.cells[column].textContent.trim() }));
    for (const one of keyed) one.value = number(one.text);
    const numeric = keyed.some((one) => !Number.isNaN(one.value));
    const sign = down ? -1 : 1;
    keyed.sort((a, b) => {
      if (!numeric) return sign * order.compare(a.text, b.text);
      const missing = Number.isNaN(a.value) - Number.isNaN(b.value);
      return missing || (a.value === b.value ? 0 : sign * (a.value < b.value ? -1 : 1)) || 0;
    });
    const all = document.createDocumentFragment();
    for (const one of keyed) all.append(one.row);
    body.append(all);
  };

  for (const table of document.querySelectorAll(".sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sort(table, column, down);
      });
    });
  }

  const pointsOf = (path) => {
    const places = [...path.getAttribute("d").matchAll(/M(\d+) (\d+)h0/g)];
    const tips = path.dataset.tips?.split("|");
    const rows = path.dataset.rows?.split(" ").map(Number);
    return places.map((place, i) => ({
      x: place[1] / 1000, y: place[2] / 1000, tip: tips?.[i], table: path.dataset.table, row: rows?.[i],
    }));
  };

  const describe = (tip, point) => {
    const name = document.createElement("b");
    const table = tables.get(point.table);
    const row = table?.rows[point.row];
    name.textContent = row ? row.cells[0].textContent.trim() : point.tip;
    tip.replaceChildren(name);
    if (!row) return;
    for (let i = 1; i < table.heads.length; i += 1) {
      const line = document.createElement("div");
      line.textContent = `${table.heads[i]}: ${row.cells[i].textContent.trim()}`;
      tip.append(line);
    }
  };

  for (const plot of document.querySelectorAll(".plot")) {
    const points = [...plot.querySelectorAll("path[data-rows], path[data-tips]")].flatMap(pointsOf);
    if (!points.length) continue;
    const tip = document.createElement("div"), mark = document.createElement("div");
    tip.className = "tip";
    mark.className = "mark";
    tip.hidden = mark.hidden = true;
    plot.append(mark, tip);
    plot.classList.add("live");
    const upright = "nearX" in plot.dataset ? 0.05 : 1;
    const leave = () => { tip.hidden = mark.hidden = true; };
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      const x = event.clientX - box.left, y = event.clientY - box.top;
      let best = points[0], least = Infinity;
      for (const one of points) {
        const distance = (one.x * box.width - x) ** 2 + upright * (one.y * box.height - y) ** 2;
        if (distance < least) { best = one; least = distance; }
      }
      describe(tip, best);
      tip.hidden = mark.hidden = false;
      const left = best.x * box.width, top = best.y * box.height;
      mark.style.left = `${left}px`;
      mark.style.top = `${top}px`;
      // Beside the point where there is room, and never over the page's edge.
      const beside = left + 14 + tip.offsetWidth <= box.width ? left + 14 : left - 14 - tip.offsetWidth;
      tip.style.left = `${Math.max(beside, -box.left + 4)}px`;
      tip.style.top = `${Math.min(Math.max(top - tip.offsetHeight / 2, 0), Math.max(box.height - tip.offsetHeight, 0))}px`;
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    // A finger leaves when it is lifted; what it touched shall stay to be read.
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
    document.addEventListener("pointerdown", (event) => { if (!plot.contains(event.target)) leave(); });
  }
})();
