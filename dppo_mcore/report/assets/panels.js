// The overview: one function per section.
const body = (name) => document.querySelector(`#${name} .body`);
const lead = (text) => node("p", { cls: "lead" }, text);
const held = DATA.evaluations.filter((entry) => !isGeneral(entry.name));
const general = DATA.evaluations.filter((entry) => isGeneral(entry.name));
// The first evaluation and each phase's last, with a short name and when it was.
function stages(list) {
  const last = new Map(list.map((entry) => [entry.phase, entry]));
  const over = new Set(DATA.phases.filter(({ state }) => state === "done").map(({ name }) => name));
  return list.filter((entry, k) => k === 0 || last.get(entry.phase) === entry).map((entry, k) => {
    const { phase, step } = entry;
    if (k === 0 && step === 0) return { ...entry, phase: "start", when: "at the start" };
    if (over.has(phase) && last.get(phase) === entry) return { ...entry, when: `after ${phase}` };
    return { ...entry, phase: `${phase}, step ${step}`, when: `during ${phase}, step ${step}` };
  });
}
const change = (from, to) => `${to >= from ? "+" : "−"}${(100 * Math.abs(to - from)).toFixed(1)} points`;

function summary() {
  const { facts } = DATA;
  const [first, last] = [held[0], held[held.length - 1]];
  const title = !first ? "No evaluation yet" : held.length === 1 ? `Held-out success stands at ${percent(first.all.p, 1)}`
    : `Held-out success went from ${percent(first.all.p, 1)} to ${percent(last.all.p, 1)}`;
  document.getElementById("h-summary").textContent = title;
  const figures = [];
  const add = (name, value, small, cls) => figures.push(node("div", {}, node("dt", {}, name), node("dd", { cls }, value, small ? node("small", {}, small) : null)));
  if (last) {
    const sure = last.all.low > first.all.high || last.all.high < first.all.low;
    add("Held-out success", percent(last.all.p, 1), `95%: ${percent(last.all.low, 1)} to ${percent(last.all.high, 1)}`);
    add("Change", change(first.all.p, last.all.p).replace(" points", ""), held.length < 2 ? "points; one evaluation so far" : `points; the intervals ${sure ? "are apart" : "overlap"}`, last.all.p >= first.all.p ? "up" : "down");
  }
  if (general.length) add("General set", percent(general[general.length - 1].all.p, 1), `${change(general[0].all.p, general[general.length - 1].all.p)} since the start`);
  add("Rollouts", compact(facts.rollouts), `${compact(facts.tokens)} tokens`);
  const done = DATA.phases.filter((phase) => phase.state === "done").length;
  add("Phases done", `${done} of ${DATA.phases.length}`, DATA.phases.find((phase) => phase.state === "running")?.name);
  if (facts.ended > facts.started) add("Wall time", duration(facts.ended - facts.started), "interruptions included");
  if (facts.note) body("summary").append(lead(facts.note));
  body("summary").append(node("dl", { cls: "figures" }, figures));
}

// Where a phase stands among the run's steps; its own count from 0. Phases that only roll out have none.
function stepsOf({ kind, start_step: start, end_step: own }) {
  if (start === null || own === 0 || ["buffer", "weakness"].includes(kind)) return "";
  return `${start} to ${own === null ? "…" : start + own}`;
}

function timeline() {
  const shown = DATA.phases.filter((phase) => phase.started_at);
  if (!shown.length) { body("timeline").append(lead("No phase has started.")); return; }
  const from = Math.min(...shown.map((phase) => phase.started_at));
  const to = Math.max(...shown.map((phase) => phase.until));
  const [width, line] = [1160, 30];
  const svg = canvas(width, shown.length * line + 34);
  const x = scale([0, to - from], [150, width - 20]);
  for (const value of timeTicks(to - from, 8)) {
    svg.append(shape("line", { cls: "gridline", x1: x(value), x2: x(value), y1: 0, y2: shown.length * line + 6 }));
    svg.append(shape("text", { x: x(value), y: shown.length * line + 22, "text-anchor": "middle" }, duration(value).replace(/ 0 (s|min)$/, "")));
  }
  shown.forEach((phase, k) => {
    const start = x(phase.started_at - from), end = x(phase.until - from);
    svg.append(shape("text", { cls: "strong", x: 138, y: k * line + 19, "text-anchor": "end" }, phase.name));
    svg.append(withTip(shape("rect", { x: start, y: k * line + 5, width: Math.max(3, end - start), height: 20, rx: 4, style: `fill:${kindColor(phase.kind)}` }),
      `${phase.name} (${phase.state})\n${duration(phase.until - phase.started_at)}${phase.horizon ? `, clips up to ${phase.horizon} s` : ""}\n${phase.reason || ""}`));
    const room = end < width - 90;
    svg.append(shape("text", { cls: room ? null : "on", x: room ? end + 8 : Math.max(end, start + 3) - 8, y: k * line + 19, "text-anchor": room ? "start" : "end" }, room || end - start > 60 ? duration(phase.until - phase.started_at) : ""));
  });
  const rows = DATA.phases.map((phase) => [phase.name, phase.kind, phase.state, phase.horizon ? `${phase.horizon} s` : "",
    stepsOf(phase), phase.rollouts || null,
    phase.started_at ? duration(phase.until - phase.started_at) : "", phase.reason]);
  body("timeline").append(lead("Reinforcement learning finds what the model can't do, supervised refinement repairs it, clips get longer, and round again."),
    figure({ title: "Wall time", note: "Interruptions included. A phase that isn't done counts up to the last thing that it wrote.", drawing: svg, legend: [...new Set(shown.map((phase) => phase.kind))].map((kind) => ({ name: KIND_NAMES[kind] || kind, color: kindColor(kind) })),
      label: `Phases: ${shown.map((phase) => `${phase.name} ${duration(phase.until - phase.started_at)}`).join(", ")}`,
      columns: ["phase", "kind", "state", "clips", "steps", "rollouts", "time", "why it ended"], rows }));
}

function progress() {
  const into = body("progress");
  if (!held.length) { into.append(lead("No evaluation was recorded yet.")); return; }
  into.append(lead("Greedy answers on held-out questions after each phase, with 95% Wilson intervals. A phase that isn't done shows its newest evaluation; all within phases are among the training curves."));
  const points = stages(held);
  const order = points.map((entry) => entry.when).join(", ");
  const shades = (k) => .35 + .65 * (points.length < 2 ? 1 : k / (points.length - 1));
  const names = Object.keys(points[points.length - 1].objective).sort();
  const bars = (name, pick, fill) => points.filter((entry) => pick(entry)).map((entry, k) => {
    const share = pick(entry);
    return { name: entry.phase, color: fill, opacity: shades(k), value: share.p, low: share.low, high: share.high, n: share.n };
  });
  into.append(groupedBars({ title: "By objective, phase after phase", note: `Within a group from left to right: ${order}.`,
    groups: [{ name: "all", bars: bars("all", (entry) => entry.all, "var(--c8)") },
      ...names.map((name) => ({ name, bars: bars(name, (entry) => entry.objective[name], colorOf(name)) }))] }));
  const grid = node("div", { cls: "grid two" });
  const axes = Object.keys(points[points.length - 1].dimension).sort();
  const [first, last] = [points[0], points[points.length - 1]];
  if (axes.length > 2) {
    const of = (entry) => axes.map((name) => entry.dimension[name]?.p ?? 0);
    const series = [{ name: first.phase, color: "var(--c8)", values: of(first) }];
    if (last !== first) series.push({ name: last.phase, color: "var(--c0)", values: of(last) });
    grid.append(radar({ title: "By capability dimension", note: "First and last evaluation.", axes, series }));
  }
  grid.append(forgetting());
  into.append(grid);
  if (axes.length) into.append(groupedBars({ title: "By capability dimension, phase after phase", note: `Within a group from left to right: ${order}.`,
    groups: axes.map((name, k) => ({ name, bars: bars(name, (entry) => entry.dimension[name], color(k)) })), size: [1120, 296] }));
}

function forgetting() {
  const points = stages(general);
  if (!points.length) return node("div", { cls: "card" }, node("h3", {}, "Forgetting"), node("p", { cls: "note" }, "No general set was evaluated (eval_general_data)."));
  const bars = points.map((entry, k) => ({ name: entry.phase, color: "var(--c8)", opacity: .4 + .6 * (k + 1) / points.length, value: entry.all.p, low: entry.all.low, high: entry.all.high, n: entry.all.n }));
  const drop = points[points.length - 1].all.p - points[0].all.p;
  return groupedBars({ title: "Forgetting: the general set", note: `${change(0, drop)} from the first to the last evaluation; questions that have nothing to do with the training pool.`,
    groups: bars.map((bar) => ({ name: bar.name, bars: [bar] })), size: [WIDE, 300] });
}

// What ends a phase of reinforcement learning, by stagnation_aggregate: in the figure and in words.
const { threshold, aggregate } = DATA.facts.stagnation;
const ENDS = {
  mean: [`ends at ${threshold}`, `Reinforcement learning ends when the mean of the objectives' stagnation scores reaches ${threshold}.`],
  all: [`ends when every objective is at ${threshold}`, `Reinforcement learning ends when the stagnation score of every objective is at least ${threshold} in the same step.`],
  freeze: [`an objective rests from ${threshold} on`, `An objective whose stagnation score reaches ${threshold} is drawn no more; reinforcement learning ends when all of them have reached it.`],
}[aggregate];

function practice() {
  const into = body("practice");
  const colors = DATA.rateClasses.map((_, k) => `var(--r${k})`);
  into.append(lead("Each prompt's group of answers has a success rate. What stays at “never” is what the model can't do yet; what is “always” has nothing left to teach. " + ENDS[1]));
  const grid = node("div", { cls: "grid two" });
  const trained = DATA.success.filter((entry) => DATA.phases.find((phase) => phase.name === entry.phase)?.kind === "rl");
  for (const entry of trained) {
    if (entry.steps.length > 1) grid.append(shareArea({ title: `${entry.phase}: success rates of groups`, note: `${whole(entry.groups)} groups, share per step of the phase`, columns: entry.steps, classes: DATA.rateClasses, colors }));
  }
  for (const entry of trained) {
    const series = Object.keys(entry.objective).sort().map((name) => ({ name, color: colorOf(name), points: entry.objective[name] }));
    if (series.some((one) => one.points.length > 1)) grid.append(lineChart({ title: `${entry.phase}: mean success while training`, note: "share of the step's answers that are right, by objective", series, floor: 0, ceiling: 1, format: percent, xName: "step of the phase" }));
  }
  into.append(grid, ...stagnation());
}

function stagnation() {
  const { series } = DATA.curves;
  const found = Object.keys(series).filter((name) => name.startsWith("rl/stagnation/"));
  const decided = DATA.decisions.filter((one) => one.numbers.tasks && one.numbers.score !== undefined);
  const parts = [];
  if (series["rl/stagnation"]) {
    const lines = [{ name: "S over all", color: "var(--ink)", points: series["rl/stagnation"] },
      ...found.map((name) => ({ name: name.slice(14), color: colorOf(name.slice(14)), points: series[name], faint: true }))];
    parts.push(lineChart({ title: "Stagnation score", note: "S = 0.3 × extremity + 0.7 × flatness, per objective; “S over all” is their mean.", series: lines, floor: 0, ceiling: 1, threshold: { at: threshold, name: ENDS[0] },
      bands: bands(), moments: decided.filter((one) => typeof one.numbers.score === "number").map((one) => ({ at: (DATA.curves.spans[one.phase]?.[0] ?? 1) - 1 + one.step, value: one.numbers.score, name: `${one.phase} ends, S = ${one.numbers.score.toFixed(2)}` })), format: (value) => value.toFixed(2), size: [1160, 280] }));
  }
  for (const one of decided.slice(-8)) {
    const rows = Object.entries(one.numbers.tasks).map(([name, task]) => [name, fixed(task.score, 3), percent(task.success, 1), fixed(task.extremity, 3), fixed(task.flatness, 3),
      task.change === null ? "" : `${(100 * task.change).toFixed(1)} ± ${(100 * task.error).toFixed(1)} points`, `${task.window} steps, ${whole(task.prompts)} prompts`]);
    parts.push(node("div", { cls: "card" }, node("h3", {}, `${one.phase}, step ${one.step}: S = ${fixed(one.numbers.score, 2)}`), node("p", { cls: "note" }, one.reason),
      scrollTable(["objective", "S", "success", "extremity", "flatness", "change", "window"], rows, `Stagnation of ${one.phase}`)));
  }
  return parts.length ? [node("div", { cls: "grid" }, parts)] : [];
}

const bands = () => Object.entries(DATA.curves.spans).map(([name, [from, to]]) => ({ from, to, name, color: kindColor(DATA.phases.find((phase) => phase.name === name)?.kind) }));

const CURVES = [
  ["Reward", "mean of the step's answers", ["rl/reward", "rl/success", "rl/format"]], ["KL", "nats per token", ["rl/kl_ref", "rl/kl_old", "rl/kl_rollout"]],
  ["Entropy", "nats per token", ["rl/entropy"]], ["Answer length", "tokens per answer", ["rl/response_tokens"]],
  ["Groups", "share of the step's groups", ["rl/live_groups", "rl/all_pass", "rl/all_fail"]], ["Clipped tokens", "share of tokens", ["rl/clip_fraction_low", "rl/clip_fraction_high"]],
  ["RL loss", "policy loss of the step", ["rl/loss"]], ["SFT loss", "nats per token", ["sft/loss"]], ["Gradient norm", "L2 norm", ["train/grad_norm"]],
  ["Learning rate", "of the step", ["train/lr"]], ["Cut off answers", "share of answers", ["rl/truncated"]], ["Throughput", "tokens per second", ["train/tokens_per_s"]],
];

// Every evaluation, those within phases too.
function evaluationCurves() {
  const { series } = DATA.curves;
  const chart = (title, note, whole, color) => {
    const parts = Object.keys(series).filter((name) => name.startsWith(`${whole}/`)).map((name) => ({ name: name.slice(whole.length + 1), color: colorOf(name.slice(whole.length + 1)), points: series[name], faint: true }));
    return series[whole] ? [lineChart({ title, note, series: [{ name: "all", color, points: series[whole] }, ...parts], bands: bands(), dots: true, size: [350, 210], floor: 0, ceiling: 1, format: percent })] : [];
  };
  return [...chart("Held-out success", "share of the held-out samples, at each evaluation", "eval/success", "var(--ink)"),
    ...chart("General set", "share of the held-out general samples, at each evaluation", "eval/general", "var(--c8)")];
}

function curves() {
  const grid = node("div", { cls: "grid three" });
  for (const [title, note, names] of CURVES) {
    const series = names.filter((name) => DATA.curves.series[name]?.length).map((name, k) => ({ name: name.split("/")[1].replaceAll("_", " "), color: color(k), points: DATA.curves.series[name] }));
    if (series.length) grid.append(lineChart({ title, note, series, bands: bands(), size: [350, 210], floor: title === "Groups" || title === "Reward" ? 0 : undefined }));
  }
  grid.append(...evaluationCurves());
  body("curves").append(grid.children.length ? grid : lead("metrics.jsonl has no curves yet."));
}

function time() {
  const into = body("time");
  const names = [...new Set(Object.values(DATA.curves.seconds).flatMap(Object.keys))].filter((name) => name !== "step" && name !== "total").sort();
  const rows = Object.entries(DATA.curves.seconds).map(([phase, spent]) => ({ name: phase || "other", parts: names.filter((name) => spent[name]).map((name) => ({ name: name.replaceAll("_", " "), color: color(names.indexOf(name)), value: spent[name] })) })).filter((row) => row.parts.length && (row.name !== "other" || row.parts.some((part) => part.value > 1)));
  const grid = node("div", { cls: "grid two" });
  if (rows.length) grid.append(stackedBars({ title: "Seconds by stage", note: "Summed over the steps of each phase, on rank 0. A step that was done again after an interruption counts once, each stage by its longer time.", rows, format: duration }));
  const work = Object.entries(DATA.curves.flops).map(([phase, spent]) => ({ name: phase, parts: Object.entries(spent).filter(([, value]) => value).map(([name, value]) => ({ name, color: name === "training" ? "var(--c2)" : "var(--c1)", value })) }));
  if (work.length) grid.append(stackedBars({ title: "Arithmetic by phase", note: "Model FLOPs over all ranks, vision tower included. Generation counts a prompt once for its answers; evaluation isn't counted.", rows: work, format: (value) => `${(value / 1e12).toPrecision(3)} TFLOP` }));
  const used = DATA.curves.series["train/mfu"];
  if (used) grid.append(lineChart({ title: "Arithmetic: share of the device's peak", note: "Model FLOPs of each step, vision tower included, over its time and the device's peak.", series: [{ name: "MFU", color: "var(--c2)", points: used }], floor: 0, bands: bands(), format: (value) => percent(value, 1) }));
  const speed = DATA.curves.series["train/tokens_per_s"];
  if (speed && !used) grid.append(lineChart({ title: "Tokens per second", series: [{ name: "tokens/s", color: "var(--c2)", points: speed }], floor: 0, bands: bands() }));
  into.append(grid.children.length ? grid : lead("No stage times were logged yet."));
}

function corpus() {
  const into = body("corpus");
  const { items, teacher, buffers } = DATA.corpus;
  into.append(lead("What the model failed goes to the teacher; verified answers, related samples, what the model itself answered right and general data make the corpus of the next refinement."));
  const grid = node("div", { cls: "grid two" });
  const colors = { weak: "var(--c1)", retrieved: "var(--c4)", own: "var(--c3)", general: "var(--c8)" };
  const gather = (list, row, part, value, paint) => [...new Set(list.map((one) => one[row]))].map((name) => ({ name, parts: [...new Set(list.map((one) => one[part]))].map((key) => ({ name: key, color: paint(key), value: list.filter((one) => one[row] === name && one[part] === key).reduce((sum, one) => sum + one[value], 0) })).filter((one) => one.value) }));
  if (items.length) {
    grid.append(stackedBars({ title: "Corpus by source, in tokens", rows: gather(items, "phase", "source", "tokens", (key) => colors[key] || "var(--c6)") }));
    grid.append(stackedBars({ title: "Corpus by objective, in samples", rows: gather(items, "phase", "objective", "count", colorOf) }));
  }
  if (buffers.length) {
    const statuses = [...new Set(buffers.map((one) => one.status))];
    grid.append(stackedBars({ title: "What became of the pool", note: "Samples by status when a loop's buffer was made.", rows: gather(buffers, "phase", "status", "count", (key) => color(statuses.indexOf(key))) }));
  }
  if (teacher.length) grid.append(node("div", { cls: "card" }, node("h3", {}, "The teacher"), scrollTable(["phase", "samples asked", "answers", "verified", "kept", "errors"], teacher.map((one) => [one.phase, one.samples, one.answers, one.verified, one.kept, one.errors]), "The teacher's answers")));
  if (grid.children.length) into.append(grid);
  else into.append(lead("No refinement phase has run yet."));
}

function details() {
  const into = body("details");
  if (DATA.decisions.length) into.append(scrollTable(["phase", "step", "decision", "reason"], DATA.decisions.map((one) => [one.phase, one.step, one.kind, one.reason]), "Decisions"));
  const { quarantine, quarantined } = DATA.facts;
  if (quarantined) {
    into.append(node("h3", { style: "margin-top:18px" }, `Media set aside (${whole(quarantined)})`));
    if (quarantine.length < quarantined) into.append(node("p", { cls: "note" }, `The first ${whole(quarantine.length)} by path; the ledger has all.`));
    into.append(scrollTable(["file", "reason"], quarantine.map((one) => [one.path, one.reason]), "Media set aside"));
  }
  if (DATA.facts.config) into.append(node("details", { cls: "card", style: "margin-top:14px" }, node("summary", {}, "Resolved configuration"), node("pre", { tabindex: "0", "aria-label": "Resolved configuration", role: "region" }, DATA.facts.config)));
}
