// The page: which view is shown, and the lists that the server sends whenever they change.

import { fill, h } from "./dom.js";
import * as runs from "./runs.js";
import * as newRun from "./new_run.js";
import * as tryIt from "./try.js";
import * as data from "./data.js";

/** What the server has last sent, and who wants to know when it changes. */
export const state = { runs: [], videos: [], listeners: new Set(), isKnown: false };

const views = [
  [/^#\/runs\/new$/, newRun.show],
  [/^#\/runs\/([\w.-]+)$/, runs.showOne],
  [/^#\/runs$/, runs.showAll],
  [/^#\/try(?:\?(.*))?$/, tryIt.show],
  [/^#\/data(?:\/(\d+))?$/, data.show],
];

let leave = () => {};

function route() {
  leave();
  const page = document.getElementById("page");
  const hash = location.hash || "#/runs";
  const found = views.map(([pattern, show]) => [hash.match(pattern), show]).find(([match]) => match);
  if (!found) {
    location.hash = "#/runs";
    return;
  }
  const [match, show] = found;
  fill(page);
  window.scrollTo(0, 0);
  leave = show(page, ...match.slice(1)) ?? (() => {});
  for (const link of document.querySelectorAll("nav a")) {
    if (hash.startsWith(link.getAttribute("href"))) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/** Calls `listener` now and whenever the lists change; the way to end that. */
export function watch(listener) {
  state.listeners.add(listener);
  if (state.isKnown) listener(state);
  return () => state.listeners.delete(listener);
}

function listen() {
  const connection = document.getElementById("connection");
  const source = new EventSource("/api/events");
  source.addEventListener("state", (event) => {
    const news = JSON.parse(event.data);
    if (!news.runs) return;
    Object.assign(state, news, { isKnown: true });
    const running = state.runs.filter((run) => run.status === "running").length;
    const waiting = state.videos.filter((job) => job.status === "queued" || job.status === "in_progress").length;
    const words = [running && `${running} training`, waiting && `${waiting} clip${waiting > 1 ? "s" : ""} to make`];
    connection.textContent = words.filter(Boolean).join(", ");
    for (const listener of [...state.listeners]) listener(state);
  });
  source.onerror = () => (connection.textContent = "not connected; trying again");
}

// 1, 2 and 3 change the page, where nothing is being typed.
addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, textarea, select") || document.querySelector("dialog[open]");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const to = { 1: "#/runs", 2: "#/try", 3: "#/data", n: "#/runs/new" }[event.key];
  if (to) location.hash = to;
});

addEventListener("hashchange", route);
route();
listen();
