"use strict";
// Light or dark: what the reader chose, else what the system prefers. Runs before the first paint. Then the copy buttons.
(() => {
  const root = document.documentElement;
  const store = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } }, set: (v) => { try { localStorage.setItem("theme", v); } catch { /* private */ } } };
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const chosen = store.get();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  root.classList.add("js");

  window.copyText = async (text, button) => {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      window.prompt("Copy this", text);
    }
    setTimeout(() => { button.textContent = before; }, 1500);
  };

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to the ${dark() ? "light" : "dark"} theme`); };
    button.hidden = false;
    button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; store.set(root.dataset.theme); show(); });
    system.addEventListener("change", show);
    show();
    for (const copy of document.querySelectorAll("button.copy")) {
      copy.hidden = false;
      copy.addEventListener("click", () => window.copyText(copy.parentElement.querySelector("code").textContent, copy));
    }
  });
})();
