// Names for what the theme leaves without, and a way to scroll wide tables by keyboard. The theme adds copy buttons and
// wrappers of tables after the page has loaded.
function mend() {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`));
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((table) => {
    table.tabIndex = table.scrollWidth > table.clientWidth ? 0 : -1;
  });
}
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", mend);
mend();
