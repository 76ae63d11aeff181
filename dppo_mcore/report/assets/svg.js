// Elements, scales, tooltips: what all figures are made of.
const NS = "http://www.w3.org/2000/svg";

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, run] of Object.entries(value)) made.addEventListener(event, run);
    else if (name === "style") made.style.cssText = value;
    else made.setAttribute(name === "cls" ? "class" : name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name === "style") made.style.cssText = value;
    else made.setAttribute(name === "cls" ? "class" : name, value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

// Controls that would reorder or hide what stands around them are shown by their number instead.
const plain = (text) => text.replaceAll(/[\u0000-\u0008\u000b-\u001f\u007f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (sign) => `\u27e8U+${sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`);

const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;
const whole = (number) => Math.round(number).toLocaleString("en");

// What JSON has no number for comes as its name, "NaN" or "Infinity".
const fixed = (number, digits) => (typeof number === "number" ? number.toFixed(digits) : `${number}`);

function compact(number) {
  if (typeof number !== "number") return `${number}`;
  const size = Math.abs(number);
  if (size >= 1e9) return `${+(number / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(number / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(number / 1e3).toPrecision(3)}k`;
  if (size >= 1 || size === 0) return `${+number.toPrecision(4)}`;
  return size < 1e-3 ? number.toExponential(1) : `${+number.toPrecision(3)}`;
}

function duration(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const rounded = Math.round(seconds), minutes = Math.round(seconds / 60);
  if (rounded < 120) return `${rounded} s`;
  if (rounded < 7200) return `${Math.floor(rounded / 60)} min ${rounded % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function scale([from, to], [start, end]) {
  const span = to - from || 1;
  return (value) => start + ((value - from) / span) * (end - start);
}

function ticks(from, to, count = 5) {
  const raw = (to - from) / Math.max(1, count);
  if (!(raw > 0)) return [from];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw - 1e-12);
  const found = [];
  for (let k = Math.ceil(from / step - 1e-9); k * step <= to + step * 1e-9; k += 1) found.push(+(k * step).toPrecision(12));
  return found;
}

// Round times from 0: whole seconds, minutes, hours.
function timeTicks(to, count) {
  const step = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800].find((size) => to / size <= count) || to / count;
  return Array.from({ length: Math.floor(to / step) + 1 }, (_, k) => k * step);
}

const wholeTicks = (from, to, count) => ticks(from, to, count).filter(Number.isInteger);

const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
}

const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

function withTip(element, text) {
  element.addEventListener("pointermove", (event) => showTip(text, event.clientX, event.clientY));
  element.addEventListener("pointerleave", hideTip);
  return element;
}

// A figure: title, legend, drawing, and its numbers as a table for whoever can't or won't look.
function figure({ title, note, legend, drawing, label, columns, rows }) {
  const made = node("figure", { cls: "card" }, node("h3", {}, title), note ? node("p", { cls: "note" }, note) : null);
  if (legend && legend.length > 1) {
    made.append(node("ul", { cls: "legend" }, legend.map(({ name, color }) => node("li", { style: `--swatch:${color}` }, name))));
  }
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", label || title);
  const wide = drawing.viewBox.baseVal.width > 700;
  made.append(wide ? node("div", { cls: "pan", tabindex: innerWidth < 700 ? "0" : null, role: "group", "aria-label": title }, drawing) : drawing);
  if (rows && rows.length) {
    const data = node("details", { cls: "data" }, node("summary", {}, "Numbers"));
    data.addEventListener("toggle", () => {
      if (data.open && data.children.length === 1) data.append(scrollTable(columns, rows, `${title}: numbers`));
    });
    made.append(data);
  }
  return made;
}

function canvas(width, height) {
  return shape("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "xMidYMid meet" });
}
