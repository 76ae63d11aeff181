// Compressed blocks: decoded when first asked for, the last few kept.
const KEPT = 8;
const opened = new Map();

async function unpack(id) {
  const source = document.getElementById(id);
  const binary = atob(source.textContent);
  const bytes = new Uint8Array(binary.length);
  for (let k = 0; k < binary.length; k += 1) bytes[k] = binary.charCodeAt(k);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function block(id) {
  if (!opened.has(id)) {
    const content = unpack(id);
    opened.set(id, content);
    content.catch(() => { if (opened.get(id) === content) opened.delete(id); });
    if (opened.size > KEPT) opened.delete(opened.keys().next().value);
  }
  return opened.get(id);
}

// What outlives a reload: the theme, and while following a run the reader's place.
function stored(key, value, where = "localStorage") {
  try { if (value === undefined) return window[where].getItem(key); window[where].setItem(key, value); } catch { /* storage may be off */ }
  return null;
}

// Success rate of each sample over one phase, or over all: [rate or -1 without trials].
function ratesOf(index, phase) {
  const lists = phase ? [index.rates[phase]] : Object.values(index.rates);
  const rates = new Float32Array(index.count);
  for (let k = 0; k < index.count; k += 1) {
    let trials = 0, successes = 0;
    for (const list of lists) { trials += list[k][0]; successes += list[k][1]; }
    rates[k] = trials ? successes / trials : -1;
  }
  return rates;
}

// Places of the samples that pass all filters, in the order asked for.
function search(index, rates, texts, wanted) {
  const found = [];
  const words = wanted.text.toLowerCase();
  for (let k = 0; k < index.count; k += 1) {
    if (wanted.objective >= 0 && index.objective[k] !== wanted.objective) continue;
    if (wanted.dimension >= 0 && index.dimension[k] !== wanted.dimension) continue;
    if (wanted.pool >= 0 && index.pool[k] !== wanted.pool) continue;
    if (wanted.with === "teacher" && !index.teacher[k]) continue;
    if (wanted.with === "corpus" && !index.corpus[k]) continue;
    if (wanted.with === "pictures" && !(k in DATA.browser.pictures)) continue;
    if ((wanted.low > 0 || wanted.high < 1) && (rates[k] < wanted.low - 1e-6 || rates[k] > wanted.high + 1e-6)) continue;
    if (words && !texts[k].includes(words)) continue;
    found.push(k);
  }
  if (wanted.order === "low") found.sort((a, b) => (rates[a] < 0 ? 2 : rates[a]) - (rates[b] < 0 ? 2 : rates[b]) || a - b);
  if (wanted.order === "high") found.sort((a, b) => rates[b] - rates[a] || a - b);
  return found;
}
