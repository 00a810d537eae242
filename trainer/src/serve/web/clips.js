// Clips: players that run in step, a large view with keys, a before/after slider.

import { fill, h } from "./dom.js";

/** A player or a picture for the file at `url`. */
export function film(url, { controls = false } = {}) {
  if (/\.(gif|webp|png|jpe?g)$/i.test(url)) return h("img", { src: url, alt: "", loading: "lazy" });
  return h("video", { src: url, muted: true, loop: true, playsInline: true, autoplay: !controls, controls, preload: "auto" });
}

/** Keeps the players in `root` in step with the first one; the way to end that. */
export function inStep(root) {
  const timer = setInterval(() => {
    const players = [...root.querySelectorAll("video")].filter((player) => player.readyState >= 2);
    const [first, ...rest] = players;
    if (!first || document.hidden) return;
    if (first.paused) first.play().catch(() => {});
    for (const player of rest) {
      if (player.paused) player.play().catch(() => {});
      const apart = Math.abs(player.currentTime - first.currentTime);
      // At the seam one of them has begun anew.
      const isApart = apart > 0.12 && Math.abs(apart - first.duration) > 0.12;
      if (isApart && first.currentTime < player.duration) player.currentTime = first.currentTime;
    }
  }, 400);
  return () => clearInterval(timer);
}

/** Shows `items` of { url, title } large, from `index` on; arrows go through them. */
export function view(items, index) {
  const dialog = document.getElementById("viewer");
  const show = (to) => {
    index = (to + items.length) % items.length;
    const { url, title } = items[index];
    fill(
      dialog,
      film(url, { controls: true }),
      h("p", {}, title),
      h("div.bar", {},
        items.length > 1 && h("button", { type: "button", onclick: () => show(index - 1) }, "Previous"),
        items.length > 1 && h("button", { type: "button", onclick: () => show(index + 1) }, "Next"),
        h("a.button", { href: url, download: "" }, "Download"),
        h("button.primary", { type: "button", onclick: () => dialog.close() }, "Close")),
    );
    dialog.querySelector("video")?.play().catch(() => {});
  };
  dialog.onkeydown = (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by || event.target.matches("input")) return;
    event.preventDefault();
    show(index + by);
  };
  dialog.onclose = () => fill(dialog);
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  show(index);
  dialog.showModal();
}

/** Shows two clips over each other, with a slider between them. */
export function compare(before, after) {
  const dialog = document.getElementById("viewer");
  const over = h("div.over", {}, film(after.url));
  const slider = h("input", {
    type: "range", min: 0, max: 100, value: 50, ariaLabel: "Where the second clip begins",
    oninput: () => over.style.setProperty("--at", `${slider.value}%`),
  });
  const stage = h("div.slider", {}, film(before.url), over);
  fill(
    dialog,
    h("p", {}, `${before.title}  |  ${after.title}`),
    stage,
    slider,
    h("div.bar", {}, h("button.primary", { type: "button", onclick: () => dialog.close() }, "Close")),
  );
  const stop = inStep(stage);
  dialog.onkeydown = null;
  dialog.onclose = () => {
    stop();
    fill(dialog);
  };
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.showModal();
  slider.focus();
}

/** A clip that opens large. */
export function thumbnail(items, index) {
  const { url, title } = items[index];
  return h("button.film", { type: "button", title, ariaLabel: `Show ${title}`, onclick: () => view(items, index) }, film(url));
}
