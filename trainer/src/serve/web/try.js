// Try it: clips from a prompt, with any checkpoint, at several strengths; the queue and the gallery.

import { state, watch } from "./app.js";
import { action, ask, duration, field, fill, h, number, say, statusOf } from "./dom.js";
import { compare, film, inStep, thumbnail, view } from "./clips.js";

const PRESETS = ["", "lightx2v-4", "lightx2v-4-lcm", "lightning-4", "lightning-8", "causvid-8", "causvid-1.3b-4", "fusionx-8"];
const SWEEP = "0, 0.25, 0.5, 0.75, 1, 1.25";
/** Clips that the gallery shows at first. */
const SHOWN = 24;

/** The page. */
export function show(page, query) {
  const wanted = new URLSearchParams(query ?? "").get("model");
  const form = makeForm(wanted);
  const queue = h("ul.list");
  const gallery = h("div.gallery");
  const more = h("button", { type: "button", hidden: true }, "Show more");
  const picked = [];
  const both = h("button", { type: "button", disabled: true, onclick: () => compare(...picked) }, "Compare two");
  page.append(
    h("div.bar", {}, h("h1", {}, "Try it")),
    h("div.columns", {}, form.element,
      h("div", {},
        h("section.card", {}, h("h2", {}, "Queue"), queue),
        h("section.card", {}, h("div.bar", {}, h("h2", { style: "margin:0 auto 0 0" }, "Gallery"), both), gallery, h("div.bar", { style: "margin:1rem 0 0" }, more)))),
  );
  let shown = SHOWN;
  let last = "";
  const figures = new Map();
  const render = ({ videos, runs }) => {
    form.update(runs);
    const waiting = videos.filter((job) => job.status === "queued" || job.status === "in_progress");
    fill(queue, waiting.length ? waiting.map(waits) : h("li.quiet", {}, "Nothing waits."));
    const over = videos.filter((job) => job.status === "completed" || job.status === "failed").reverse();
    more.hidden = over.length <= shown;
    const ids = over.slice(0, shown).map((job) => job.id).join();
    if (ids === last) return;
    last = ids;
    const items = over.slice(0, shown).filter((job) => job.status === "completed").map(item);
    const figure = (job) => {
      if (!figures.has(job.id)) figures.set(job.id, finished(job, pick, form.use));
      return figures.get(job.id);
    };
    for (const id of figures.keys()) if (!ids.includes(id)) figures.delete(id);
    gallery.items = items;
    fill(gallery, over.length ? over.slice(0, shown).map(figure) : h("p.quiet", {}, "Clips that you make are kept here, with all of their settings."));
  };
  const pick = (job, isPicked) => {
    if (isPicked) picked.push(item(job));
    else picked.splice(picked.findIndex((one) => one.id === job.id), 1);
    if (picked.length > 2) {
      const old = picked.shift();
      const box = gallery.querySelector(`[data-id="${old.id}"] input`);
      if (box) box.checked = false;
    }
    both.disabled = picked.length !== 2;
  };
  more.onclick = () => {
    shown += SHOWN;
    last = "";
    render(state);
  };
  const stop = watch(render);
  const sync = inStep(gallery);
  return () => {
    stop();
    sync();
  };
}

function item(job) {
  return { id: job.id, url: `/v1/videos/${job.id}/content`, title: `${job.prompt} (${strengths(job)}, seed ${job.settings.request.seed})` };
}

function strengths(job) {
  const own = job.settings.adapters.map((one) => `${short(one.name)} at ${number(one.strength, 3)}`);
  return own.length ? own.join(", ") : "no adapter";
}

const short = (name) => name.split("/").at(-1);

function waits(job) {
  const request = job.settings.request;
  const words = job.waits_for ? `waits: ${job.waits_for}` : `${request.width}x${request.height}, ${request.frames} frames, ${request.steps} steps; ${strengths(job)}`;
  const preview = job.status === "in_progress" && job.progress > 0 ? previewOf(job) : null;
  return h("li.bar", { style: "margin:0 0 .6rem" },
    preview,
    h("div", { style: "flex:1 1 12rem;min-width:0" },
      h("div", {}, job.prompt),
      h("div.quiet.small", {}, words),
      h("progress", { max: 100, value: job.progress, ariaLabel: "Progress" })),
    statusOf(job.status),
    action("Cancel", () => ask(`/v1/videos/${job.id}`, { method: "DELETE" })));
}

/** What the clip looks like so far; nothing where the server has no tiny decoder. */
function previewOf(job) {
  if (!state.previews) return null;
  const player = film(`/v1/videos/${job.id}/preview?at=${job.progress}`);
  player.style.width = "96px";
  player.onerror = () => player.remove();
  return player;
}

function finished(job, pick, use) {
  const remove = action("Delete", () => ask(`/v1/videos/${job.id}`, { method: "DELETE" }), "button.plain");
  const again = h("button.plain", { type: "button", onclick: () => use(job) }, "Use settings");
  const figure = h("figure", {});
  figure.dataset.id = job.id;
  if (job.status === "failed") {
    fill(figure, h("div.film", {}, h("span.bad.small", { style: "padding:.5rem" }, job.error?.code === "cancelled" ? "cancelled" : "failed")),
      h("figcaption", {}, h("div.prompt", {}, job.prompt), h("div.bad.small", {}, job.error?.message), h("div.actions", {}, again, remove)));
    return figure;
  }
  const box = h("input", { type: "checkbox", ariaLabel: "Compare this clip", onchange: () => pick(job, box.checked) });
  const thumb = thumbnail([item(job)], 0);
  thumb.addEventListener("click", (event) => {
    event.stopImmediatePropagation();
    const items = figure.parentElement.items ?? [item(job)];
    view(items, Math.max(0, items.findIndex((one) => one.id === job.id)));
  }, true);
  const request = job.settings.request;
  fill(figure, thumb, h("figcaption", {},
    h("div.prompt", { title: job.prompt }, job.prompt),
    h("div.quiet.small", {}, `${strengths(job)}; seed ${request.seed}; ${request.steps} steps; ${duration(job.inference_time_s)}`),
    job.label && h("div.warn.small", {}, job.label),
    h("div.actions", {}, h("label.check.small", { style: "margin:0 .4rem 0 .5rem" }, box, "A/B"), again,
      h("button.plain", { type: "button", onclick: () => copyAsRecipe(job) }, "For the recipe"), remove)));
  return figure;
}

/** The settings of a clip as the `[sample]` section of a recipe. */
async function copyAsRecipe(job) {
  const r = job.settings.request;
  const text = `[sample]\nprompts = [${JSON.stringify(r.prompt)}]\nnegative = ${JSON.stringify(r.negative)}\nsize = [${r.width}, ${r.height}]\nframes = ${r.frames}\n`
    + (r.preset ? `preset = "${r.preset}"\n` : `steps = ${r.steps}\nguidance = ${r.guidance}\nguidance_high = ${r.guidance_high}\nshift = ${r.shift}\nsolver = "${r.solver}"\n`)
    + `seed = ${r.seed}\n`;
  try {
    await navigator.clipboard.writeText(text);
    say("The section [sample] of a recipe with these settings is on the clipboard.");
  } catch {
    const dialog = document.getElementById("viewer");
    fill(dialog, h("pre", {}, text), h("div.bar", {}, h("button.primary", { type: "button", onclick: () => dialog.close() }, "Close")));
    dialog.showModal();
  }
}

function makeForm(wanted) {
  const input = (id, attributes) => h("input", { id: `try-${id}`, ...attributes });
  const prompt = h("textarea", { id: "try-prompt", rows: 4, required: true });
  const model = h("select", { id: "try-model" });
  const picture = input("picture", { type: "file", accept: "image/png,image/jpeg,image/webp" });
  const strengthsField = input("strengths", { value: "1", autocomplete: "off", inputMode: "decimal" });
  const fields = {
    seed: input("seed", { type: "number", min: 0, placeholder: "the run's" }),
    num_inference_steps: input("steps", { type: "number", min: 1, placeholder: "the run's" }),
    guidance_scale: input("guidance", { type: "number", step: "any", placeholder: "the run's" }),
    num_frames: input("frames", { type: "number", min: 1, step: 4, placeholder: "the run's" }),
    size: input("size", { placeholder: "the run's", pattern: "\\d+x\\d+" }),
    flow_shift: input("shift", { type: "number", step: "any", placeholder: "the run's" }),
  };
  const preset = h("select", { id: "try-preset" }, PRESETS.map((name) => h("option", { value: name }, name || "all steps of the model")));
  const negative = h("textarea", { id: "try-negative", rows: 2, placeholder: "the run's" });
  const make = action("Make", () => order(false), "button.primary");
  const ab = action("With and without", () => order(true));
  const sweep = h("button.plain", { type: "button", onclick: () => (strengthsField.value = SWEEP) }, "Sweep");

  async function order(isComparison) {
    if (![prompt, ...Object.values(fields)].every((one) => one.reportValidity())) return;
    const own = isComparison ? [0, 1] : strengthsField.value.split(/[,;\s]+/).filter(Boolean).map(Number);
    if (!own.length || own.some((one) => !Number.isFinite(one))) throw new Error("Strengths are numbers, such as 0, 0.5, 1.");
    const group = own.length > 1 ? Math.random().toString(36).slice(2) : "";
    for (const scale of own) {
      const body = new FormData();
      const put = (name, value) => value !== "" && body.append(name, value);
      put("prompt", prompt.value);
      put("model", model.value);
      put("group", group);
      put("preset", preset.value);
      put("negative_prompt", negative.value);
      for (const [name, one] of Object.entries(fields)) put(name, one.value);
      if (isRun() && scale !== 1) put("lora", JSON.stringify({ name: model.value, scale }));
      if (picture.files[0]) body.append("input_reference", picture.files[0]);
      await ask("/v1/videos", { method: "POST", body });
    }
  }
  const isRun = () => model.selectedOptions[0]?.dataset.kind === "run";

  let known = "";
  let models = null;
  const update = (runs) => {
    if (!models) {
      models = [];
      ask("/api/recipes").then((answer) => {
        models = answer.models;
        known = "";
        update(state.runs);
      }).catch(() => {});
    }
    const options = [];
    for (const run of runs) {
      for (const { step } of [...run.checkpoints].reverse()) options.push([step === null ? run.name : `${run.name}@${step}`, step === null ? `${run.name}, final` : `${run.name}, step ${step}`, "run"]);
      if (run.steps) options.push([`${run.name}@base`, `${run.name}, its model alone`, "base"]);
    }
    for (const one of models) options.push([one.name, `${one.name} (model)`, "model"]);
    const now = JSON.stringify(options);
    if (now === known) return;
    known = now;
    const before = model.value || wanted || "";
    fill(model, options.length ? options.map(([value, text, kind]) => {
      const option = h("option", { value }, text);
      option.dataset.kind = kind;
      return option;
    }) : h("option", { value: "" }, "train a run first"));
    const match = options.find(([value]) => value === before) ?? options.find(([value]) => value.startsWith(`${before}@`) && before);
    if (match) model.value = match[0];
  };

  const use = (job) => {
    const r = job.settings.request;
    prompt.value = r.prompt;
    model.value = job.model;
    negative.value = r.negative;
    preset.value = r.preset ?? "";
    fields.seed.value = r.seed;
    fields.num_inference_steps.value = r.preset ? "" : r.steps;
    fields.guidance_scale.value = r.preset ? "" : r.guidance;
    fields.flow_shift.value = r.preset ? "" : r.shift;
    fields.num_frames.value = r.frames;
    fields.size.value = `${r.width}x${r.height}`;
    strengthsField.value = job.settings.adapters[0]?.strength ?? 0;
    prompt.focus();
    scrollTo(0, 0);
  };

  const element = h("section.card", {},
    field("Prompt", prompt),
    field("Run, checkpoint or model", model),
    h("div", {}, h("label", { htmlFor: "try-strengths" }, "Strength, or several for a sweep"),
      h("div", { style: "display:flex;gap:.4rem" }, strengthsField, sweep)),
    field("First picture, for models that take one", picture),
    h("details", {}, h("summary", {}, "Settings"),
      h("div.pair", {}, field("Seed", fields.seed), field("Steps", fields.num_inference_steps), field("Guidance", fields.guidance_scale),
        field("Frames", fields.num_frames), field("Size", fields.size), field("Shift", fields.flow_shift)),
      field("Few steps", preset, "Presets need their distilled adapter, and their motion is weaker than the model's own."),
      field("Negative prompt", negative)),
    h("div.bar", { style: "margin:1rem 0 0" }, make, ab));
  return { element, update, use };
}
