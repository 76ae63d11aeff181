// Opens a report in headless Chromium, works through it, and prints what it measured as JSON.
//   node browser_check.mjs REPORT.html FOLDER_OF_node_modules CHROMIUM [SCREENSHOTS]
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , report, modules, chromium, shots] = process.argv;
const require = createRequire(`${modules}/`);
const { chromium: driver } = require("playwright-core");
const axe = require("axe-core");

const browser = await driver.launch({ executablePath: chromium, args: ["--no-sandbox"] });
const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, colorScheme: "light" });
const page = await context.newPage();
const result = { errors: [], requests: [], filters: {}, checks: {} };
page.on("console", (message) => { if (["error", "warning"].includes(message.type())) result.errors.push(message.text()); });
page.on("pageerror", (error) => result.errors.push(String(error)));
page.on("request", (request) => { if (!/^(file|data|blob):/.test(request.url())) result.requests.push(request.url()); });

const shoot = async (name, whole = false) => { if (shots) await page.screenshot({ path: `${shots}/${name}.png`, fullPage: whole }); };
const found = async () => Number((await page.textContent("#samples [role=status]")).replaceAll(",", "").match(/^\d+/)?.[0] ?? 0);

// Milliseconds from an input to the frame that shows its outcome, taken inside the page.
const timed = (name, change) => page.evaluate(async ([selector, value]) => {
  const field = document.querySelector(selector);
  const began = performance.now();
  field.value = value;
  field.dispatchEvent(new Event(field.tagName === "SELECT" ? "change" : "input", { bubbles: true }));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - began;
}, change).then((ms) => { result.filters[name] = ms; });

await page.goto(pathToFileURL(report).href, { waitUntil: "commit" });
await page.waitForSelector("#summary dd");
await page.waitForFunction(() => document.documentElement.dataset.ready === "yes", null, { timeout: 60000 });
Object.assign(result, await page.evaluate(() => ({
  firstPaint: performance.getEntriesByName("first-contentful-paint")[0]?.startTime,
  ready: performance.now(),
  figures: document.querySelectorAll("main figure svg").length,
  title: document.querySelector("h1").textContent,
  lead: document.querySelector("#summary .lead")?.textContent ?? "",
})));
await shoot("top");
await shoot("whole", true);

result.checks.all = await found();
await timed("text", ["#samples [name=text]", "red"]);
result.checks.text = await found();
await timed("textCleared", ["#samples [name=text]", ""]);
await timed("objective", ["#samples [name=objective]", "1"]);
result.checks.objective = await found();
await timed("dimension", ["#samples [name=dimension]", "0"]);
await timed("dimensionCleared", ["#samples [name=dimension]", "-1"]);
await timed("objectiveCleared", ["#samples [name=objective]", "-1"]);
await timed("rate", ["#samples [name=high]", "0"]);
result.checks.unsolved = await found();
await timed("rateCleared", ["#samples [name=high]", "100"]);
await timed("pool", ["#samples [name=pool]", "0"]);
await timed("poolCleared", ["#samples [name=pool]", "-1"]);
const phase = await page.locator("#samples [name=phase] option").last().getAttribute("value");
await timed("phase", ["#samples [name=phase]", phase]);
await timed("phaseCleared", ["#samples [name=phase]", ""]);
await timed("order", ["#samples [name=order]", "low"]);
await timed("with", ["#samples [name=with]", "teacher"]);
result.checks.taught = await found();
await page.click("#samples button[type=reset]");
await page.waitForFunction((all) => document.querySelector("#samples [role=status]").textContent.replaceAll(",", "").startsWith(all), String(result.checks.all));

await page.click("text=Next page");
result.checks.secondPage = (await page.textContent("#samples [role=status]")).includes("page 2");
await page.click("text=Previous page");
await page.selectOption("#samples [name=with]", "pictures");
for (const place of [0, 2]) {
  await page.locator("#samples .list button").nth(place).click();
  await page.waitForSelector("#samples .detail .answers .text");
}
await page.waitForFunction(() => [...document.querySelectorAll(".strip img")].every((image) => image.complete && image.naturalWidth > 0));
result.checks.pictures = await page.locator("#samples .strip img").count();
result.checks.answers = await page.locator("#samples .detail .answers > li").count();
await page.locator("#samples").scrollIntoViewIfNeeded();
await shoot("sample");

// Text from models and manifests stays text.
await page.click("#samples button[type=reset]");
await page.waitForFunction((all) => document.querySelector("#samples [role=status]").textContent.replaceAll(",", "").startsWith(all), String(result.checks.all));
await page.fill("#samples [name=text]", "rl-hostile");
result.checks.hostile = await found();
if (result.checks.hostile) {
  await page.locator("#samples .list button").first().click();
  await page.waitForFunction(() => document.querySelector("#samples .detail .tags")?.textContent.includes("rl-hostile"));
  result.checks.hostileText = await page.evaluate(() => { const text = document.querySelector("#samples .detail").textContent; return text.includes("</script><script>") && text.includes("U+202E") && !text.includes("\u202e"); });
  result.checks.inserted = await page.locator("#samples .detail script, #samples .detail img[src=x]").count();
  await shoot("hostile");
}
result.checks.pwned = await page.evaluate(() => String(globalThis.pwned));
await page.fill("#samples [name=text]", "");

// The keyboard alone: from the first sample onwards.
await page.locator("#samples .list button").first().focus();
await page.keyboard.press("Enter");
const before = await page.textContent("#samples .detail h3 + .tags");
await page.keyboard.press("j");
await page.waitForFunction((text) => document.querySelector("#samples .detail h3 + .tags").textContent !== text, before);
result.checks.keyboard = await page.evaluate(() => document.activeElement.getAttribute("aria-current") === "true");
await page.locator("details.data summary").first().click();
await page.waitForSelector("details.data[open] table tbody tr");
result.checks.numbers = await page.locator("details.data[open] table tbody tr").count();

await page.evaluate(axe.source);
const audit = async () => (await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }))).violations
  .map(({ id, impact, nodes }) => ({ id, impact, where: nodes.slice(0, 3).map((one) => one.target.join(" ")) }));
result.light = await audit();
await page.click("#theme");
await page.waitForFunction(() => document.documentElement.dataset.theme === "dark");
result.dark = await audit();
await shoot("dark", true);
await page.setViewportSize({ width: 390, height: 844 });
result.checks.overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
await shoot("phone");
const small = await browser.newPage({ viewport: { width: 390, height: 844 }, colorScheme: "light" });
small.on("pageerror", (error) => result.errors.push(String(error)));
await small.goto(pathToFileURL(report).href, { waitUntil: "commit" });
await small.waitForFunction(() => document.documentElement.dataset.ready === "yes", null, { timeout: 60000 });
result.checks.overflowNarrow = await small.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
for (const name of shots ? ["summary", "progress", "practice", "curves", "samples"] : []) {
  await small.evaluate((id) => document.getElementById(id).scrollIntoView({ behavior: "instant" }), name);
  await small.screenshot({ path: `${shots}/phone-${name}.png` });
}
console.log(JSON.stringify(result));
await browser.close();
