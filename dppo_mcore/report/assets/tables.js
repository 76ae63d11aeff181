// Plain tables. Numbers align right; a cell may be a node.
function table(columns, rows) {
  const numeric = columns.map((_, k) => rows.length > 0 && rows.every((row) => typeof row[k] === "number" || row[k] === null || /^[+−]?[\d.,]+%?$/.test(row[k])));
  const cell = (value) => (value instanceof Node ? value : typeof value === "number" ? compact(value) : value ?? "");
  return node("table", {},
    node("thead", {}, node("tr", {}, columns.map((name, k) => node("th", { scope: "col", cls: numeric[k] ? "n" : null }, name)))),
    node("tbody", {}, rows.map((row) => node("tr", {}, row.map((value, k) =>
      node("td", { cls: numeric[k] ? "n" : null }, cell(value)))))));
}

function scrollTable(columns, rows, label) {
  return node("div", { cls: "scroll", tabindex: "0", role: "region", "aria-label": label }, table(columns, rows));
}

const color = (k) => `var(--c${k % 9})`;
const GENERAL = "general";
const isGeneral = (name) => name.includes(GENERAL);

// A color per objective, the same in every figure.
const objectives = [...new Set([
  ...DATA.evaluations.filter((entry) => !isGeneral(entry.name)).flatMap((entry) => Object.keys(entry.objective)),
  ...DATA.success.flatMap((entry) => Object.keys(entry.objective)),
])].sort();
const colorOf = (objective) => (objectives.includes(objective) ? color(objectives.indexOf(objective) % 8) : "var(--c8)");

const KIND = { "base-sft": "var(--c8)", buffer: "var(--c4)", rl: "var(--c0)", weakness: "var(--c5)", sft: "var(--c1)" };
const KIND_NAMES = { "base-sft": "first SFT", buffer: "buffer", rl: "RL", weakness: "weaknesses and teacher", sft: "SFT" };
const kindColor = (kind) => KIND[kind] || "var(--c6)";
