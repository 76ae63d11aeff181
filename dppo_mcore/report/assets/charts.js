// Line, stacked area, grouped and stacked bars, radar and timeline charts as inline SVG.
const NARROW = innerWidth < 640; // smaller drawings keep their letters readable on a phone
const WIDE = NARROW ? 350 : 540;
const MARGIN = { left: 48, right: 14, top: 18, bottom: 30 };

function frame(svg, width, height, x, y, { xTicks, yTicks, xLabel, format = compact, xFormat = compact }) {
  for (const value of yTicks) {
    svg.append(shape("line", { cls: "gridline", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: MARGIN.left - 7, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  for (const value of xTicks) svg.append(shape("text", { x: x(value), y: height - 11, "text-anchor": "middle" }, xFormat(value)));
  svg.append(shape("line", { cls: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: height - MARGIN.bottom, y2: height - MARGIN.bottom }));
  if (xLabel) svg.append(shape("text", { x: MARGIN.left - 14, y: height - 11, "text-anchor": "end" }, xLabel));
}

function extent(values, floor, ceiling) {
  let low = floor ?? Infinity, high = ceiling ?? -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  if (!(low < high)) { const pad = Math.abs(low) * .1 || 1; return [floor ?? (low >= 0 ? 0 : low - pad), high + pad]; }
  const pad = ceiling === undefined || high > ceiling ? (high - low) * .06 : 0;
  return [floor !== undefined && low >= floor ? low : low - (high - low) * .06, high + pad];
}

// A line that breaks where one phase ends and another begins: nothing was measured between them.
function linePath(points, x, y, bands) {
  const phase = (at) => bands.findIndex((band) => at >= band.from && at <= band.to);
  return points.map(([a, b], k) => `${k && phase(a) === phase(points[k - 1][0]) ? "L" : "M"}${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("");
}

// series: [{name, color, points: [[x, y]], faint}]; bands: [{from, to, color, name}]; moments: [{at, value, name}];
// dots: each point was measured by itself, and lines between them go through phases
function lineChart({ title, note, series, floor, ceiling, threshold, bands = [], moments = [], dots = false, format = compact, xLabel = "step", xName = xLabel, size = [WIDE, 230] }) {
  const [width, height] = size;
  const svg = canvas(width, height);
  const shown = series.filter((one) => one.points.length);
  const xs = shown.flatMap((one) => one.points.map((point) => point[0]));
  const ys = shown.flatMap((one) => one.points.map((point) => point[1])).concat(threshold ? [threshold.at] : []);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const [y0, y1] = extent(ys, floor, ceiling);
  const x = scale([x0, x1], [MARGIN.left + 6, width - MARGIN.right - 6]);
  const y = scale([y0, y1], [height - MARGIN.bottom, MARGIN.top]);
  for (const band of bands) {
    const from = Math.max(band.from, x0), to = Math.min(band.to, x1);
    if (to <= from) continue;
    svg.append(shape("rect", { x: x(from), y: MARGIN.top, width: x(to) - x(from), height: height - MARGIN.bottom - MARGIN.top, style: `fill:${band.color};opacity:.075` }));
    if (x(to) - x(from) > 6 * band.name.length) svg.append(shape("text", { x: (x(from) + x(to)) / 2, y: MARGIN.top - 6, "text-anchor": "middle", style: "font-size:10px" }, band.name));
  }
  frame(svg, width, height, x, y, { xTicks: wholeTicks(x0, x1, width / 90), yTicks: ticks(y0, y1, 4), xLabel, format });
  if (threshold) {
    svg.append(shape("line", { cls: "threshold", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(threshold.at), y2: y(threshold.at) }));
    svg.append(shape("text", { x: MARGIN.left + 8, y: y(threshold.at) - 6, style: "fill:var(--bad)" }, threshold.name));
  }
  for (const one of shown) {
    if (one.points.length === 1 && !dots) svg.append(shape("circle", { cls: "mark", cx: x(one.points[0][0]), cy: y(one.points[0][1]), r: 4, style: `fill:${one.color}` }));
    else svg.append(shape("path", { cls: "line", d: linePath(one.points, x, y, dots ? [] : bands), style: `stroke:${one.color};${one.faint ? "opacity:.55;stroke-width:1.4" : ""}` }));
  }
  if (dots) for (const one of shown) for (const [a, b] of one.points) svg.append(shape("circle", { cls: "mark", cx: x(a), cy: y(b), r: one.faint ? 2.5 : 4, style: `fill:${one.color}` }));
  for (const moment of moments) {
    const at = x(Math.min(x1, Math.max(x0, moment.at)));
    const left = at > MARGIN.left + 8 * moment.name.length;
    svg.append(shape("line", { cls: "moment", x1: at, x2: at, y1: MARGIN.top, y2: height - MARGIN.bottom }),
      shape("circle", { cls: "mark", cx: at, cy: y(moment.value), r: 5.5, style: "fill:var(--bad)" }),
      shape("text", { cls: "strong halo", x: at + (left ? -8 : 8), y: height - MARGIN.bottom - 10, "text-anchor": left ? "end" : "start" }, moment.name));
  }
  hover(svg, shown, x, y, width, height, format, xName);
  const at = new Map();
  shown.forEach((one, k) => one.points.forEach(([a, b]) => { if (!at.has(a)) at.set(a, Array(shown.length).fill(null)); at.get(a)[k] = b; }));
  const last = shown.map((one) => `${one.name} ${format(one.points[one.points.length - 1][1])}`).join(", ");
  return figure({ title, note, legend: shown, drawing: svg, label: `${title}. Last values: ${last}`, columns: [xName, ...shown.map((one) => one.name)],
    rows: [...at].sort((a, b) => a[0] - b[0]).map(([a, values]) => [a, ...values]) });
}

function nearest(points, at) {
  let low = 0, high = points.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (points[middle][0] < at) low = middle + 1; else high = middle; }
  return low > 0 && at - points[low - 1][0] < points[low][0] - at ? points[low - 1] : points[low];
}

function hover(svg, series, x, y, width, height, format, xName) {
  const cursor = shape("line", { cls: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom, x1: 0, x2: 0 });
  const area = shape("rect", { x: MARGIN.left, y: 0, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.bottom, fill: "transparent" });
  svg.append(cursor, area);
  area.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * width;
    const first = series[0].points;
    const at = x(first[0][0]) === x(first[first.length - 1][0]) ? first[0][0]
      : first[0][0] + ((place - x(first[0][0])) / (x(first[first.length - 1][0]) - x(first[0][0]))) * (first[first.length - 1][0] - first[0][0]);
    const step = nearest(first, at)[0];
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step));
    cursor.style.visibility = "visible";
    showTip(`${xName} ${compact(step)}\n${series.map((one) => `${one.name}  ${format(nearest(one.points, step)[1])}`).join("\n")}`, event.clientX, event.clientY);
  });
  area.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; hideTip(); });
}

// columns: [[x, [counts per class]]], drawn as shares of each column.
function shareArea({ title, note, columns, classes, colors, size = [WIDE, 230] }) {
  const [width, height] = size;
  const svg = canvas(width, height);
  const y = scale([0, 1], [height - MARGIN.bottom, MARGIN.top]);
  const wide = (width - MARGIN.left - MARGIN.right) / columns.length;
  const x = (k) => MARGIN.left + k * wide;
  columns.forEach(([step, counts], k) => {
    const total = counts.reduce((a, b) => a + b, 0) || 1;
    let below = 0;
    const bar = shape("g");
    counts.forEach((count, place) => {
      if (!count) return;
      const share = count / total;
      bar.append(shape("rect", { x: x(k), width: wide + .35, y: y(below + share), height: y(below) - y(below + share), style: `fill:${colors[place]}` }));
      below += share;
    });
    svg.append(withTip(bar, `step ${step} of the phase, ${whole(total)} groups\n${classes.map((name, place) => `${name}  ${percent(counts[place] / total)}`).reverse().join("\n")}`));
  });
  const every = Math.max(1, Math.ceil(columns.length / 6));
  svg.append(shape("text", { x: MARGIN.left - 14, y: height - 11, "text-anchor": "end" }, "step"));
  for (const value of [0, .25, .5, .75, 1]) svg.append(shape("text", { x: MARGIN.left - 7, y: y(value) + 4, "text-anchor": "end" }, percent(value)));
  columns.forEach(([step], k) => { if (k % every === 0) svg.append(shape("text", { x: x(k) + wide / 2, y: height - 11, "text-anchor": "middle" }, compact(step))); });
  const last = columns[columns.length - 1][1], sum = last.reduce((a, b) => a + b, 0) || 1;
  return figure({ title, note, drawing: svg, legend: classes.map((name, k) => ({ name, color: colors[k] })),
    label: `${title}. At the end: ${classes.map((name, k) => `${name} ${percent(last[k] / sum)}`).join(", ")}`,
    columns: ["step of the phase", ...classes], rows: columns.map(([step, counts]) => [step, ...counts]) });
}

// A long name in two lines of about the same length.
function twoLines(name, most) {
  if (name.length <= most || !name.includes(" ")) return [name];
  const gaps = [...name].flatMap((sign, k) => (sign === " " ? [k] : []));
  const middle = gaps.reduce((a, b) => (Math.abs(b - name.length / 2) < Math.abs(a - name.length / 2) ? b : a));
  return [name.slice(0, middle), name.slice(middle + 1)];
}

// groups: [{name, bars: [{name, color, value, low, high, n}]}]; values in [0, 1].
function groupedBars({ title, note, groups, size = [1120, 280] }) {
  const [width, height] = size;
  const svg = canvas(width, height);
  const y = scale([0, 1], [height - MARGIN.bottom, MARGIN.top]);
  frame(svg, width, height, null, y, { xTicks: [], yTicks: [0, .25, .5, .75, 1], format: percent });
  const room = (width - MARGIN.left - MARGIN.right) / groups.length;
  groups.forEach((group, g) => {
    const wide = Math.max(1, Math.min(34, (room - 20) / Math.max(1, group.bars.length))), drawn = Math.max(1, wide - 3);
    const left = MARGIN.left + g * room + (room - wide * group.bars.length) / 2;
    group.bars.forEach((bar, k) => {
      const at = left + k * wide;
      const made = shape("g", {},
        shape("rect", { x: at + (wide - drawn) / 2, width: drawn, y: y(bar.value), height: Math.max(0, y(0) - y(bar.value)), rx: 2.5, style: `fill:${bar.color};opacity:${bar.opacity ?? 1}` }),
        shape("rect", { x: at, width: wide, y: MARGIN.top, height: y(0) - MARGIN.top, fill: "transparent" }));
      if (bar.low !== undefined) made.append(shape("path", { cls: "whisker", d: `M${at + wide / 2},${y(bar.low)}V${y(bar.high)}M${at + wide / 2 - 3},${y(bar.high)}h6M${at + wide / 2 - 3},${y(bar.low)}h6` }));
      svg.append(withTip(made, `${group.name} · ${bar.name}\n${percent(bar.value, 1)}${bar.low === undefined ? "" : `  (95%: ${percent(bar.low, 1)} to ${percent(bar.high, 1)}, n = ${bar.n})`}`));
    });
    const lines = twoLines(group.name, room / 6.4);
    lines.forEach((text, row) => svg.append(shape("text", { x: MARGIN.left + (g + .5) * room, y: height - 12 + 13 * row, "text-anchor": "middle" }, text)));
  });
  const rows = groups.flatMap((group) => group.bars.map((bar) => [group.name, bar.name, percent(bar.value, 1), bar.low === undefined ? "" : `${percent(bar.low, 1)} to ${percent(bar.high, 1)}`, bar.n ?? null]));
  const legend = [...new Map(groups.flatMap((group) => group.bars).map((bar) => [bar.name, bar])).values()];
  return figure({ title, note, legend: legend.some((bar) => bar.opacity) ? [] : legend, drawing: svg, label: `${title}. ${rows.map((row) => `${row[0]}, ${row[1]}: ${row[2]}`).join("; ")}`,
    columns: ["", "phase", "success", "95% interval", "samples"], rows });
}

// rows: [{name, parts: [{name, color, value}]}], horizontal and stacked.
function stackedBars({ title, note, rows, format = compact, size = WIDE }) {
  const line = 30, left = 92;
  const height = rows.length * line + 10;
  const svg = canvas(size, height);
  const most = Math.max(...rows.map((row) => row.parts.reduce((sum, part) => sum + part.value, 0)), 1e-12);
  const x = scale([0, most], [0, size - left - 70]);
  rows.forEach((row, k) => {
    const top = k * line + 6;
    svg.append(shape("text", { x: left - 10, y: top + 14, "text-anchor": "end" }, row.name));
    let at = left;
    for (const part of row.parts) {
      const wide = x(part.value);
      svg.append(withTip(shape("rect", { x: at, y: top, width: Math.max(0, wide - .6), height: 20, style: `fill:${part.color}` }), `${row.name} · ${part.name}\n${format(part.value)}`));
      at += wide;
    }
    svg.append(shape("text", { x: at + 7, y: top + 14 }, format(row.parts.reduce((sum, part) => sum + part.value, 0))));
  });
  const legend = [...new Map(rows.flatMap((row) => row.parts).map((part) => [part.name, part])).values()];
  const flat = rows.flatMap((row) => row.parts.map((part) => [row.name, part.name, part.value]));
  return figure({ title, note, legend, drawing: svg, label: `${title}. ${flat.map((one) => `${one[0]}, ${one[1]}: ${format(one[2])}`).join("; ")}`, columns: ["", "part", "value"], rows: flat });
}

// axes: names; series: [{name, color, values in [0, 1]}]
function radar({ title, note, axes, series }) {
  const [width, height, radius] = NARROW ? [WIDE, 280, 70] : [WIDE, 400, 138], cx = width / 2, cy = height / 2 + 2;
  const svg = canvas(width, height);
  const angle = (k) => (Math.PI * 2 * k) / axes.length - Math.PI / 2;
  const place = (k, share) => [cx + Math.cos(angle(k)) * radius * share, cy + Math.sin(angle(k)) * radius * share];
  for (const ring of [.25, .5, .75, 1]) {
    svg.append(shape("polygon", { cls: "gridline", fill: "none", points: axes.map((_, k) => place(k, ring).join(",")).join(" ") }));
    svg.append(shape("text", { x: cx + 4, y: cy - radius * ring + 11, style: "font-size:10px" }, percent(ring)));
  }
  axes.forEach((name, k) => {
    const [x, y] = place(k, 1), side = Math.cos(angle(k));
    svg.append(shape("line", { cls: "gridline", x1: cx, y1: cy, x2: x, y2: y }));
    const anchor = Math.abs(side) < .15 ? "middle" : side > 0 ? "start" : "end";
    const lines = twoLines(name, 16);
    lines.forEach((text, row) => svg.append(shape("text", { x: x + side * 12, y: y + Math.sin(angle(k)) * 14 + 4 + (row - (lines.length - 1) / 2) * 13, "text-anchor": anchor }, text)));
  });
  for (const one of series) {
    const points = one.values.map((value, k) => place(k, value));
    svg.append(shape("polygon", { points: points.map((point) => point.join(",")).join(" "), style: `fill:${one.color};fill-opacity:.12;stroke:${one.color};stroke-width:2;stroke-linejoin:round` }));
    points.forEach(([x, y], k) => svg.append(withTip(shape("circle", { cls: "mark", cx: x, cy: y, r: 4.5, style: `fill:${one.color}` }), `${axes[k]}\n${one.name}  ${percent(one.values[k], 1)}`)));
  }
  return figure({ title, note, legend: series, drawing: svg, label: `${title}. ${series.map((one) => `${one.name}: ${axes.map((name, k) => `${name} ${percent(one.values[k])}`).join(", ")}`).join("; ")}`,
    columns: ["dimension", ...series.map((one) => one.name)], rows: axes.map((name, k) => [name, ...series.map((one) => percent(one.values[k], 1))]) });
}
