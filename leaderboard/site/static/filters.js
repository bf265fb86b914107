"use strict";
// What the reader wants to see, kept in the address so that a view can be shared: search, facets, set, sort, columns, budget.
(() => {
  const { rows, sets, sequence, enough, columns, element, BITS, SIZES } = window.slim;
  const FACETS = [["model", "Model"], ["size", "Size", SIZES], ["family", "Family"], ["engine", "Engine"], ["device", "Device"], ["bits", "Bits", BITS], ["grid", "Grid"], ["verdict", "Verdict"], ["status", "Status"]];
  const NUMBERS = ["memory", "drop", "speed"];
  const defaults = () => ({ q: "", set: "", facets: Object.fromEntries(FACETS.map(([key]) => [key, new Set()])), sort: null, shown: null, group: true, page: 0,
    axis: "weight_bytes", memory: null, drop: null, speed: null, objective: "quality" });
  const state = defaults();
  const listeners = [];

  const read = () => {
    Object.assign(state, defaults());
    const given = new URLSearchParams(location.hash.slice(1));
    state.q = given.get("q") ?? "";
    state.set = sets.some((set) => set.id === given.get("set")) ? given.get("set") : "";
    for (const [key] of FACETS) state.facets[key] = new Set(given.getAll(key));
    const sort = /^(-?)([a-z_]+)$/.exec(given.get("sort") ?? "");
    if (sort) state.sort = [sort[2], sort[1] ? "desc" : "asc"];
    if (given.has("columns")) state.shown = new Set(given.get("columns").split(" "));
    state.group = given.get("group") !== "no";
    state.page = Math.max(0, Math.trunc(Number(given.get("page")) || 1) - 1);
    if (columns.some((column) => column.key === given.get("axis"))) state.axis = given.get("axis");
    for (const key of NUMBERS) state[key] = given.has(key) && isFinite(given.get(key)) ? Number(given.get(key)) : null;
    if (["quality", "speed", "size"].includes(given.get("prefer"))) state.objective = given.get("prefer");
  };

  const hash = () => {
    const out = new URLSearchParams();
    if (state.q) out.set("q", state.q);
    if (state.set) out.set("set", state.set);
    for (const [key] of FACETS) for (const value of state.facets[key]) out.append(key, value);
    if (state.sort) out.set("sort", (state.sort[1] === "desc" ? "-" : "") + state.sort[0]);
    if (state.shown) out.set("columns", [...state.shown].join(" "));
    if (!state.group) out.set("group", "no");
    if (state.page) out.set("page", state.page + 1);
    if (state.axis !== "weight_bytes") out.set("axis", state.axis);
    for (const key of NUMBERS) if (state[key] !== null) out.set(key, state[key]);
    if (state.objective !== "quality") out.set("prefer", state.objective);
    return out.toString();
  };
  const save = () => {
    const wanted = hash();
    if (wanted !== location.hash.slice(1)) history.replaceState(null, "", wanted ? `#${wanted}` : location.pathname + location.search);
  };

  const haystacks = [];
  const haystack = (row) => (haystacks[row.index] ??= [row.name, row.model, row.engine, row.kernel, row.family, row.status, row.reason, row.source, sets[row.set].title, ...row.flags].join("\n").toLowerCase());
  const mask = new Uint8Array(rows.length).fill(1);
  const select = () => {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const active = FACETS.filter(([key]) => state.facets[key].size);
    const set = state.set ? sets.findIndex((s) => s.id === state.set) : -1;
    const kept = [];
    for (const row of rows) {
      const keep = (set < 0 || row.set === set) && active.every(([key]) => state.facets[key].has(row[key])) && words.every((word) => haystack(row).includes(word));
      mask[row.index] = keep ? 1 : 0;
      if (keep) kept.push(row);
    }
    return kept;
  };

  const changed = (what) => { if (what === "rows") state.page = 0; save(); for (const listener of listeners) listener(what); };

  const facet = ([key, title, order]) => {
    const counts = new Map();
    for (const row of rows) counts.set(row[key], (counts.get(row[key]) ?? 0) + 1);
    const values = [...counts.keys()].sort(order ? (a, b) => (order.indexOf(a) + 99) % 99 - (order.indexOf(b) + 99) % 99 : new Intl.Collator("en", { numeric: true }).compare);
    const summary = element("summary", {}, title, element("b"));
    const fieldset = element("fieldset", {}, element("legend", { className: "hidden" }, title));
    for (const value of values) {
      const box = element("input", { type: "checkbox", value });
      box.addEventListener("change", () => { state.facets[key][box.checked ? "add" : "delete"](value); changed("rows"); });
      fieldset.append(element("label", { className: "check" }, box, ` ${value || "none"} `, element("span", { className: "count" }, String(counts.get(value)))));
    }
    return element("details", { className: "facet", dataset: { facet: key } }, summary, fieldset);
  };
  const showFacets = () => {
    for (const details of document.querySelectorAll("#facets .facet")) {
      const chosen = state.facets[details.dataset.facet];
      for (const box of details.querySelectorAll("input")) box.checked = chosen.has(box.value);
      details.querySelector("b").textContent = chosen.size ? ` ${chosen.size}` : "";
      details.classList.toggle("active", chosen.size > 0);
    }
  };

  const show = () => {
    document.getElementById("q").value = state.q;
    document.getElementById("set").value = state.set;
    document.getElementById("group").checked = state.group;
    showFacets();
  };

  const build = () => {
    document.getElementById("facets").append(...FACETS.filter(([key]) => new Set(rows.map((row) => row[key])).size > 1).map(facet));
    const choice = document.getElementById("set");
    sets.forEach((set) => choice.append(element("option", { value: set.id }, `${set.title} · ${set.setting}`)));
    let waiting;
    document.getElementById("q").addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { state.q = event.target.value.trim(); changed("rows"); }, rows.length > 2000 ? 80 : 0);
    });
    choice.addEventListener("change", () => { state.set = choice.value; changed("rows"); });
    document.getElementById("group").addEventListener("change", (event) => { state.group = event.target.checked; changed("order"); });
    document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
    document.getElementById("reset").addEventListener("click", () => {
      Object.assign(state, defaults(), { shown: state.shown, sort: state.sort, axis: state.axis });
      changed("all");
    });
    document.getElementById("share").addEventListener("click", (event) => window.copyText(location.href, event.target));
    document.addEventListener("click", (event) => {
      for (const open of document.querySelectorAll("details.facet[open]")) if (!open.contains(event.target)) open.open = false;
    });
    document.addEventListener("keydown", (event) => {
      const open = event.key === "Escape" && document.querySelector("details.facet[open]");
      if (open) { open.open = false; open.querySelector("summary").focus(); }
    });
    window.addEventListener("hashchange", () => { read(); for (const listener of listeners) listener("all"); });
  };

  /** The set that chart and budget speak of: the chosen one, or the first that has enough rows with a perplexity in view, or the one with most of them. */
  const focus = (kept) => {
    if (state.set) return sets.findIndex((set) => set.id === state.set);
    const counts = new Map();
    for (const row of kept) if (row.cells[0] !== null) counts.set(row.set, (counts.get(row.set) ?? 0) + 1);
    const first = sequence.find((set) => (counts.get(set) ?? 0) >= enough);
    if (first !== undefined) return first;
    return [...counts].reduce((best, entry) => (entry[1] > best[1] ? entry : best), [-1, 0])[0];
  };

  read();
  Object.assign(window.slim, { state, mask, select, focus, changed, show, showFacets, build, save, onChange: (listener) => listeners.push(listener) });
})();
