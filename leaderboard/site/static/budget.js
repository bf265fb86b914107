"use strict";
// Which cell to ship under a budget: the rules of `slimbench recommend`, on the numbers of the page.
(() => {
  const { columns, sets, position, value, bounds, format, element, state, changed, MARKS, INVALID } = window.slim;
  const SLIDERS = ["memory", "drop", "speed"];
  const Z = 1.959963984540054;
  let ranges = { memory: [0, 1], speed: [0, 1] };

  const ppl = position.perplexity, delta = position.perplexity_delta_percent, decode = position.decode_tokens_per_s, speedup = position.speedup;
  const drop = (row) => (row.marks & MARKS.reference ? 0 : value(row, delta));
  const least = (v) => (v === null ? Infinity : v);
  const ORDERS = {
    quality: (row) => [least(value(row, ppl)), least(row.memory), -(value(row, decode) ?? -Infinity)],
    speed: (row) => [-(value(row, decode) ?? -Infinity), least(value(row, ppl)), least(row.memory)],
    size: (row) => [least(row.memory), least(value(row, ppl)), -(value(row, decode) ?? -Infinity)],
  };
  const compare = (order) => (a, b) => { const [x, y] = [order(a), order(b)]; for (let i = 0; i < x.length; i++) if (x[i] !== y[i]) return x[i] < y[i] ? -1 : 1; return a.index - b.index; };

  const erf = (x) => { const t = 1 / (1 + 0.3275911 * Math.abs(x)); const y = 1 - ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * Math.exp(-x * x); return x < 0 ? -y : y; };
  const keeps = (v, interval, limit, sign) => {
    if (v === null || !interval || Math.min(v, interval[0], limit) <= 0) return null;
    const error = (Math.log(interval[1]) - Math.log(interval[0])) / (2 * Z), distance = sign * (Math.log(v) - Math.log(limit));
    return error === 0 ? Number(distance >= 0) : 0.5 * (1 + erf(distance / error / Math.SQRT2));
  };
  const hold = (row) => {
    const limits = [];
    if (state.memory !== null) limits.push({ name: "memory", figure: INVALID.memory, excess: row.memory === null ? Infinity : Math.max(0, row.memory / state.memory - 1), sure: null });
    if (state.drop !== null) {
      const d = drop(row), ratio = d === null ? null : 1 + d / 100, limit = 1 + state.drop / 100, between = bounds(row, delta)?.map((v) => 1 + v / 100);
      limits.push({ name: "perplexity", figure: INVALID.quality, excess: ratio === null ? Infinity : Math.max(0, ratio / limit - 1), sure: row.marks & MARKS.reference ? 1 : keeps(ratio, between, limit, -1) });
    }
    if (state.speed !== null) {
      const v = value(row, decode);
      limits.push({ name: "speed", figure: INVALID.decode, excess: v === null ? Infinity : Math.max(0, state.speed / v - 1), sure: keeps(v, bounds(row, decode), state.speed, 1) });
    }
    return { row, limits, excess: limits.reduce((sum, l) => sum + l.excess, 0), missed: limits.filter((l) => l.excess > 0) };
  };
  // The figures by which cells are chosen now; an invalidating flag on one of them, or on the cell, leaves it out.
  const reads = () => INVALID.cell | INVALID.quality | (state.memory !== null || state.objective === "size" ? INVALID.memory : 0) | (state.speed !== null || state.objective === "speed" ? INVALID.decode : 0);
  const heavy = (row) => state.memory !== null && value(row, position.weight_bytes) > state.memory;
  const mightFit = (held) => held.limits.every((l) => l.excess === 0 || (held.row.invalid & l.figure && !(l.figure === INVALID.memory && heavy(held.row))));
  const kept = (l) => `${l.name} (${l.sure === null ? "measured once, no interval" : `one-sided confidence ${percent(l.sure)}`})`;

  const words = (row) => {
    const parts = [];
    const say = (index, text) => { if (value(row, index) !== null) parts.push(text(format(columns[index], value(row, index)))); };
    say(ppl, (v) => `perplexity ${v}`);
    say(delta, (v) => `${v} %`);
    if (row.memory !== null) parts.push(`${row.memory.toFixed(0)} MB`);
    say(decode, (v) => `${v} tokens/s`);
    say(speedup, (v) => `${v} × the reference`);
    return parts.join(", ");
  };
  const percent = (p) => (p > 0.999 ? "> 99.9 %" : p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
  const line = (title, held, extra = "") => element("p", {}, element("b", {}, `${title} `), element("a", { href: held.row.href }, held.row.name), ` (${held.row.engine}): ${words(held.row)}${extra}`);

  const flags = (held, wanted = () => true) => held.row.flags.filter(wanted).map((text) => element("p", { className: "flag" }, text));

  const MOST_LEFT_OUT = 5;
  const leftOut = (box, out) => {
    if (!out.length) return;
    box.append(element("p", { className: "setting" }, `Left out for an invalidating flag${out.length > MOST_LEFT_OUT ? `, ${out.length} in all` : ""}:`));
    for (const h of out.slice(0, MOST_LEFT_OUT)) box.append(element("p", {}, element("span", {}, `${h.row.name} (${h.row.engine}): ${words(h.row)}`)), ...flags(h, (text) => text.startsWith("invalid: ")));
  };

  const advise = (inView, set) => {
    const box = document.getElementById("advice");
    const candidates = inView.filter((row) => row.set === set && row.status === "ok" && row.cells[ppl] !== null && !(row.marks & MARKS.foreign));
    spread(candidates);
    box.replaceChildren();
    if (!candidates.length) { box.append(element("p", {}, "No finished cell in view to choose from.")); return; }
    const all = candidates.sort(compare(ORDERS[state.objective])).map(hold), held = all.filter((h) => !(h.row.invalid & reads()));
    const out = all.filter((h) => h.row.invalid & reads() && mightFit(h));
    const [choice, next] = held.filter((h) => h.excess === 0);
    box.append(element("p", { className: "setting" }, `Of ${held.length} finished cells of ${sets[set].name} in view. Memory: weights, KV cache and activations together, where all were measured.`));
    if (!choice) {
      box.append(element("p", { className: "notice" }, "None keeps to the budget."));
      if (held.length) {
        const near = held.reduce((best, h) => (h.excess < best.excess ? h : best));
        const missed = near.missed.map((l) => `${l.name} ${isFinite(l.excess) ? `by ${(100 * l.excess).toFixed(1)} %` : "(not measured)"}`).join(", ");
        box.append(line("Nearest miss:", near, `; misses ${missed}`));
      }
      leftOut(box, out);
      return;
    }
    box.append(line(`Best by ${state.objective}:`, choice, choice.limits.length ? `. Keeps to the budget: ${choice.limits.map(kept).join("; ")}.` : "."), ...flags(choice));
    if (next) {
      const tie = choice.row.rank !== null && next.row.rank !== null && choice.row.rank <= next.row.rankLast && next.row.rank <= choice.row.rankLast;
      box.append(line("Runner-up:", next, tie ? ". Their ranks overlap." : "."), ...flags(next));
    }
    leftOut(box, out);
  };

  const nice = (v) => Number(v.toPrecision(3));
  const from = {
    memory: (p) => (p >= 100 ? null : nice(ranges.memory[0] + (p / 100) * (ranges.memory[1] - ranges.memory[0]))),
    drop: (p) => (p >= 100 ? null : nice(100 * (p / 100) ** 2)),
    speed: (p) => (p <= 0 ? null : nice((p / 100) * ranges.speed[1])),
  };
  const to = {
    memory: (v) => (v === null ? 100 : (100 * (v - ranges.memory[0])) / (ranges.memory[1] - ranges.memory[0] || 1)),
    drop: (v) => (v === null ? 100 : 100 * Math.sqrt(Math.max(0, v) / 100)),
    speed: (v) => (v === null ? 0 : (100 * v) / (ranges.speed[1] || 1)),
  };
  const UNITS = { memory: "MB", drop: "%", speed: "tokens/s" };
  const label = (key) => {
    const text = state[key] === null ? "any" : `${state[key]} ${UNITS[key]}`, slider = document.getElementById(key);
    slider.setAttribute("aria-valuetext", text);
    document.querySelector(`output[for=${key}]`).textContent = text;
  };
  const spread = (candidates) => {
    const memory = candidates.map((row) => row.memory).filter((v) => v !== null), speed = candidates.map((row) => value(row, decode)).filter((v) => v !== null);
    const wanted = { memory: memory.length ? [Math.min(...memory) * 0.95, Math.max(...memory)] : [0, 1], speed: [0, speed.length ? Math.max(...speed) : 1] };
    if (JSON.stringify(wanted) !== JSON.stringify(ranges)) { ranges = wanted; show(); }
  };
  const show = () => {
    for (const key of SLIDERS) {
      const slider = document.getElementById(key);
      if (document.activeElement !== slider) slider.value = to[key](state[key]);
      label(key);
    }
    document.getElementById("objective").value = state.objective;
  };
  const build = () => {
    for (const key of SLIDERS) document.getElementById(key).addEventListener("input", (event) => { state[key] = from[key](Number(event.target.value)); label(key); changed("budget"); });
    document.getElementById("objective").addEventListener("change", (event) => { state.objective = event.target.value; changed("budget"); });
  };
  window.slim.budget = { build, advise, show };
})();
