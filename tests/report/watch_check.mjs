// Follows a report that is served while its run goes on, and prints whether the reader's place outlives a reload.
//   node watch_check.mjs ADDRESS FOLDER_OF_node_modules CHROMIUM; a line on stdin says that the run has written something
import { createRequire } from "node:module";
import { once } from "node:events";

const [, , address, modules, chromium] = process.argv;
const { chromium: driver } = createRequire(`${modules}/`)("playwright-core");
const browser = await driver.launch({ executablePath: chromium, args: ["--no-sandbox"] });
const page = await browser.newPage();
const errors = [];
page.on("console", (message) => { if (["error", "warning"].includes(message.type())) errors.push(message.text()); });
page.on("pageerror", (error) => errors.push(String(error)));
const ready = () => page.waitForFunction(() => document.documentElement.dataset.ready === "yes", null, { timeout: 60000 });
const place = () => page.evaluate(() => ({
  found: document.querySelector("#samples [role=status]").textContent,
  chosen: document.querySelector("#samples .detail .tags")?.textContent,
  current: document.querySelector("#samples [aria-current=true]")?.dataset.place,
  objective: document.querySelector("#samples [name=objective]").selectedOptions[0].text,
}));

await page.goto(address);
await ready();
await page.selectOption("#samples [name=objective]", "1");
await page.click("text=Next page");
await page.locator("#samples .list button").nth(3).click();
await page.waitForSelector("#samples .detail .tags");
const before = await place();
await page.evaluate(() => { globalThis.old = true; });
console.log("waiting");
await once(process.stdin, "data");
await page.waitForFunction(() => !globalThis.old, null, { timeout: 60000 });
await ready();
console.log(JSON.stringify({ before, after: await place(), errors, live: await page.textContent("#live") }));
await browser.close();
process.exit(0);
