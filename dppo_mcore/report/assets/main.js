// Theme, sections, and following a run that is going on.
document.getElementById("run-name").textContent = DATA.facts.name;

function theme(name) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme").setAttribute("aria-pressed", name === "dark");
}

theme(stored("report-theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  theme(next);
  stored("report-theme", next);
});

for (const draw of [summary, timeline, progress, practice, curves, time, corpus, details]) draw();
addEventListener("DOMContentLoaded", () => browse().catch((error) => body("samples").append(lead(`The samples can't be shown: ${error.message}`))).then(() => {
  if (DATA.live) scrollTo({ top: +stored("report-scroll", undefined, "sessionStorage") || 0, behavior: "instant" });
  document.documentElement.dataset.ready = "yes";
}));

// The page is of one state of the run. Once there is a newer one it is loaded anew, but not from under someone's hands.
function follow() {
  const live = document.getElementById("live"), newer = document.getElementById("newer");
  const say = (text) => { if (live.textContent !== text) live.textContent = text; };
  const used = () => document.activeElement?.closest("input, select, details, #samples") || document.querySelector("details[open]");
  const ask = async (path) => {
    const answer = await fetch(path);
    if (!answer.ok) throw new Error(answer.statusText);
    return answer.text();
  };
  let leaving = false;
  const leave = () => { leaving = true; location.reload(); };
  const look = async () => {
    try {
      const changed = await ask("/version") !== DATA.version;
      newer.hidden = !changed;
      say(changed ? "newer data" : "live");
      if (changed && !used()) {
        await ask("/made"); // takes its time, in which someone may have begun to use this page
        if (!used() && !leaving) leave();
      }
    } catch { say("the server has gone"); }
    if (!leaving) setTimeout(look, 3000);
  };
  addEventListener("pagehide", () => stored("report-scroll", scrollY, "sessionStorage"));
  newer.addEventListener("click", leave);
  live.hidden = false;
  say("live");
  setTimeout(look, 3000);
}
if (DATA.live) follow();
