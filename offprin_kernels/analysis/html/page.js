"use strict";
// Figures are drawn when they come into view, and all of them before printing or where the address ends in ?all.
(() => {
  const SETTINGS = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], doubleClick: "reset" };
  const plots = [...document.querySelectorAll(".chart")];

  function draw(plot) {
    if (plot.dataset.drawn) return;
    plot.dataset.drawn = "yes";
    const figure = JSON.parse(document.getElementById(`data-${plot.id}`).textContent);
    const config = { ...SETTINGS, toImageButtonOptions: { filename: plot.id, format: "png", scale: 2 } };
    Plotly.newPlot(plot, figure.data, figure.layout, config);
    plot.classList.add("drawn");
    // the message is the label of the whole; its parts would be read letter by letter
    for (const svg of plot.querySelectorAll("svg")) svg.setAttribute("aria-hidden", "true");
  }
  const drawAll = () => plots.forEach(draw);

  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watch.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "500px 0px" });
  if (/\ball\b/.test(location.search)) drawAll();
  else plots.forEach((plot) => watch.observe(plot));

  const hidden = [];
  window.addEventListener("beforeprint", () => {
    drawAll();
    for (const plot of plots) if (plot.clientWidth !== 960) Plotly.relayout(plot, { width: 960 });
    for (const box of document.querySelectorAll("details:not([open]).print")) { box.open = true; hidden.push(box); }
  });
  window.addEventListener("afterprint", () => {
    for (const plot of plots) Plotly.relayout(plot, { width: null, autosize: true });
    while (hidden.length) hidden.pop().open = false;
  });

  // A legend's button shows or hides its series in every panel.
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".legend button");
    if (!button) return;
    const plot = button.closest("figure").querySelector(".chart");
    draw(plot);
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    const picked = plot.data.flatMap((trace, i) => (trace.legendgroup === button.dataset.group ? [i] : []));
    if (picked.length) Plotly.restyle(plot, { visible: shown }, picked);
  });

  // The table of all matrices: sorted, filtered and paged here, so that the page stays small.
  const place = document.getElementById("matrices");
  if (!place) return;
  const STEP = 25;
  const { columns, rows } = JSON.parse(document.getElementById("data-matrices").textContent);
  let order = rows.map((_, i) => i), sorted = { column: -1, down: false }, start = 0;
  const [filter, back, on] = ["filter", "back", "on"].map((id) => document.getElementById(id));
  const escape = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

  const look = (column) => (column.kind === "text" || column.kind === "name" ? ` class="${column.kind}"` : "");
  function cell(value, column) {
    if (value === null) return column.missing || "\u2013";
    if (column.kind === "text") return escape(value);
    if (column.kind === "name") return escape(value.replace(/\.weight$/, ""));
    if (column.kind === "count") return value.toLocaleString("en");
    if (column.kind === "percent") return `${(100 * value).toFixed(3)} %`;
    return column.kind === "degrees" ? `${value.toFixed(3)}\u00b0` : value.toExponential(2);
  }
  function show() {
    const heads = columns.map((column, i) => {
      const mark = sorted.column === i ? (sorted.down ? " \u25bc" : " \u25b2") : "";
      const aria = sorted.column === i ? ` aria-sort="${sorted.down ? "descending" : "ascending"}"` : "";
      return `<th scope="col"${aria}${look(column)}><button data-column="${i}">${column.title}${mark}</button></th>`;
    });
    const body = order.slice(start, start + STEP).map((i) => `<tr>${columns.map((column, j) =>
      `<td${look(column)}>${cell(rows[i][j], column)}</td>`).join("")}</tr>`);
    place.innerHTML = `<thead><tr>${heads.join("")}</tr></thead><tbody>${body.join("")}</tbody>`;
    const last = Math.min(start + STEP, order.length);
    document.getElementById("where").textContent = order.length ? `${start + 1} to ${last} of ${order.length}` : "none";
    back.disabled = start === 0;
    on.disabled = last >= order.length;
  }
  function arrange() {
    const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) => columns.map((column, j) => (typeof row[j] === "string" ? row[j] : "")).join(" ").toLowerCase();
    order = rows.map((_, i) => i).filter((i) => wanted.every((word) => text(rows[i]).includes(word)));
    if (sorted.column >= 0) {
      const sign = sorted.down ? -1 : 1, j = sorted.column;
      order.sort((a, b) => {
        const [x, y] = [rows[a][j], rows[b][j]];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y) * sign || a - b;
      });
    }
    start = 0;
    show();
  }
  place.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const column = Number(button.dataset.column);
    sorted = { column, down: sorted.column === column ? !sorted.down : !["text", "name"].includes(columns[column].kind) };
    arrange();
    place.querySelector(`[data-column="${column}"]`).focus();
  });
  filter.addEventListener("input", arrange);
  back.addEventListener("click", () => { start = Math.max(0, start - STEP); show(); });
  on.addEventListener("click", () => { start += STEP; show(); });
  show();
})();
