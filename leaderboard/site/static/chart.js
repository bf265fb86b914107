"use strict";
// Quality against cost: one point for each cell of a set, its intervals, and the line of those that none beats in both.
(() => {
  const { columns, sets, position, value, bounds, offScale, format, element, state, changed, MARKS, INVALID } = window.slim;
  const AXES = ["weight_bytes", "decode_tokens_per_s", "speedup", "effective_bits", "disk_bytes", "prefill_ms"].filter((key) => key in position);
  const NS = "http://www.w3.org/2000/svg";
  const [LEFT, RIGHT, TOP, BOTTOM] = [58, 14, 12, 44];
  let [WIDTH, HEIGHT] = [640, 380];
  const MOST = 1500;
  const SHAPES = {
    reference: "M0-7L2-2.2 7-2 3 1.4 4.4 6.4 0 3.6-4.4 6.4-3 1.4-7-2-2-2.2Z", quantization: "M0-4.5A4.5 4.5 0 1 1 0 4.5 4.5 4.5 0 1 1 0-4.5Z",
    pruning: "M-4-4H4V4H-4Z", distillation: "M0-5L5 4H-5Z", compact: "M0 5L5-4H-5Z", dynamic: "M-1.7-5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5v-3.4h3.3Z",
    combined: "M0-5.6L5.6 0 0 5.6-5.6 0Z", other: "M-4.6-2.6L-2.6-4.6 0-2 2.6-4.6 4.6-2.6 2 0 4.6 2.6 2.6 4.6 0 2-2.6 4.6-4.6 2.6-2 0Z",
  };
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS(NS, tag);
    for (const [name, given] of Object.entries(attributes)) made.setAttribute(name, given);
    made.append(...children);
    return made;
  };

  const scale = (values, from, to, pad = 0.05) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const log = low > 0 && high > 3 * low;
    const f = log ? Math.log : (v) => v;
    const [a, b] = [f(low), f(high)], room = (b - a || Math.abs(a) * 0.1 || 1) * pad;
    const map = (v) => from + ((f(v) - a + room) / (b - a + 2 * room)) * (to - from);
    return { map, ticks: log ? logTicks(low, high) : linearTicks(low, high) };
  };
  const linearTicks = (low, high) => {
    const raw = (high - low || Math.abs(high) || 1) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const ticks = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) ticks.push(Number(t.toPrecision(8)));
    return ticks;
  };
  const logTicks = (low, high) => {
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) for (const m of [1, 2, 5]) if (m * 10 ** p >= low && m * 10 ** p <= high) ticks.push(m * 10 ** p);
    if (ticks.length < 3) return linearTicks(low, high);
    return ticks.length > 8 ? ticks.filter((t) => /^1/.test(String(t))) : ticks;
  };

  const front = (points, rising) => {
    let best = Infinity;
    const spoiled = INVALID.cell | INVALID.quality | (["decode_tokens_per_s", "speedup"].includes(state.axis) ? INVALID.decode : 0);
    return points.filter((p) => ["ok", "incomplete"].includes(p.row.status) && !(p.row.invalid & spoiled)).sort((a, b) => a.y - b.y || (rising ? b.x - a.x : a.x - b.x))
      .filter((p) => { const cost = rising ? -p.x : p.x; if (cost >= best) return false; best = cost; return true; });
  };

  const draw = (kept, set) => {
    const box = document.getElementById("chart"), note = document.getElementById("plotted");
    box.replaceChildren();
    WIDTH = Math.min(760, Math.max(320, box.clientWidth || 640));
    HEIGHT = Math.round(Math.min(380, 160 + WIDTH * 0.36));
    const index = position[state.axis], column = columns[index], ppl = position.perplexity;
    const inSet = kept.filter((row) => row.set === set);
    const known = inSet.filter((row) => value(row, ppl) !== null && value(row, index) !== null);
    const limit = offScale(known, set);
    const points = known.filter((row) => value(row, ppl) <= limit).slice(0, MOST).map((row) => ({ row, x: value(row, index), y: value(row, ppl), xs: bounds(row, index), ys: bounds(row, ppl) }));
    const off = known.length - points.length;
    note.textContent = set < 0 ? "Nothing to draw." : `${sets[set].name}: ${points.length} ${points.length === 1 ? "cell" : "cells"}${off ? `, ${off} off the scale` : ""}.`;
    if (points.length < 2) { box.append(element("p", { className: "setting" }, "Fewer than two cells have both numbers.")); return; }
    const x = scale(points.flatMap((p) => [p.x, ...(p.xs ?? [])]).filter((v) => v > 0), LEFT, WIDTH - RIGHT);
    const y = scale(points.flatMap((p) => [p.y, ...(p.ys ?? [])]), HEIGHT - BOTTOM, TOP);
    const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Perplexity against ${column.header}, ${sets[set].name}. The table below holds the same numbers.` });
    for (const t of x.ticks) root.append(svg("line", { class: "grid", x1: x.map(t), x2: x.map(t), y1: TOP, y2: HEIGHT - BOTTOM }), svg("text", { x: x.map(t), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, String(t)));
    for (const t of y.ticks) root.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y.map(t), y2: y.map(t) }), svg("text", { x: LEFT - 8, y: y.map(t) + 4, "text-anchor": "end" }, String(t)));
    root.append(
      svg("text", { class: "title", x: (LEFT + WIDTH) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, `${column.header} (${column.rising ? "more is better →" : "← less is better"})`),
      svg("text", { class: "title", x: -(HEIGHT - BOTTOM) / 2, y: 13, "text-anchor": "middle", transform: "rotate(-90)" }, "Perplexity (↓ less is better)"),
    );
    const line = front(points, column.rising);
    if (line.length > 1) root.append(svg("polyline", { class: "frontline", points: line.map((p) => `${x.map(p.x)},${y.map(p.y)}`).join(" ") }));
    for (const p of points) {
      const [cx, cy] = [x.map(p.x), y.map(p.y)];
      const mark = svg("g", { class: `point ${p.row.colour}` });
      if (p.ys) mark.append(svg("line", { x1: cx, x2: cx, y1: y.map(p.ys[0]), y2: y.map(p.ys[1]) }));
      if (p.xs && p.xs[0] > 0) mark.append(svg("line", { x1: x.map(p.xs[0]), x2: x.map(p.xs[1]), y1: cy, y2: cy }));
      mark.append(svg("path", { d: SHAPES[p.row.marks & MARKS.reference ? "reference" : p.row.colour] ?? SHAPES.other, transform: `translate(${cx} ${cy})` }));
      mark.append(svg("title", {}, `${p.row.name} · ${p.row.engine}\nperplexity ${format(columns[ppl], p.y)}, ${column.header} ${format(column, p.x)}`));
      mark.addEventListener("click", () => { location.href = p.row.href; });
      root.append(mark);
    }
    const taken = [];
    for (const p of line) {
      const name = p.row.name.length > 30 ? `${p.row.name.slice(0, 29)}…` : p.row.name, wide = name.length * 6.2;
      const at = { x: Math.min(x.map(p.x) + 8, WIDTH - wide - 4), y: y.map(p.y) - 8 };
      if (taken.some((o) => Math.abs(o.y - at.y) < 13 && at.x < o.x + o.wide && o.x < at.x + wide)) continue;
      taken.push({ ...at, wide });
      root.append(svg("text", { class: "label", x: at.x, y: at.y }, name));
    }
    const families = [...new Set(points.map((p) => p.row.colour))];
    const legend = element("p", { className: "legend" }, ...families.map((family) => element("span", {}, element("i", { className: `dot ${family}` }), family)), element("span", {}, "dashed: Pareto front, without what a flag takes away"));
    box.append(root, legend);
  };

  const build = () => {
    const choice = document.getElementById("axis");
    choice.append(...AXES.map((key) => element("option", { value: key }, columns[position[key]].header)));
    choice.addEventListener("change", () => { state.axis = choice.value; changed("chart"); });
    let waiting;
    window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => changed("chart"), 150); });
  };
  window.slim.chart = { build, draw, show: () => { document.getElementById("axis").value = state.axis; } };
})();
