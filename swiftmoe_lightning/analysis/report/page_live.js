// A page of a run that goes on: asks for itself every two seconds, and takes over what is new. The document stays, and
// with it the scroll, the choices, the focus and the charts' cursors.

const PAUSE_MS = 2000;
const STATUS = ["state", "since"];
const PARTS = [...STATUS, "subtitle", "summary", "policy-table", "notes", "loss-table", "data"];
let tag = "";

// What the controls offer: with others, the page has to be made anew.
function offered(page) {
  const script = page.getElementById("data");
  if (!script) return "";
  const { layers, experts, policies, dropless } = JSON.parse(script.textContent);
  return JSON.stringify([layers, experts, policies.map((policy) => policy.name), dropless]);
}

function takeOver(next) {
  // A page without data says why; the charts that are there stay.
  const hasData = next.getElementById("data") !== null;
  if (hasData && offered(next) !== offered(document)) return location.reload();
  for (const id of hasData ? PARTS : STATUS) {
    const [old, part] = [document, next].map((page) => page.getElementById(id));
    // What did not change is left alone, so that no screen reader says it again.
    if (old.innerHTML !== part.innerHTML) old.replaceChildren(...part.childNodes);
  }
  if (!hasData) return;
  read();
  drawKeys();
  drawAll();
}

async function poll() {
  if (!document.hidden) {
    try {
      const answer = await fetch(location.pathname, { cache: "no-store", headers: { "If-None-Match": tag } });
      if (answer.status === 200) {
        takeOver(new DOMParser().parseFromString(await answer.text(), "text/html"));
        tag = answer.headers.get("ETag");
      }
    } catch {
      tag = "";
      document.getElementById("state").textContent = "No answer: `swiftmoe watch` has ended.";
    }
  }
  setTimeout(poll, PAUSE_MS);
}

setTimeout(poll, PAUSE_MS);
