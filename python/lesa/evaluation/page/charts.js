"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const state = {budget: page.chosen, metric: 0, sample: 0, run: null, hidden: new Set()};
  const byName = new Map(page.runs.map((run) => [run.name, run]));
  const contenders = page.contenders;
  const redraws = [];
  const redraw = () => redraws.forEach((draw) => draw());
  const show = (value, digits = 2) => value === null || value === undefined ? "–" : value.toFixed(digits);

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  function draw(parent, tag, attributes = {}, text = null) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== null) node.textContent = text;
    parent.append(node);
    return node;
  }

  // Each contender has a colour and, for readers who cannot distinguish colours, a shape.
  const shapes = [
    (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
    (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
    (r) => `M0,${-1.3 * r}L${1.2 * r},${r}L${-1.2 * r},${r}z`,
    (r) => `M0,${-1.4 * r}L${1.4 * r},0L0,${1.4 * r}L${-1.4 * r},0z`,
    (r) => `M0,${1.3 * r}L${1.2 * r},${-r}L${-1.2 * r},${-r}z`,
    (r) => `M${-r},${-r}L${r},${r}M${r},${-r}L${-r},${r}`,
    (r) => `M0,${-1.3 * r}V${1.3 * r}M${-1.3 * r},0H${1.3 * r}`,
  ];
  const paint = (contender) => `var(${contenders[contender].color})`;
  const isOurs = (contender) => contenders[contender].ours;

  function marker(parent, contender, x, y, radius, extra = {}) {
    const path = shapes[contenders[contender].shape % shapes.length](radius);
    return draw(parent, "path", {d: path, transform: `translate(${x},${y})`, fill: paint(contender),
      stroke: paint(contender), "stroke-width": 1.5, ...extra});
  }

  function niceTicks(low, high, count) {
    const raw = (high - low) / Math.max(1, count) || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9;
      i++) ticks.push(+(i * step).toPrecision(12));
    return ticks;
  }

  function axis(low, high, from, to, log, count) {
    if (log) {
      [low, high] = [Math.log10(low), Math.log10(high)];
      if (high - low < 1e-6) [low, high] = [low - 0.5, high + 0.5];
      let ticks = [];
      for (let e = Math.floor(low); e <= high; e++)
        for (const m of high - low < 1.2 ? [1, 2, 5] : [1]) {
          const at = Math.log10(m) + e;
          if (at >= low - 1e-9 && at <= high + 1e-9) ticks.push(m * 10 ** e);
        }
      return {to: (v) => from + (Math.log10(v) - low) / (high - low) * (to - from), ticks};
    }
    if (Math.abs(high - low) < 1e-12) [low, high] = [low - 1, high + 1];
    return {to: (v) => from + (v - low) / (high - low) * (to - from), ticks: niceTicks(low, high, count)};
  }

  const tickText = (value) => Math.abs(value) >= 1e-3
    || value === 0 ? String(+value.toPrecision(6)) : value.toExponential(0);

  // A chart is one stop of the Tab key; arrow keys walk its points, and a pointer finds the nearest.
  function interactive(holder, svg, rows, label) {
    let at = null;
    const tip = make("div", {class: "tip", role: "status"});
    holder.append(tip);
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("role", "application");
    svg.setAttribute("aria-label", `${label}. Arrow keys walk through the values.`);
    const ring = draw(svg, "circle", {r: 8, fill: "none", stroke: "var(--ink)", "stroke-width": 2,
      visibility: "hidden"});

    function point(next) {
      at = next;
      ring.setAttribute("visibility", at ? "visible" : "hidden");
      tip.replaceChildren();
      if (!at) return;
      const spot = rows[at[0]][at[1]];
      ring.setAttribute("cx", spot.x);
      ring.setAttribute("cy", spot.y);
      tip.append(make("b", {}, spot.title), ...spot.lines.flatMap((line, i) => i ? [make("br"), line] : [line]));
      const width = tip.offsetWidth, height = tip.offsetHeight;
      const left = Math.min(Math.max(0, spot.x - width / 2), Math.max(0, holder.clientWidth - width));
      tip.style.left = `${left}px`;
      tip.style.top = `${spot.y - height - 14 < 0 ? spot.y + 14 : spot.y - height - 14}px`;
    }

    function nearest(row, x) {
      let best = 0;
      rows[row].forEach((spot, i) => { if (Math.abs(spot.x - x) < Math.abs(rows[row][best].x - x)) best = i; });
      return best;
    }

    svg.addEventListener("keydown", (event) => {
      const moves = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
      if (event.key === "Escape") return point(null);
      if (!(event.key in moves) || !rows.length) return;
      event.preventDefault();
      if (!at) return point([0, 0]);
      const [down, right] = moves[event.key];
      const row = Math.min(Math.max(0, at[0] + down), rows.length - 1);
      const column = down ? nearest(row, rows[at[0]][at[1]].x) : at[1] + right;
      point([row, Math.min(Math.max(0, column), rows[row].length - 1)]);
    });
    svg.addEventListener("focus", () => { if (!at && rows.length && svg.matches(":focus-visible")) point([0, 0]); });
    svg.addEventListener("blur", () => point(null));
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      let best = null, distance = 28;
      rows.forEach((row, i) => row.forEach((spot, j) => {
        const d = Math.hypot(spot.x - x, spot.y - y);
        if (d < distance) [best, distance] = [[i, j], d];
      }));
      point(best);
    });
    svg.addEventListener("pointerleave", () => { if (document.activeElement !== svg) point(null); });
  }

  function chart(id, height, render) {
    const holder = document.getElementById(id);
    if (!holder) return;
    let width = 0;
    const again = () => {
      width = holder.clientWidth;
      const focused = holder.contains(document.activeElement);
      holder.replaceChildren();
      const tall = typeof height === "function" ? height(width) : height;
      const svg = draw(holder, "svg", {width, height: tall, viewBox: `0 0 ${width} ${tall}`});
      const {rows, label} = render(svg, width, tall);
      interactive(holder, svg, rows, label);
      if (focused) svg.focus();
    };
    redraws.push(again);
    new ResizeObserver(() => { if (holder.clientWidth !== width) again(); }).observe(holder);
  }

  function frame(svg, x, y, box, xLabel, yLabel) {
    for (const value of y.ticks) {
      const at = y.to(value);
      draw(svg, "line", {class: "grid", x1: box.left, x2: box.right, y1: at, y2: at});
      draw(svg, "text", {x: box.left - 8, y: at + 4, "text-anchor": "end"}, tickText(value));
    }
    for (const value of x.ticks)
      draw(svg, "text", {x: x.to(value), y: box.bottom + 18, "text-anchor": "middle"}, tickText(value));
    draw(svg, "text", {x: box.right, y: box.bottom + 38, "text-anchor": "end"}, xLabel);
    draw(svg, "text", {x: 2, y: 12}, yLabel);
  }

