// The sample browser: filters, a paged list, and one sample in detail.
const PAGE = 25;
const ANSWERS = 12;
const SNIPPET = 110;
const LARGER = `the file would be larger than ${DATA.browser.megabytes} MB (--max-megabytes)`;

// What of the ledger is in the file, and why the rest isn't.
function holdings(samples) {
  const { rolloutsShown: shown, rolloutsTotal: total, rolloutsOlder: older, bare, mostRollouts, note } = DATA.browser;
  const parts = [`${whole(samples)} samples, ${whole(shown)}${shown < total ? ` of ${whole(total)}` : ""} rollouts in this file.`];
  if (older) parts.push(`${whole(older)} are left out as older than the newest ${whole(mostRollouts)} (--max-rollouts).`);
  if (bare) parts.push(`The details of ${whole(bare)} samples, ${whole(total - older - shown)} rollouts among them, are left out: ${LARGER}; held-out, taught and corpus samples come first.`);
  if (shown < total || bare) parts.push("The ledger has all.");
  if (note) parts.push(`${note[0].toUpperCase()}${note.slice(1)}.`);
  return parts.join(" ");
}

async function browse() {
  const into = body("samples");
  const index = await block("samples-index");
  into.append(lead(holdings(index.count)));
  if (!index.count) return;
  const texts = index.id.map((id, k) => `${id} ${index.question[k]}`.toLowerCase());
  const state = { text: "", objective: -1, dimension: -1, pool: -1, with: "", low: 0, high: 1, order: "", phase: "", page: 0, found: [], rates: ratesOf(index, ""), current: -1 };

  const status = node("p", { role: "status", "aria-live": "polite" });
  const list = node("ol", { cls: "list", "aria-label": "Samples found" });
  const detail = node("div", { cls: "card detail", role: "region", "aria-label": "Chosen sample", tabindex: "0" }, node("p", { cls: "note" }, "Choose a sample to see its clip, its rollouts and what the teacher said."));
  const back = node("button", { type: "button", on: { click: () => turn(-1) } }, "Previous page");
  const forth = node("button", { type: "button", on: { click: () => turn(1) } }, "Next page");

  const choice = (name, key, words, first) => node("label", {}, name, node("select", { name: key, on: { change: (event) => { state[key] = +event.target.value; refresh(); } } },
    node("option", { value: "-1" }, first), words.map((word, k) => node("option", { value: k }, word || "(none)"))));
  const pick = (name, key, options) => node("label", {}, name, node("select", { name: key, on: { change: (event) => { state[key] = event.target.value; if (key === "phase") state.rates = ratesOf(index, state.phase); refresh(); } } },
    options.map(([value, text]) => node("option", { value }, text))));
  const bound = (key, label, otherwise) => node("input", { type: "number", min: 0, max: 100, step: 5, name: key, value: 100 * otherwise, "aria-label": label, on: { input: (event) => { state[key] = event.target.value === "" ? otherwise : event.target.value / 100; refresh(); } } });
  const form = node("form", { cls: "filters", role: "search", "aria-label": "Filter samples", on: { submit: (event) => event.preventDefault(), reset: () => setTimeout(() => { Object.assign(state, { text: "", objective: -1, dimension: -1, pool: -1, with: "", low: 0, high: 1, order: "", phase: "", rates: ratesOf(index, "") }); refresh(); }) } },
    node("label", { cls: "wide" }, "Text or id", node("input", { type: "search", name: "text", autocomplete: "off", on: { input: (event) => { state.text = event.target.value; refresh(); } } })),
    choice("Objective", "objective", index.words.objective, "all objectives"),
    choice("Dimension", "dimension", index.words.dimension, "all dimensions"),
    choice("Pool", "pool", index.words.pool, "all pools"),
    pick("Success rate in", "phase", [["", "all phases"], ...Object.keys(index.rates).map((name) => [name, name])]),
    node("label", {}, "Success rate, %", node("span", { cls: "range" }, bound("low", "Lowest success rate in percent", 0), "to", bound("high", "Highest success rate in percent", 1))),
    pick("Only with", "with", [["", "anything"], ["teacher", "a teacher's answer"], ["corpus", "a place in a corpus"], ["pictures", "pictures"]]),
    pick("Order", "order", [["", "as in the pool"], ["low", "lowest success first"], ["high", "highest success first"]]),
    node("label", {}, "\u00a0", node("button", { type: "reset" }, "Clear filters")));
  into.append(form, node("div", { cls: "split" }, node("div", {}, node("div", { cls: "found" }, status, back, forth), list,
    node("p", { cls: "note", style: "margin-top:8px" }, node("kbd", {}, "j"), " and ", node("kbd", {}, "k"), " step through the samples found.")), detail));

  function refresh() {
    state.found = search(index, state.rates, texts, state);
    state.page = 0;
    draw();
  }

  function turn(by) {
    state.page += by;
    draw();
    list.querySelector("button")?.focus();
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    const from = state.page * PAGE;
    status.textContent = state.found.length ? `${whole(state.found.length)} found, page ${state.page + 1} of ${whole(pages)}` : "Nothing found; clear a filter.";
    back.disabled = state.page === 0;
    forth.disabled = state.page >= pages - 1;
    list.replaceChildren(...state.found.slice(from, from + PAGE).map(entry));
    remember();
  }

  // While a run is followed the page is loaded anew: filters, page, chosen sample and the list's focus stay.
  let touched = "";
  list.addEventListener("focusin", (event) => { touched = index.id[event.target.closest("button").dataset.place]; });
  addEventListener("pagehide", remember);
  const focused = () => (list.contains(document.activeElement) || document.activeElement?.id === "newer" ? touched : "");
  const fields = () => [...form.querySelectorAll("input, select")];
  function remember() {
    if (!DATA.live) return;
    const filters = fields().map((field) => (field.selectedOptions ? field.selectedOptions[0].text : field.value));
    stored("report-browser", JSON.stringify({ filters, page: state.page, id: index.id[state.current] ?? "", focus: focused() }), "sessionStorage");
  }

  async function recall({ filters, page, id, focus }) {
    fields().forEach((field, k) => {
      if (field.options) field.selectedIndex = Math.max(0, [...field.options].findIndex((option) => option.text === filters[k]));
      else field.value = filters[k];
      field.dispatchEvent(new Event(field.options ? "change" : "input"));
    });
    state.page = Math.min(page, Math.max(0, Math.ceil(state.found.length / PAGE) - 1));
    draw();
    if (index.id.includes(id)) await open(index.id.indexOf(id));
    if (focus) list.querySelector(`[data-place="${index.id.indexOf(focus)}"]`)?.focus({ preventScroll: true });
  }

  function entry(k) {
    const rate = state.rates[k];
    return node("li", {}, node("button", { type: "button", "data-place": k, "aria-current": k === state.current ? "true" : null, on: { click: () => open(k) } },
      node("span", { cls: "question", dir: "auto" }, asked(index.question[k]).slice(0, SNIPPET) || index.id[k]),
      node("span", { cls: "meta" }, `${index.words.objective[index.objective[k]]} · ${index.id[k]}`),
      node("span", { cls: "rate" }, rate < 0 ? "not rolled out" : percent(rate), rate < 0 ? null : node("span", { cls: "track", "aria-hidden": "true" }, node("span", { style: `width:${100 * rate}%` })))));
  }

  async function open(k) {
    state.current = k;
    remember();
    list.querySelectorAll("button").forEach((button) => { if (+button.dataset.place === k) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current"); });
    const made = await sampleView(index, k).catch((error) => [node("h3", {}, plain(index.id[k])), node("p", { cls: "note", role: "alert" }, `This sample can't be shown: ${error.message}`)]);
    if (state.current === k) { detail.replaceChildren(...made); detail.scrollTop = 0; }
  }

  into.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey || !["j", "k"].includes(event.key)) return;
    const at = state.found.indexOf(state.current) + (event.key === "j" ? 1 : -1);
    if (at < 0 || at >= state.found.length) return;
    state.page = Math.floor(at / PAGE);
    state.current = state.found[at];
    draw();
    open(state.found[at]);
    const button = list.querySelector(`[data-place="${state.found[at]}"]`);
    button?.focus();
  });
  const before = DATA.live ? stored("report-browser", undefined, "sessionStorage") : null;
  refresh();
  if (before) await recall(JSON.parse(before));
}

async function sampleView(index, k) {
  const title = node("h3", { dir: "auto" }, asked(index.question[k]) || index.id[k]);
  const word = (name) => index.words[name][index[name][k]];
  const tags = node("div", { cls: "tags" }, [index.id[k], word("objective"), word("dimension"), word("pool"), word("source")].filter(Boolean).map((text) => tag(text)));
  if (index.block[k] < 0) return [title, tags, node("p", { cls: "note" }, `The details of this sample are in the ledger only: ${LARGER}.`), older(index, k)];
  const sample = (await block(`samples-${index.block[k]}`))[k];
  title.textContent = asked(sample.q) || index.id[k];
  const parts = [title, tags];
  if (k in DATA.browser.pictures) parts.push(...(await block(`pictures-${DATA.browser.pictures[k]}`))[k].map((strip) => pictures(strip)));
  const facts = [["Gold", sample.gold === null ? null : typeof sample.gold === "string" ? sample.gold : JSON.stringify(sample.gold)], ["Reference", sample.answer],
    ["Media", sample.media.map((one) => one.path.split("/").pop() + (one.start !== null || one.end !== null ? ` (${one.start ?? 0} s to ${one.end ?? "the end"})` : "")).join(", ")]].filter(([, value]) => value);
  parts.push(node("dl", { cls: "pair" }, facts.flatMap(([name, value]) => [node("dt", {}, name), node("dd", { dir: "auto" }, plain(value))])));
  const seen = Object.entries(index.rates).filter(([, list]) => list[k][0]).map(([phase, list]) => [phase, list[k][0], list[k][1], percent(list[k][1] / list[k][0])]);
  if (seen.length) parts.push(node("h4", {}, "Success by phase"), table(["phase", "answers", "right", "rate"], seen));
  if (sample.teacher) parts.push(node("h4", {}, "The teacher's answers"), node("ol", { cls: "answers" }, sample.teacher.map(([phase, model, reward, right, kept, error, text]) => answer(right, text, [node("b", {}, model || "teacher"), `asked after ${phase}`, `reward ${compact(reward)}`, kept ? tag("kept", "good") : tag("not kept"), error ? tag(error, "bad") : null]))));
  if (sample.corpus) parts.push(node("h4", {}, "In the corpus"), node("ol", { cls: "answers" }, sample.corpus.map(([phase, source, tokens, why, text]) => answer(true, text, [node("b", {}, source), phase, `${tokens} tokens`, why]))));
  if (sample.rollouts.length) parts.push(node("h4", {}, `Rollouts (${sample.rollouts.length})`), paged(sample.rollouts, rollout));
  parts.push(older(index, k));
  if (sample.evaluation) parts.push(node("h4", {}, "Held-out answers"), paged(sample.evaluation, ([phase, step, name, reward, right, found, text]) => answer(right, text, [node("b", {}, phase), name, step ? `after step ${step} of the phase` : "before any step", ...rewards(reward, found)])));
  return parts;
}

// A note on the sample's rollouts that are older than the newest ones in the file.
function older(index, k) {
  const missing = Object.values(index.rates).reduce((sum, list) => sum + list[k][0], 0) - index.rollouts[k];
  return missing > 0 ? node("p", { cls: "note" }, `In the ledger only, as older than the newest ${whole(DATA.browser.mostRollouts)} (--max-rollouts): ${whole(missing)} of its rollouts.`) : "";
}

// Steps are counted from 1 as in the curves; phases that only roll out do so chunk by chunk.
const measured = new Set(DATA.phases.filter(({ kind }) => kind === "buffer" || kind === "weakness").map(({ name }) => name));
const when = (phase, step) => (measured.has(phase) ? `${phase}, chunk ${step + 1}` : `${phase}, step ${step + 1} of the phase`);
const tag = (text, kind = "") => node("span", { cls: `tag ${kind}` }, plain(text));
const asked = (question) => plain(question.replaceAll(/<(video|image)>/g, "")).trim();
const rewards = (reward, found) => [`reward ${compact(reward)}`, Object.entries(found).map(([name, value]) => `${name} ${typeof value === "number" ? compact(value) : value}`).join(", ")];

function rollout([phase, step, number, reward, right, tokens, finish, found, versions, error, text]) {
  const weights = versions.length ? `weights ${versions.map(([version, from, to]) => (versions.length > 1 ? `${version} (tokens ${from} to ${to})` : version)).join(", ")}` : null;
  return answer(right, text, [node("b", {}, right ? "right" : "wrong"), `${when(phase, step)}, answer ${number + 1}`, ...rewards(reward, found), `${tokens} tokens`, weights, finish === "stop" ? null : tag(finish, "bad"), error ? tag(error, "bad") : null]);
}

function answer(right, text, head) {
  return node("li", { cls: right ? "right" : "" }, node("div", { cls: "head" }, head.filter(Boolean).map((part) => (part instanceof Node ? part : node("span", {}, plain(part))))), node("p", { cls: "text", dir: "auto" }, marked(plain(text))));
}

// The answer proper stands out; tags step back.
function marked(text) {
  const parts = [];
  let inside = false;
  for (const piece of text.split(/(<\/?(?:think|answer|thought)>)/)) {
    if (!piece) continue;
    if (/^<\/?(?:think|answer|thought)>$/.test(piece)) { inside = piece === "<answer>"; parts.push(node("span", { cls: "tagname" }, piece)); }
    else parts.push(inside ? node("mark", {}, piece) : piece);
  }
  return parts;
}

function pictures(strip) {
  if (!strip.length) return node("p", { cls: "note" }, "The clip couldn't be read when the report was made.");
  return node("div", { cls: "strip", tabindex: "0", role: "region", "aria-label": "Frames of the clip" }, strip.map(([second, data]) => node("figure", {},
    node("img", { src: `data:image/jpeg;base64,${data}`, alt: `Frame at ${second} seconds`, on: { load: (event) => event.target.classList.toggle("small", event.target.naturalHeight < 80) } }),
    node("figcaption", {}, `${second} s`))));
}

function paged(rows, draw) {
  const list = node("ol", { cls: "answers" });
  const label = node("span", {});
  let page = 0;
  const pages = Math.ceil(rows.length / ANSWERS);
  const show = () => { list.replaceChildren(...rows.slice(page * ANSWERS, (page + 1) * ANSWERS).map(draw)); label.textContent = `${page + 1} of ${pages}`; back.disabled = page === 0; forth.disabled = page >= pages - 1; };
  const back = node("button", { type: "button", on: { click: () => { page -= 1; show(); } } }, "Earlier");
  const forth = node("button", { type: "button", on: { click: () => { page += 1; show(); } } }, "Later");
  show();
  return node("div", {}, list, pages > 1 ? node("div", { cls: "pager" }, back, label, forth) : null);
}
