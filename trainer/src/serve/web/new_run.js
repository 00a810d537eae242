// A new run: a form that writes a recipe, the recipe itself, and its plan before it starts.

import { action, ask, field, fill, h, say } from "./dom.js";
import { memory } from "./memory.js";

/** `recipe` with `value`, as TOML, for `key` of `[section]`. */
export function withSetting(recipe, section, key, value) {
  const lines = recipe.split("\n");
  const start = lines.findIndex((line) => line.trim() === `[${section}]`);
  if (start < 0) return `${recipe.trimEnd()}\n\n[${section}]\n${key} = ${value}\n`;
  let end = lines.findIndex((line, index) => index > start && /^\s*\[\w/.test(line));
  if (end < 0) end = lines.length;
  const at = lines.findIndex((line, index) => index > start && index < end && new RegExp(`^\\s*${key}\\s*=`).test(line));
  if (at < 0) {
    lines.splice(start + 1, 0, `${key} = ${value}`);
    return lines.join("\n");
  }
  // A list may go over several lines.
  let last = at;
  const open = (text) => (text.match(/\[/g) ?? []).length - (text.match(/\]/g) ?? []).length;
  while (open(lines.slice(at, last + 1).join("\n")) > 0 && last < end - 1) last += 1;
  lines.splice(at, last - at + 1, `${key} = ${value}`);
  return lines.join("\n");
}

const FIELDS = [
  ["data", "sizes", "Sizes", { type: "text" }],
  ["data", "frames", "Lengths in frames", { type: "text" }],
  ["train", "steps", "Steps", { type: "number", min: 1 }],
  ["adapter", "rank", "Rank", { type: "number", min: 1 }],
  ["optimizer", "lr", "Learning rate", { type: "text", inputMode: "decimal" }],
  ["checkpoint", "every_steps", "Checkpoint every", { type: "number", min: 0 }],
  ["sample", "every", "Clips every", { type: "number", min: 0 }],
  ["sample", "steps", "Steps of a clip", { type: "number", min: 1 }],
];

/** The page. */
export function show(page) {
  const name = h("input", { id: "run-name", required: true, pattern: "[A-Za-z0-9_][A-Za-z0-9_.\\-]*", autocomplete: "off", spellcheck: false });
  const from = h("select", { id: "run-from" });
  const model = h("select", { id: "run-model" });
  const clips = h("select", { id: "run-data" });
  const recipe = h("textarea.code", { id: "run-recipe", spellcheck: false, ariaLabel: "Recipe", rows: 26 });
  const inputs = FIELDS.map(([section, key, , attributes]) => h("input", { id: `run-${section}-${key}`, ...attributes }));
  const prompts = h("textarea", { id: "run-prompts", rows: 3 });
  const result = h("div", { role: "status" });
  const body = () => ({ name: name.value.trim(), recipe: recipe.value });

  const read = () => {
    FIELDS.forEach(([section, key], index) => (inputs[index].value = valueOf(recipe.value, section, key) ?? ""));
    prompts.value = promptsOf(recipe.value).join("\n");
  };
  inputs.forEach((input, index) => {
    const [section, key] = FIELDS[index];
    input.onchange = () => input.value && (recipe.value = withSetting(recipe.value, section, key, input.value.trim()));
  });
  prompts.onchange = () => {
    const lines = prompts.value.split("\n").map((line) => line.trim()).filter(Boolean);
    recipe.value = withSetting(recipe.value, "sample", "prompts", `[${lines.map((line) => JSON.stringify(line)).join(", ")}]`);
  };
  recipe.onchange = read;

  const write = action("Write a recipe", async () => {
    const answer = await ask("/api/draft", { method: "POST", body: { model: model.value, data: clips.value } });
    recipe.value = answer.recipe;
    read();
    if (!name.value) name.value = clips.selectedOptions[0]?.dataset.name ?? "run";
  });
  const check = action("Check the plan", async () => {
    fill(result, h("p.quiet", {}, "Planning …"));
    try {
      const planned = await ask("/api/plan", { method: "POST", body: { ...body(), name: body().name || "run" } });
      fill(result, report(planned));
    } catch (error) {
      fill(result, h("p.message", {}, error.message));
    }
  });
  const start = action("Start", async () => {
    if (!name.reportValidity()) return;
    fill(result, h("p.quiet", {}, "Planning …"));
    try {
      const run = await ask("/api/runs", { method: "POST", body: body() });
      location.hash = `#/runs/${run.name}`;
    } catch (error) {
      fill(result, h("p.message", {}, error.message));
    }
  }, "button.primary");

  page.append(
    h("div.bar", {}, h("h1", {}, "New run")),
    h("div.columns", {},
      h("section.card", {},
        field("Name", name),
        field("Start from", from),
        field("Model", model),
        field("Clips", clips),
        h("div.bar", { style: "margin:.8rem 0 0" }, write),
        h("div.pair", {}, FIELDS.map(([, , label], index) => field(label, inputs[index]))),
        field("Prompts of the clips, one a line", prompts)),
      h("section.card", {},
        h("label", { htmlFor: "run-recipe", style: "margin-top:0" }, "Recipe"),
        recipe,
        h("div.bar", { style: "margin:.8rem 0 0" }, check, start),
        result)),
  );
  choices(from, model, clips).then((recipes) => {
    from.onchange = () => {
      const chosen = recipes.find((one) => one.name === from.value);
      if (!chosen) return;
      recipe.value = chosen.text;
      name.value = chosen.name;
      read();
    };
  }).catch((error) => say(error.message));
}

/** Fills the choices; the recipes that there are. */
async function choices(from, model, clips) {
  const [{ recipes, models, published }, { datasets }] = await Promise.all([ask("/api/recipes"), ask("/api/datasets")]);
  fill(from, h("option", { value: "" }, "the form"), recipes.map((one) => h("option", { value: one.name }, `${one.name}.toml`)));
  fill(model, models.map((one) => h("option", { value: one.folder }, one.name)),
    published.map((one) => h("option", { value: one.id }, `${one.title} (${one.id})`)));
  fill(clips, datasets.map((one) => {
    const option = h("option", { value: one.folder }, `${one.name} (${one.clips} clips)`);
    option.dataset.name = one.name;
    return option;
  }));
  if (!datasets.length) fill(clips, h("option", { value: "clips" }, "none: start the server with --data FOLDER"));
  return recipes;
}

/** What the recipe says for a key, as far as it is on one line. */
function valueOf(recipe, section, key) {
  const part = recipe.split(/^\s*\[(?=\w)/m).find((text) => text.startsWith(`${section}]`));
  return part?.match(new RegExp(`^\\s*${key}\\s*=\\s*([^#\\n]+)`, "m"))?.[1].trim();
}

/** The prompts of a recipe that lists them. */
function promptsOf(recipe) {
  const list = recipe.match(/^\s*prompts\s*=\s*\[([^\]]*)\]/m)?.[1] ?? "";
  return [...list.matchAll(/"((?:[^"\\]|\\.)*)"/g)].map((match) => JSON.parse(`"${match[1]}"`));
}

function report({ plan, memory: planned, notes }) {
  return [
    h("p.message.fine", {}, `Fits. ${plan.dataset.clips} clips, ${plan.dataset.items} windows, ${plan.train.steps} steps of ${plan.train.tokens_per_step ? `${plan.train.tokens_per_step} tokens` : `${plan.train.accumulate} x ${plan.train.batch}`}.`),
    notes.map((note) => h("p.message.note", {}, note)),
    memory(planned),
  ];
}
