// Small helpers: elements, requests, numbers in words.

/** An element: h("a.button", { href: "#" }, "text", child). Properties that begin with "on" are listeners. */
export function h(kind, properties, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list" && name !== "form") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replaces what is in `element`. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
}

/** Asks the server; the answer as JSON. Throws an Error with the server's words. */
export async function ask(path, { method = "GET", body } = {}) {
  const options = { method, headers: {} };
  if (body instanceof FormData) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error?.message ?? `the server answers ${response.status}`);
  return answer;
}

let toastTimer;
/** Says something in passing. */
export function say(text) {
  const toast = document.getElementById("toast");
  toast.textContent = text;
  toast.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (toast.hidden = true), 3000 + 40 * text.length);
}

/** A button that does something on the server, and says what goes wrong. */
export function action(text, work, kind = "button") {
  const button = h(kind, {
    type: "button",
    onclick: async () => {
      button.disabled = true;
      try {
        await work();
      } catch (error) {
        say(error.message);
      } finally {
        button.disabled = false;
      }
    },
  }, text);
  return button;
}

/** A number with as many digits as say something. */
export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  return Number(value).toPrecision(digits).replace(/\.?0+$/, "").replace(/\.?0+e/, "e");
}

/** Seconds in words. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${number(seconds, 2)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  const hours = Math.floor(seconds / 3600);
  return hours < 48 ? `${hours} h ${Math.round((seconds % 3600) / 60)} min` : `${Math.round(hours / 24)} days`;
}

/** Bytes in words. */
export function bytes(count) {
  if (count === null || count === undefined) return "–";
  return count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(1)} GiB` : `${Math.round(count / 2 ** 20)} MiB`;
}

/** What a status is called. */
export const statusOf = (status) => h(`span.status.${status}`, {}, status.replace("_", " "));

/** A labelled field. */
export function field(label, input, hint) {
  const id = input.id || `field-${Math.random().toString(36).slice(2)}`;
  input.id = id;
  return h("div", {}, h("label", { htmlFor: id }, label), input, hint ? h("p.quiet.small", {}, hint) : null);
}
