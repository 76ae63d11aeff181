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

if (DATA.live) {
  const live = document.getElementById("live");
  live.hidden = false;
  live.textContent = "live";
  let known = null;
  setInterval(async () => {
    try {
      const version = await (await fetch("/version")).text();
      if (known !== null && version !== known && !document.querySelector("input:focus, select:focus")) {
        stored("report-scroll", scrollY, "sessionStorage");
        location.reload();
      }
      known = version;
      live.textContent = "live";
    } catch { live.textContent = "the server has gone"; }
  }, 3000);
}
