// Runs: the list, and one run with its curve, its clips and its checkpoints.

import { watch } from "./app.js";
import { action, ask, bytes, duration, fill, h, number, statusOf } from "./dom.js";
import { draw, smoothed } from "./curve.js";
import { compare, inStep, thumbnail } from "./clips.js";
import { memory } from "./memory.js";

/** The list of runs. */
export function showAll(page) {
  const list = h("ul.list.card", { style: "padding:0" });
  page.append(
    h("div.bar", {}, h("h1", {}, "Runs"), h("a.button.primary", { href: "#/runs/new" }, "New run")),
    list,
  );
  return watch(({ runs }) => {
    const focused = document.activeElement?.dataset?.run;
    fill(list, runs.length ? runs.map(row) : h("li.empty", {}, "No runs yet. Start one with New run."));
    if (focused) list.querySelector(`[data-run="${focused}"]`)?.focus();
  });
}

function row(run) {
  const link = h("a.row", { href: `#/runs/${run.name}` },
    h("b", {}, run.name),
    statusOf(run.status),
    h("progress", { max: run.steps ?? 1, value: run.step, ariaLabel: "Steps made" }),
    h("span.quiet.wide", {}, words(run)));
  link.dataset.run = run.name;
  return h("li", {}, link);
}

function words(run) {
  if (run.status === "queued") return run.waits_for ? `waits: ${run.waits_for}` : "starts soon";
  if (run.status === "running" && !run.steps) return "is being planned";
  const steps = `step ${run.step} of ${run.steps ?? "?"}`;
  return run.status === "running" && run.seconds_left ? `${steps}, ${duration(run.seconds_left)} left` : steps;
}

const can = {
  pause: ["queued", "running"],
  resume: ["paused", "failed"],
  sample: ["running"],
  save: ["running"],
};

/** One run. */
export function showOne(page, name) {
  const act = (what) => () => ask(`/api/runs/${name}/${what}`, { method: "POST" });
  const buttons = {
    sample: action("Sample now", act("sample")),
    save: action("Save now", act("save")),
    pause: action("Pause", act("pause")),
    resume: action("Resume", act("resume"), "button.primary"),
  };
  const status = h("span");
  const facts = h("dl.facts");
  const trouble = h("div");
  const canvas = h("canvas.curve", { role: "img", ariaLabel: "Loss by step" });
  const smoothing = h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0.9, ariaLabel: "Smoothing", style: "max-width:9rem" });
  const legend = h("div.legend");
  const sheet = h("div.sheet");
  const kept = h("div");
  const plan = h("div");
  page.append(
    h("div.bar", {}, h("h1", {}, name), status, ...Object.values(buttons),
      h("a.button", { href: `#/try?model=${encodeURIComponent(name)}` }, "Try it")),
    trouble,
    h("section.card", {}, facts),
    h("section.card", {}, h("div.bar", {}, h("h2", { style: "margin:0 auto 0 0" }, "Loss"), legend, h("label.check.small", { style: "margin:0" }, "Smoothing", smoothing)), canvas),
    h("section.card", {}, h("h2", {}, "Clips"), sheet),
    h("section.card", {}, h("h2", {}, "Checkpoints"), kept),
    plan,
  );
  const rows = [];
  const redraw = () => drawRows(canvas, legend, rows, Number(smoothing.value));
  smoothing.oninput = redraw;
  const resized = new ResizeObserver(redraw);
  resized.observe(canvas);
  const source = new EventSource(`/api/runs/${name}/events`);
  source.addEventListener("reset", () => (rows.length = 0));
  source.addEventListener("rows", (event) => {
    rows.push(...JSON.parse(event.data));
    redraw();
  });
  source.onopen = () => (rows.length = 0);
  let shown = "";
  const stop = watch(({ runs }) => {
    const run = runs.find((one) => one.name === name);
    if (!run) {
      fill(trouble, h("p.message", {}, `There is no run ${name}.`));
      return;
    }
    for (const [what, button] of Object.entries(buttons)) button.hidden = !can[what].includes(run.status);
    buttons.pause.textContent = run.status === "queued" ? "Leave the queue" : "Pause";
    if (!run.has_recipe) buttons.resume.hidden = true;
    fill(status, statusOf(run.status));
    fill(trouble, run.error && h("p.message", {}, run.error), run.waits_for && h("p.message.note", {}, `Waits: ${run.waits_for}.`));
    fill(facts, tell(run));
    const sets = JSON.stringify([run.samples, run.checkpoints]);
    if (sets !== shown) {
      shown = sets;
      fill(sheet, clipStrips(run));
      fill(kept, checkpoints(run, rows));
    }
  });
  const sync = inStep(sheet);
  ask(`/api/runs/${name}`).then((answer) => fill(plan, planned(answer))).catch(() => {});
  return () => {
    stop();
    sync();
    source.close();
    resized.disconnect();
  };
}

function tell(run) {
  const rate = run.seconds_per_step && run.status === "running" ? `${number(run.seconds_per_step, 3)} s a step` : "–";
  const all = {
    Step: `${run.step} of ${run.steps ?? "?"}`,
    Loss: number(run.loss),
    Rate: rate,
    "Time left": run.status === "running" ? duration(run.seconds_left) : "–",
    Devices: run.devices.join(" + ") || "–",
    "Host memory": bytes(run.host_memory),
    Model: run.model ?? "–",
  };
  return Object.entries(all).map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value)));
}

function drawRows(canvas, legend, rows, weight) {
  const steps = rows.filter((row) => typeof row.loss === "number");
  const raw = steps.map((row) => [row.step, row.loss]);
  const curve = (own, pick) => {
    const values = smoothed(own.map(pick), weight);
    return own.map((row, index) => [row.step, values[index]]);
  };
  const series = [
    { name: "each step", points: raw, colour: "--quiet", alpha: 0.35, width: 1 },
    { name: "smoothed", points: curve(steps, (row) => row.loss), colour: "--accent", width: 2 },
  ];
  for (const [expert, colour] of [["high", "--second"], ["low", "--warn"]]) {
    const own = steps.filter((row) => row.experts?.[expert]);
    if (own.length) series.push({ name: `${expert} noise`, points: curve(own, (row) => row.experts[expert].loss), colour });
  }
  const held = rows.filter((row) => typeof row.eval_loss === "number").map((row) => [row.step, row.eval_loss]);
  if (held.length) series.push({ name: "held out", points: held, colour: "--good", dots: true });
  fill(legend, series.map((one) => h("span", {}, h("i", { style: `color:var(${one.colour})` }), one.name)));
  draw(canvas, series);
}

const urlOf = (run, set, file) => `/api/runs/${run.name}/files/samples/step-${String(set.step).padStart(6, "0")}/${encodeURIComponent(file)}`;

/** A strip for each prompt, with a clip of each step; all play in step. */
function clipStrips(run) {
  const sets = run.samples.map((set) => ({ ...set, files: oneFormat(set.files) }));
  if (!sets.length) return h("p.quiet", {}, "No clips yet. They come at the steps that the recipe names, and with Sample now.");
  const names = [...new Set(sets.flatMap((set) => set.files.map(bare)))].sort();
  return names.map((name) => {
    const own = sets.filter((set) => set.files.some((file) => bare(file) === name));
    const items = own.map((set) => ({ url: urlOf(run, set, set.files.find((file) => bare(file) === name)), title: `${title(name)}, step ${set.step}` }));
    const both = items.length > 1 && h("button.plain", { type: "button", onclick: () => compare(items[0], items.at(-1)) }, "Before / after");
    return h("div", {},
      h("div.bar", { style: "margin:0" }, h("h3", { style: "margin-right:auto" }, title(name)), both),
      h("div.strip", {}, own.map((set, index) => h("figure", {}, thumbnail(items, index), h("figcaption.quiet.small", {}, `step ${set.step}`)))));
  });
}

const bare = (file) => file.replace(/\.\w+$/, "");
const title = (name) => name.replace(/^\d+-?/, "").replaceAll("-", " ") || name;

/** Of a clip in several formats the one that plays best. */
function oneFormat(files) {
  const best = new Map();
  for (const file of files) if (!best.has(bare(file)) || file.endsWith(".mp4")) best.set(bare(file), file);
  return [...best.values()];
}

function checkpoints(run, rows) {
  if (!run.checkpoints.length) return h("p.quiet", {}, "None yet.");
  const held = (step) => rows.findLast((row) => row.step === step && typeof row.eval_loss === "number")?.eval_loss;
  return h("ul.list", {}, run.checkpoints.map(({ step, files }) => {
    const score = step !== null && held(step);
    return h("li.kept", {},
      h("b", {}, step === null ? "final" : `step ${step}`),
      h("div", {}, score ? h("div.quiet.small", {}, `held-out loss ${number(score)}`) : null, files.length ? files.map((file) => h("a", { href: `/api/runs/${run.name}/files/adapters/${encodeURIComponent(file)}`, download: file }, file))
        : h("span.quiet", {}, "state only")),
      h("a.button", { href: `#/try?model=${encodeURIComponent(step === null ? run.name : `${run.name}@${step}`)}` }, "Try"));
  }));
}

function planned({ plan, memory: planned, log }) {
  return [
    planned && h("section.card", {}, h("h2", {}, "Planned memory"), memory(planned)),
    plan && h("details", {}, h("summary", {}, "Every setting of the run"), h("pre.card", {}, plan)),
    log && h("details", {}, h("summary", {}, "What the run has printed last"), h("pre.card", {}, log)),
  ];
}
