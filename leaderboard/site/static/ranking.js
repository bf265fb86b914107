"use strict";
// The table of all cells, and what happens when the reader changes something.
(() => {
  const { columns, sets, sequence, rows, position, value, bounds, offScale, format, interval, element, state, mask, select, focus, changed, show, showFacets, build, onChange, save, chart, budget, MARKS } = window.slim;
  const TEXTS = [["model", "Model"], ["family", "Family"], ["engine", "Engine"], ["kernel", "Kernel"], ["device", "Device"], ["grid", "Grid"], ["status", "Status"]];
  const PAGE = 50;
  const MOST_PRINTED = 1000;
  const order = new Intl.Collator("en", { numeric: true }).compare;
  const last = (sign) => (a, b) => (a === null || b === null ? (a === null) - (b === null) : sign * (typeof a === "string" ? order(a, b) : a - b));
  DataTable.ext.type.order["nlast-asc"] = last(1);
  DataTable.ext.type.order["nlast-desc"] = last(-1);

  const breaks = (text) => text.split(/(?<=[+,(/_:])/).flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));
  const tag = (text, kind = "", title = "") => element("span", { className: `tag ${kind}`, title }, text);
  const FRONT = "On the Pareto front: no cell of the set loses less and has";
  const nameCell = (row) => {
    const box = element("div", {}, element("a", { href: row.href }, ...breaks(row.name)));
    if (row.marks & MARKS.size) box.append(" ", tag("front: size", "front", `${FRONT} fewer bytes`));
    if (row.marks & MARKS.speed) box.append(" ", tag("front: speed", "front", `${FRONT} more tokens per second`));
    if (row.marks & MARKS.simulated) box.append(" ", tag("simulated", "label"));
    if (row.source && !(state.group && sets.length > 1)) box.append(" ", tag(`source ${row.source}`, "label"));
    if (row.marks & MARKS.foreign) box.append(" ", tag("foreign", "label"));
    if (row.marks & MARKS.reference) box.append(" ", tag("reference"));
    box.append(element("span", { className: "about" }, element("i", { className: `dot ${row.colour}` }), [row.family, row.engine, row.kernel].filter(Boolean).join(" · ")));
    return box;
  };
  const remarkCell = (row) => {
    const box = element("div");
    if (row.status !== "ok") box.append(element("p", {}, element("span", { className: `status ${row.status}` }, row.status), ` ${row.reason}`));
    for (const flag of row.flags) box.append(element("p", { className: "flag" }, flag));
    return box;
  };

  const members = sets.map(() => []);
  for (const row of rows) members[row.set].push(row);
  const references = sets.map((set, index) => members[index].find((row) => row.id === set.reference));
  const limits = sets.map((_, set) => offScale(members[set], set));
  const spans = new Map();
  const span = (set, index) => {
    const key = set * 1000 + index;
    if (!spans.has(key)) {
      const known = members[set].filter((row) => !(value(row, position.perplexity) > limits[set])).map((row) => bounds(row, index)).filter(Boolean);
      if (columns[index].signed) known.push([0, 0]);
      const lows = known.map((b) => b[0]).sort((a, b) => a - b), highs = known.map((b) => b[1]).sort((a, b) => a - b);
      spans.set(key, known.length < 2 ? null : [lows[0], highs[Math.min(highs.length - 1, Math.floor(highs.length * 0.95))]]);
    }
    return spans.get(key);
  };
  const bar = (row, index) => {
    const between = bounds(row, index), range = span(row.set, index);
    if (!between || !range) return [];
    // Signed numbers are linear within ±1 and logarithmic beyond.
    const f = columns[index].signed ? Math.asinh : columns[index].log && range[0] > 0 ? Math.log : (v) => v;
    const at = (v) => Math.min(100, Math.max(0, (100 * (f(v) - f(range[0]))) / (f(range[1]) - f(range[0]) || 1)));
    const made = element("span", { className: "interval" });
    made.setAttribute("aria-hidden", "true");
    made.style.setProperty("--low", `${at(between[0])}%`);
    made.style.setProperty("--wide", `${Math.max(0, at(between[1]) - at(between[0]))}%`);
    const reference = references[row.set];
    const mark = columns[index].signed ? 0 : reference ? value(reference, index) : null;
    if (mark !== null) made.style.setProperty("--mark", `${at(mark)}%`); else made.classList.add("bare");
    return [made];
  };
  const numberCell = (row, index) => {
    const given = row.cells[index];
    if (given === null) return "–";
    const box = element("div", {}, format(columns[index], value(row, index)));
    const between = interval(columns[index], given);
    if (between) box.append(element("small", {}, between), ...bar(row, index));
    return box;
  };

  const places = sets.map((_, set) => sequence.indexOf(set));
  const column = (key, title, sort, display, more = {}) => ({ name: key, title, type: "nlast", searchable: false, data: (row, type) => (type === "display" ? display(row) : type === "filter" ? "" : sort(row)), ...more });
  const layout = [
    column("set", "Set", (row) => places[row.set], (row) => String(row.set), { visible: false }),
    column("rank", "Rank", (row) => row.rank, (row) => (row.rank === null ? "–" : row.rank === row.rankLast ? String(row.rank) : `${row.rank}–${row.rankLast}`), { className: "rank" }),
    column("name", "Pipeline", (row) => row.name, nameCell, { cellType: "th", createdCell: (cell) => { cell.scope = "row"; } }),
    ...TEXTS.map(([key, title]) => column(key, title, (row) => row[key] || null, (row) => row[key] || "–", { className: "wrap" })),
    ...columns.map((c, index) => column(c.key, c.header, (row) => value(row, index), (row) => numberCell(row, index), { className: "n", orderSequence: c.rising ? ["desc", "asc"] : ["asc", "desc"] })),
    column("remarks", "Remarks", (row) => (row.status === "ok" ? null : row.status) ?? row.flags[0] ?? null, remarkCell, { className: "remarks" }),
  ];
  const ALWAYS = new Set(["set", "rank", "name", "remarks"]);
  const choosable = layout.filter((c) => !ALWAYS.has(c.name));
  const standard = new Set([...columns.filter((c) => c.shown).map((c) => c.key), "grid"]);
  const shown = () => state.shown ?? standard;
  const place = (name) => layout.findIndex((c) => c.name === name);
  const sorting = () => { const at = state.sort ? place(state.sort[0]) : -1; return at > 0 ? [[at, state.sort[1]]] : []; };
  const fixed = () => ({ pre: state.group && sets.length > 1 ? [[0, "asc"]] : [], post: [] });

  const groups = (api) => {
    if (sets.length < 2 || !state.group) return;
    let before = -1;
    const wide = layout.filter((_, i) => api.column(i).visible()).length;
    api.rows({ page: "current" }).every(function () {
      const row = this.data();
      if (row.set === before) return;
      before = row.set;
      const set = sets[row.set];
      const head = element("th", { colSpan: wide, scope: "colgroup" }, element("div", { className: "stick" }, element("b", {}, set.title), element("span", { className: "setting" }, ` ${set.setting} `)));
      if (!state.set) {
        const only = element("button", { type: "button" }, "Only these");
        only.setAttribute("aria-label", `Only cells of ${set.title}, ${set.setting}`);
        only.addEventListener("click", () => { state.set = set.id; changed("rows"); document.getElementById("set").focus(); });
        head.firstChild.append(only);
      }
      head.firstChild.append(element("p", { className: "setting" }, set.resolution.join(" ")));
      for (const note of set.notes) head.firstChild.append(element("p", { className: "note" }, note));
      this.node().before(element("tr", { className: "group" }, head));
    });
  };

  // With rows kept apart by set, DataTables announces the order of the sets; what the reader sorts by is the next one.
  const announce = (api) => {
    const now = api.order().find(([at]) => at !== 0);
    layout.forEach((_, i) => {
      const header = api.column(i).header();
      header.removeAttribute("aria-sort");
      if (now && now[0] === i && now[1]) header.setAttribute("aria-sort", now[1] === "asc" ? "ascending" : "descending");
    });
  };

  let kept = select(), table, quiet = true, apart = state.group;
  const start = () => {
    build(); chart.build(); budget.build();
    table = new DataTable("#cells", {
      data: rows, columns: layout, deferRender: true, pageLength: PAGE, autoWidth: false, orderMulti: false, order: sorting(), orderFixed: fixed(), searching: true, processing: false,
      layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: "paging" },
      language: { info: "_START_ to _END_ of _TOTAL_ cells", infoEmpty: "no cells", infoFiltered: "", zeroRecords: "No cell fits these filters.", emptyTable: "No cells." },
      createdRow: (node, row) => { if (row.marks & MARKS.reference) node.classList.add("reference"); },
      drawCallback() { groups(this.api()); announce(this.api()); },
      initComplete() { this.api().search.fixed("filters", (_, row, index) => mask[index] === 1); },
    });
    layout.forEach((c, i) => {
      const help = columns.find((k) => k.key === c.name)?.help;
      if (help) table.column(i).header().title = help;
      if (!ALWAYS.has(c.name)) table.column(i).visible(shown().has(c.name), false);
    });
    table.columns.adjust();
    table.on("order", () => {
      announce(table);
      if (quiet) return;
      const now = table.order().find(([at]) => at !== 0);
      state.sort = now && now[1] ? [layout[now[0]].name, now[1]] : null;
      state.page = 0;
      save();
    });
    table.on("page", () => { if (!quiet) { state.page = table.page(); save(); document.querySelector("#cells").closest(".scroll").scrollTop = 0; } });
    chooser();
    update("all");
    const length = (rows) => { quiet = true; const page = state.page; table.page.len(rows).page(page < table.page.info().pages ? page : 0).draw("page"); quiet = false; };
    window.addEventListener("beforeprint", () => { if (kept.length <= MOST_PRINTED) length(-1); });
    window.addEventListener("afterprint", () => length(PAGE));
  };

  const chooser = () => {
    const fieldset = document.querySelector("#chooser fieldset");
    for (const c of choosable) {
      const box = element("input", { type: "checkbox", value: c.name });
      box.addEventListener("change", () => {
        const wanted = new Set(shown());
        wanted[box.checked ? "add" : "delete"](c.name);
        state.shown = wanted;
        changed("columns");
      });
      fieldset.append(element("label", { className: "check" }, box, ` ${c.title}`));
    }
  };

  const update = (what) => {
    quiet = true;
    if (["all", "rows"].includes(what)) {
      kept = select();
      show();
      const page = state.page;
      table.draw();
      if (page && page < table.page.info().pages) table.page(page).draw("page");
      const failed = kept.filter((row) => row.status !== "ok").length;
      document.getElementById("count").textContent = `${kept.length} of ${rows.length} cells${failed ? `, ${failed} did not end well` : ""}`;
    }
    if (apart !== state.group) { apart = state.group; table.rows().invalidate(); }
    if (["all", "order"].includes(what)) { table.order.fixed(fixed()); table.order(sorting()).draw(what !== "all" || !state.page ? true : "page"); }
    if (["all", "columns"].includes(what)) {
      for (const box of document.querySelectorAll("#chooser input")) { box.checked = shown().has(box.value); table.column(place(box.value)).visible(box.checked, false); }
      table.draw(false);
    }
    quiet = false;
    requestAnimationFrame(() => {
      const set = focus(kept);
      if (["all", "rows", "chart"].includes(what)) { chart.show(); chart.draw(kept, set); }
      if (["all", "rows", "budget"].includes(what)) { if (what !== "budget") budget.show(); budget.advise(kept, set); }
      if (what === "all") { document.documentElement.classList.add("ready"); performance.mark("rows"); }
    });
  };
  onChange((what) => { if (what === "rows") showFacets(); update(what); });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
