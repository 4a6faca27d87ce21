// Names for what the theme leaves without, and a way to scroll wide tables by keyboard. The theme adds copy buttons and
// wrappers of tables after the page has loaded.
function name() {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`));
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((table) => (table.tabIndex = 0));
}
new MutationObserver(name).observe(document.querySelector("article"), { childList: true, subtree: true });
name();
