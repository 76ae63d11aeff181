// Follows a report that is served while its run goes on: what holds a reload back, and what outlives it.
//   node watch_check.mjs ADDRESS FOLDER_OF_node_modules CHROMIUM [SCREENSHOTS]
// Prints "write" where the run is to write something, waits for a line that says it did, and ends with JSON.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [, , address, modules, chromium, shots] = process.argv;
const { chromium: driver } = createRequire(`${modules}/`)("playwright-core");
const browser = await driver.launch({ executablePath: chromium, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const errors = [];
let loads = 0;
page.on("request", (request) => { if (request.url() === address) loads += 1; });
page.on("console", (message) => { if (["error", "warning"].includes(message.type())) errors.push(message.text()); });
page.on("pageerror", (error) => errors.push(String(error)));
page.setDefaultTimeout(60000);

const write = async () => { console.log("write"); await lines.next(); };
const mark = () => page.evaluate(() => {
  globalThis.old = true;
  globalThis.said = [];
  new MutationObserver(() => globalThis.said.push(document.getElementById("live").textContent)).observe(document.getElementById("live"), { childList: true, characterData: true, subtree: true });
});
const ready = () => page.waitForFunction(() => document.documentElement.dataset.ready === "yes");
const reloaded = async () => { await page.waitForFunction(() => !globalThis.old); await ready(); };
// The button is there, and still is two looks at the run later: nothing was loaded anew meanwhile.
const heldBack = async () => {
  await page.waitForSelector("#newer:not([hidden])");
  await page.waitForTimeout(7000);
  return page.evaluate(() => Boolean(globalThis.old) && !document.getElementById("newer").hidden);
};
const place = () => page.evaluate(() => ({
  found: document.querySelector("#samples [role=status]").textContent,
  chosen: document.querySelector("#samples .detail .tags")?.textContent,
  current: document.querySelector("#samples [aria-current=true]")?.dataset.place,
  objective: document.querySelector("#samples [name=objective]").selectedOptions[0].text,
}));
const result = { errors, held: {} };

// Written before the page first asks: newer than the page all the same.
await page.goto(address);
await ready();
await mark();
await write();
await page.selectOption("#samples [name=objective]", "1");
await page.click("text=Next page");
await page.locator("#samples .list button").nth(3).click();
await page.waitForSelector("#samples .detail .tags");
result.before = await place();
result.held.list = await heldBack();
await page.setViewportSize({ width: 390, height: 844 });
result.overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
if (shots) await page.screenshot({ path: `${shots}/newer-phone.png` });
await page.setViewportSize({ width: 1280, height: 900 });
if (shots) await page.screenshot({ path: `${shots}/newer.png` });
result.said = await page.evaluate(() => globalThis.said);
await page.focus("#newer");
await page.keyboard.press("Enter");
await reloaded();
result.after = await place();
result.focus = await page.evaluate(() => document.activeElement.dataset.place ?? null);

// A look at the detail, then at a table of numbers; the page comes anew when that is closed.
await mark();
await write();
await page.focus("#samples .detail");
result.held.detail = await heldBack();
await page.locator("details.data summary").first().click();
await page.evaluate(() => document.activeElement.blur());
result.held.details = await heldBack();
await page.evaluate(() => { document.querySelector("details[open]").open = false; });
await reloaded();
result.focusAfter = await page.evaluate(() => document.activeElement.dataset.place ?? null);
result.live = await page.textContent("#live");
result.newer = await page.locator("#newer").isVisible();
result.loads = loads;
console.log(JSON.stringify(result));
await browser.close();
process.exit(0);
