"use strict";
// Static tables become sortable; cells without a value stay last either way.
(() => {
  const order = new Intl.Collator("en", { numeric: true }).compare;
  const compare = (sign) => (a, b) => {
    const [x, y] = [a, b].map((v) => (v === null || v === undefined || v === "" ? null : v));
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (isNaN(x) || isNaN(y) ? order(x, y) : x - y);
  };
  DataTable.ext.type.order["nlast-asc"] = compare(1);
  DataTable.ext.type.order["nlast-desc"] = compare(-1);
  DataTable.ext.type.order["words-asc"] = (a, b) => order(a, b);
  DataTable.ext.type.order["words-desc"] = (a, b) => order(b, a);
  document.addEventListener("DOMContentLoaded", () => {
    for (const table of document.querySelectorAll("table[data-sortable]")) {
      const search = table.dataset.search;
      new DataTable(table, {
        paging: false, info: false, order: [], autoWidth: false, searching: Boolean(search), orderMulti: false,
        language: { search: search || "", searchPlaceholder: "" },
        layout: { topStart: search ? "search" : null, topEnd: null, bottomStart: null, bottomEnd: null },
        columnDefs: [{ targets: ["n", "rank"], type: "nlast" }, { targets: "text", type: "words" }, { targets: "remarks", orderable: false }],
      });
    }
  });
})();
