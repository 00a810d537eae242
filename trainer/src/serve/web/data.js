// Data: clips with their captions, to look at, to edit and to leave out.

import { action, ask, fill, h, say } from "./dom.js";
import { thumbnail } from "./clips.js";

/** The page. */
export function show(page, index) {
  const choice = h("select", { id: "data-folder", ariaLabel: "Folder of clips", style: "max-width:22rem", onchange: () => (location.hash = `#/data/${choice.value}`) });
  const warnings = h("div");
  const note = h("p.quiet.small", { style: "margin:-.5rem 0 1rem" });
  const gallery = h("div.gallery", { style: "grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr))" });
  page.append(h("div.bar", {}, h("h1", {}, "Data"), choice), note, warnings, gallery);
  load().catch((error) => say(error.message));

  async function load() {
    const { datasets } = await ask("/api/datasets");
    if (!datasets.length) {
      choice.hidden = true;
      fill(gallery, h("p.empty", {}, "No clips. Start the server with --data FOLDER for a folder of clips."));
      return;
    }
    fill(choice, datasets.map((one) => h("option", { value: one.index }, `${one.name} (${one.clips} clips)`)));
    const current = datasets[Number(index ?? 0)] ?? datasets[0];
    choice.value = current.index;
    const { clips, cut, warnings: found, recipe } = await ask(`/api/datasets/${current.index}/clips`);
    fill(note, recipe ? `Sizes and lengths are those of ${recipe}.` : "Sizes and lengths are the defaults: no recipe trains on this folder yet.");
    fill(warnings, found.map((text) => h("p.message.note", {}, text)));
    const items = clips.map((clip) => ({ url: `/api/datasets/${current.index}/files/${encodeURIComponent(clip.name)}`, title: clip.caption || clip.name }));
    fill(gallery, clips.map((clip, at) => card(current.index, clip, cut[clip.name] ?? [], items, at, load)));
  }
}

function card(dataset, clip, cut, items, at, reload) {
  const caption = h("textarea", { value: clip.caption ?? "", rows: 3, ariaLabel: `Caption of ${clip.name}` });
  const state = h("span.quiet.small", { role: "status" });
  let saved = caption.value;
  const save = async () => {
    if (caption.value === saved) return;
    try {
      await ask(`/api/datasets/${dataset}/caption`, { method: "POST", body: { clip: clip.name, caption: caption.value } });
      saved = caption.value;
      state.textContent = "saved";
    } catch (error) {
      state.textContent = error.message;
    }
  };
  caption.onchange = save;
  caption.oninput = () => (state.textContent = caption.value === saved ? "" : "not saved yet");
  caption.onkeydown = (event) => {
    if (event.key === "s" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      save();
    }
  };
  const move = action(clip.excluded ? "Include" : "Exclude", async () => {
    await ask(`/api/datasets/${dataset}/exclude`, { method: "POST", body: { clip: clip.name, excluded: !clip.excluded } });
    await reload();
  }, "button.plain");
  const words = clip.excluded ? "left out of training" : cut.length ? `${cut[0]}${cut.length > 1 ? ` and ${cut.length - 1} more` : ""}` : "";
  const figure = h("figure.card", { style: "margin:0" }, thumbnail(items, at),
    h("figcaption", {}, h("div", { style: "overflow-wrap:anywhere" }, clip.name), h("div.quiet.small", {}, words), caption,
      h("div.actions", { style: "align-items:center" }, move, state)));
  if (clip.excluded) figure.classList.add("excluded");
  return figure;
}
