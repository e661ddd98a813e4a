// A line chart of the last minutes, drawn with SVG.

const SECONDS = 300;
const HEIGHT = 84;
const FOOT = 14; // where the axis is written
const SPACE = "http://www.w3.org/2000/svg";

export function node(name, attributes, text) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** The next of 1, 2, 5, 10, 20 ... that is not below the value. */
export function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((bound) => bound >= value);
}

export class Chart {
  /** `series` has a class of the style sheet for each line; `most` fixes the upper end. */
  constructor(svg, series, most = null) {
    this.svg = svg;
    this.series = series;
    this.most = most;
    this.points = []; // [seconds, values, whether the devices were being replaced]
  }

  add(seconds, values, replaced) {
    this.points.push([seconds, values, replaced]);
    while (this.points[0][0] < seconds - SECONDS) this.points.shift();
    this.draw(seconds);
  }

  draw(now) {
    const width = Math.max(this.svg.clientWidth, 50);
    const bottom = HEIGHT - FOOT;
    const largest = Math.max(0, ...this.points.flatMap((point) => point[1]));
    const top = this.most ?? ceiling(largest);
    const x = (seconds) => (width * (1 - (now - seconds) / SECONDS)).toFixed(1);
    const y = (value) => (bottom - (bottom - 12) * Math.min(1, value / top)).toFixed(1);
    const drawn = [];
    this.points.forEach(([seconds, , replaced], index) => {
      const next = this.points[index + 1]?.[0] ?? now;
      if (replaced) {
        const thick = Math.max(1.5, x(next) - x(seconds));
        drawn.push(node("rect", { x: x(seconds), y: 12, width: thick, height: bottom - 12 }));
      }
    });
    drawn.push(node("line", { x1: 0, x2: width, y1: bottom, y2: bottom }));
    drawn.push(node("line", { x1: 0, x2: width, y1: 12, y2: 12, "stroke-dasharray": "2 4" }));
    this.series.forEach((name, number) => {
      const line = this.points.map(([seconds, values]) => `${x(seconds)} ${y(values[number])}`).join("L");
      if (!line) return;
      if (number === 0) {
        const [first] = this.points;
        drawn.push(node("path", { class: "area", d: `M${x(first[0])} ${bottom}L${line}L${x(now)} ${bottom}Z` }));
      }
      drawn.push(node("path", { class: name, d: `M${line}` }));
    });
    drawn.push(node("text", { x: 0, y: 9 }, `${top.toLocaleString()}${this.most ? " %" : ""}`));
    drawn.push(node("text", { x: 0, y: HEIGHT - 2 }, "5 min ago"));
    drawn.push(node("text", { x: width, y: HEIGHT - 2, "text-anchor": "end" }, "now"));
    this.svg.replaceChildren(...drawn);
  }
}
