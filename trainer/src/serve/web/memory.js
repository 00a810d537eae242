// A picture of the memory that a plan forecasts.

import { bytes, h } from "./dom.js";

function tank(name, needed, room) {
  const share = room ? Math.min(100, (100 * needed) / room) : 100;
  const text = room ? `${bytes(needed)} of ${bytes(room)}` : bytes(needed);
  return h("div", {},
    h("div.small", {}, h("span", {}, `${name}: `), h("span.quiet", {}, text)),
    h("div", { className: `tank${room && needed > room ? " over" : ""}` }, h("i", { style: `width:${share}%` })));
}

/** The memory of a step on each device, and of everything else that the run does. */
export function memory(forecast) {
  const stages = forecast.stages.map((stage) =>
    tank(`training step on ${stage.device}, blocks ${stage.blocks[0]} to ${stage.blocks[1] - 1}`, stage.needed, stage.room));
  const phases = (forecast.phases ?? []).flatMap((phase) =>
    phase.devices.map((device) => tank(`${phase.phase.replaceAll("-", " ")} on ${device.device}`, device.needed, device.room)));
  return h("div.memory", {}, stages, phases, forecast.clips && h("p.quiet.small", {}, `Clips: ${forecast.clips}.`));
}
