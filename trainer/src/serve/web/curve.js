// The loss curve, drawn on a canvas: thin raw values, a smoothed line, the held-out loss as dots.

const PADDING = { left: 52, right: 12, top: 10, bottom: 26 };

/** Exponential mean with the bias of its start taken out. */
export function smoothed(values, weight) {
  let sum = 0;
  let norm = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(at);
  return found;
}

/** Draws series of { points: [[x, y]], colour, width, alpha, dots } over the same axes. */
export function draw(canvas, series) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.clearRect(0, 0, width, height);
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(name).trim();
  const points = series.flatMap((one) => one.points);
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = colour("--quiet");
  if (!points.length) {
    pen.fillText("No steps yet.", PADDING.left, height / 2);
    return;
  }
  const [x0, x1] = [Math.min(...ends(points, 0)), Math.max(...ends(points, 0), 1)];
  // A single wild step does not flatten the rest.
  const sorted = points.map((point) => point[1]).sort((a, b) => a - b);
  const low = sorted[0];
  const most = sorted.length > 400 ? Math.floor((sorted.length - 1) * 0.995) : sorted.length - 1;
  const high = Math.max(sorted[most], low + 1e-9);
  const margin = (high - low) * 0.06;
  const x = (value) => PADDING.left + ((value - x0) / (x1 - x0 || 1)) * (width - PADDING.left - PADDING.right);
  const y = (value) =>
    height - PADDING.bottom - ((value - low + margin) / (high - low + 2 * margin)) * (height - PADDING.top - PADDING.bottom);
  pen.strokeStyle = colour("--line");
  pen.lineWidth = 1;
  pen.textAlign = "right";
  for (const value of ticks(low, high, 4)) {
    pen.beginPath();
    pen.moveTo(PADDING.left, y(value));
    pen.lineTo(width - PADDING.right, y(value));
    pen.stroke();
    pen.fillText(Number(value.toPrecision(3)), PADDING.left - 6, y(value) + 4);
  }
  pen.textAlign = "center";
  for (const value of ticks(x0, x1, Math.max(4, width / 110))) pen.fillText(Math.round(value), x(value), height - 8);
  pen.save();
  pen.beginPath();
  pen.rect(PADDING.left, PADDING.top - 6, width - PADDING.left - PADDING.right + 6, height - PADDING.top - PADDING.bottom + 12);
  pen.clip();
  for (const one of series) {
    pen.strokeStyle = pen.fillStyle = colour(one.colour);
    pen.globalAlpha = one.alpha ?? 1;
    pen.lineWidth = one.width ?? 1.5;
    pen.lineJoin = "round";
    pen.beginPath();
    one.points.forEach(([a, b], index) => (index ? pen.lineTo(x(a), y(b)) : pen.moveTo(x(a), y(b))));
    pen.stroke();
    if (one.dots) {
      for (const [a, b] of one.points) {
        pen.beginPath();
        pen.arc(x(a), y(b), 3.5, 0, 7);
        pen.fill();
      }
    }
  }
  pen.restore();
}

function ends(points, axis) {
  return points.reduce(([least, most], point) => [Math.min(least, point[axis]), Math.max(most, point[axis])], [Infinity, -Infinity]);
}
