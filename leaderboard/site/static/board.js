"use strict";
// The rows that `data/rows.js` brings, with names, and numbers as the other renderings of the board print them.
(() => {
  const { columns, sets, sequence, enough, texts, rows, margin } = window.BOARD;
  const text = (index) => (index === null ? "" : texts[index]);
  const WIDTH = 20;
  const MARKS = { reference: 1, simulated: 2, size: 4, speed: 8, foreign: 16 };
  const INVALID = { cell: 1, quality: 2, decode: 4, memory: 8 };

  const bucket = (bounds, names) => (value) => (value === null ? "unknown" : names[bounds.findIndex((bound) => value <= bound)] ?? names.at(-1));
  const BITS = ["up to 2.5", "2.5 to 3.5", "3.5 to 5", "5 to 7", "7 to 9", "above 9"];
  const SIZES = ["up to 200 M", "200 to 500 M", "0.5 to 1 B", "1 to 3 B", "3 to 10 B", "above 10 B"];
  const bitsOf = bucket([2.5, 3.5, 5, 7, 9], BITS);
  const sizeOf = bucket([2e8, 5e8, 1e9, 3e9, 1e10], SIZES);
  const position = Object.fromEntries(columns.map((column, index) => [column.key, index]));

  const value = (row, index) => { const cell = row.cells[index]; return Array.isArray(cell) ? cell[0] : cell; };
  const bounds = (row, index) => {
    const cell = row.cells[index];
    return Array.isArray(cell) && !columns[index].text ? [cell[1], cell[2]] : null;
  };

  /** Perplexity above the reference, in per cent: of the reference itself 0. */
  const loss = (row) => (row.marks & MARKS.reference && value(row, position.perplexity) !== null ? 0 : value(row, position.perplexity_delta_percent));

  const OFF_SCALE = 20;
  /** Perplexity above which rows of a set are off the scale: so many times the reference or, without one, the best of them. */
  const offScale = (found, set) => {
    const known = found.filter((row) => value(row, position.perplexity) !== null), reference = known.find((row) => row.id === sets[set]?.reference);
    return OFF_SCALE * (reference ? value(reference, position.perplexity) : Math.min(...known.map((row) => value(row, position.perplexity))));
  };

  const table = rows.map((raw, index) => {
    const row = {
      index, id: raw[0], set: raw[1], model: text(raw[2]), name: text(raw[3]), family: text(raw[4]), colour: text(raw[5]), engine: text(raw[6]),
      kernel: text(raw[7]), device: text(raw[8]), status: text(raw[9]), reason: text(raw[10]), flags: raw[11].map(text), rank: raw[12], marks: raw[13],
      source: text(raw[14]), parameters: raw[15], memory: raw[16], grid: text(raw[17]), rankLast: raw[18], invalid: raw[19],
      cells: raw.slice(WIDTH),
    };
    row.bits = bitsOf(value(row, position.effective_bits));
    row.size = sizeOf(row.parameters);
    row.verdict = value(row, position.perplexity_verdict) ?? "none";
    row.href = `cell/${row.id}.html`;
    return row;
  });

  const format = (column, number) => {
    if (column.text) return number;
    const size = Math.abs(number);
    const digits = size >= 1000 ? 0 : Math.max(0, column.digits - (size >= 100 ? 1 : 0));
    const shown = size >= 1e6 ? number.toExponential(1).replace("e+", "e") : number.toFixed(digits);
    if (Number(shown) === 0) return shown.replace("-", "");
    return ((column.signed && number > 0 ? "+" : "") + shown).replaceAll("-", "−");
  };
  const interval = (column, cell) => {
    if (!Array.isArray(cell)) return "";
    if (column.text) return cell[1];
    const [low, high] = [format(column, cell[1]), format(column, cell[2])];
    return `${low}${/[+−]/.test(low[0] + high[0]) ? " to " : "–"}${high}`;
  };
  const element = (tag, props = {}, ...children) => {
    const { dataset, ...rest } = props;
    const made = Object.assign(document.createElement(tag), rest);
    Object.assign(made.dataset, dataset);
    made.append(...children);
    return made;
  };
  window.slim = { columns, sets, sequence, enough, margin, rows: table, position, value, bounds, loss, offScale, format, interval, element, MARKS, INVALID, BITS, SIZES };
})();
