// Opens a report in headless Chromium, takes the steps it is given, and prints what they found as JSON.
//   node steps.mjs REPORT.html FOLDER_OF_node_modules CHROMIUM STEPS
// STEPS is a JSON list; only text, texts, table and run find something:
//   ["click", selector] ["fill", selector, value] ["choose", selector, value] ["wait", selector]
//   ["text", selector] ["texts", selector] ["table", title of a figure] ["run", expression]
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , report, modules, chromium, steps] = process.argv;
const { chromium: driver } = createRequire(`${modules}/`)("playwright-core");
const browser = await driver.launch({ executablePath: chromium, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, colorScheme: "light" });
page.setDefaultTimeout(20000);
const errors = [], found = [];
page.on("console", (message) => { if (["error", "warning"].includes(message.type())) errors.push(message.text()); });
page.on("pageerror", (error) => errors.push(String(error)));

const rows = (title) => page.evaluate((name) => {
  const figure = [...document.querySelectorAll("figure")].find((one) => one.querySelector("h3").textContent === name);
  if (!figure) return null;
  const data = figure.querySelector("details.data");
  data.open = true;
  return new Promise((done) => {
    const look = () => (data.children.length < 2 ? setTimeout(look, 5) : done([...data.querySelectorAll("tr")].map((row) => [...row.children].map((cell) => cell.textContent))));
    look();
  });
}, title);

await page.goto(pathToFileURL(report).href);
await page.waitForFunction(() => document.documentElement.dataset.ready === "yes");
for (const [kind, target, value] of JSON.parse(steps)) {
  if (kind === "click") await page.locator(target).first().click();
  else if (kind === "fill") await page.fill(target, value);
  else if (kind === "choose") await page.selectOption(target, value);
  else if (kind === "wait") await page.waitForSelector(target);
  else if (kind === "text") found.push(await page.locator(target).first().textContent());
  else if (kind === "texts") found.push(await page.locator(target).allTextContents());
  else if (kind === "table") found.push(await rows(target));
  else if (kind === "run") found.push(await page.evaluate(target) ?? null);
  else throw new Error(`no step ${kind}`);
}
console.log(JSON.stringify({ errors, found }));
await browser.close();
