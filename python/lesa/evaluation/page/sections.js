  const line = (spots) => spots.map((s, i) => `${i ? "L" : "M"}${s.x.toFixed(1)},${s.y.toFixed(1)}`).join("");
  // What is drawn last lies on top.
  const order = () => Object.keys(contenders).filter((c) => !state.hidden.has(c)).sort((a, b) => isOurs(a) - isOurs(b));
  const budget = () => page.budgets[state.budget];

  function curves(id, xOf, xLabel, xDigits) {
    chart(id, (width) => Math.min(380, Math.max(290, width * 0.72)), (svg, width, height) => {
      const metric = page.metrics[state.metric];
      const box = {left: 52, right: width - 12, top: 28, bottom: height - 46};
      const usable = page.runs.filter((r) => r.contender in contenders && !state.hidden.has(r.contender)
        && r[metric.key] !== null && xOf(r) !== null && (!metric.log || r[metric.key] > 0));
      const best = usable.filter((r) => r.is_best);
      const label = `${metric.name} over ${xLabel}`;
      if (!best.length) {
        draw(svg, "text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "Nothing to show");
        return {rows: [], label};
      }
      const xs = best.map(xOf), ys = best.map((r) => r[metric.key]);
      const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
      const padX = (x1 - x0) * 0.05 || 1, padY = (y1 - y0) * 0.06 || Math.abs(y1) * 0.01 || 1;
      const x = axis(Math.max(0, x0 - padX), x1 + padX, box.left, box.right, false, width / 80);
      const y = metric.log ? axis(y0 / 1.15, y1 * 1.15, box.bottom, box.top, true)
        : axis(y0 - padY, y1 + padY, box.bottom, box.top, false, height / 60);
      frame(svg, x, y, box, xLabel, metric.name);
      const inside = (s) => s.x >= box.left && s.x <= box.right && s.y >= box.top - 4 && s.y <= box.bottom + 4;
      const spot = (run) => ({x: x.to(xOf(run)), y: y.to(run[metric.key]), run, title: run.label, lines: [
        `${metric.name} ${show(run[metric.key], metric.digits)}`,
        `${show(run.step_equivalents, 1)} step equivalents, ${show(run.seconds)} s`,
        ...(run.setting ? [run.setting] : [])]});
      for (const run of usable.filter((r) => !r.is_best)) {
        const s = spot(run);
        if (inside(s)) draw(svg, "circle", {cx: s.x, cy: s.y, r: 1.8, fill: paint(run.contender), opacity: 0.4});
      }
      const rows = [];
      for (const contender of order()) {
        const spots = best.filter((r) => r.contender === contender).map(spot).sort((a, b) => a.x - b.x);
        if (!spots.length) continue;
        const ours = isOurs(contender);
        draw(svg, "path", {d: line(spots), fill: "none", stroke: paint(contender), "stroke-width": ours ? 3.5 : 1.6,
          "stroke-linejoin": "round", opacity: ours ? 1 : 0.8});
        for (const s of spots) marker(svg, contender, s.x, s.y, ours ? 5 : 3.6);
        const chosen = budget() && spots.find((s) => s.run.name === budget().ours);
        if (chosen) draw(svg, "circle", {cx: chosen.x, cy: chosen.y, r: 10, fill: "none", stroke: paint(contender),
          "stroke-width": 1.5, opacity: 0.6});
        rows.unshift(spots);
      }
      return {rows, label};
    });
  }

  function legend() {
    const holder = find("#legend");
    for (const contender of Object.keys(contenders)) {
      const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const [name, value] of [["width", 26], ["height", 14], ["aria-hidden", "true"]]) icon.setAttribute(name,
        value);
      draw(icon, "path", {d: "M1,7H25", stroke: paint(contender), "stroke-width": isOurs(contender) ? 3.5 : 1.6});
      marker(icon, contender, 13, 7, isOurs(contender) ? 5 : 3.6);
      const button = make("button", {type: "button", "aria-pressed": "true"}, icon, contenders[contender].label);
      button.addEventListener("click", () => {
        const shown = state.hidden.has(contender);
        shown ? state.hidden.delete(contender) : state.hidden.add(contender);
        button.setAttribute("aria-pressed", String(shown));
        redraw();
      });
      holder.append(button);
    }
  }

  // The stages of the predictor as bands; `edges` are where they begin and end.
  function bands(svg, edges, top, bottom) {
    const names = edges.length === 4 ? ["high noise", "middle", "low noise"] : edges.slice(1).map((_,
      i) => `stage ${i + 1}`);
    edges.slice(1).forEach((right, i) => {
      const left = edges[i];
      if (i % 2 === 0) draw(svg, "rect", {class: "band", x: left, y: top, width: Math.max(0, right - left),
        height: bottom - top});
      if (right - left > 62) draw(svg, "text", {x: (left + right) / 2, y: top + 15, "text-anchor": "middle"}, names[i]);
    });
  }

  function errors() {
    chart("errors", (width) => width < 500 ? 320 : 360, (svg, width, height) => {
      const label = "Relative error of the latents after each step";
      const box = {left: 56, right: width - 10, top: 28, bottom: height - 46};
      const names = budget() ? [...budget().peers].reverse().concat(budget().ours) : [];
      const shown = names.map((name) => byName.get(name)).filter((r) => r.step_errors.some((e) => e > 0)
        && !state.hidden.has(r.contender));
      const values = shown.flatMap((r) => r.step_errors).filter((e) => e > 0);
      if (!values.length) {
        draw(svg, "text", {x: width / 2, y: height / 2, "text-anchor": "middle"},
          "No run here has steps like the reference's");
        return {rows: [], label};
      }
      const steps = Math.max(...shown.map((r) => r.step_errors.length));
      const x = axis(0, steps - 1, box.left + 6, box.right - 6, false, width / 90);
      const y = axis(Math.min(...values) / 1.3, Math.max(...values) * 1.3, box.bottom, box.top + 22, true);
      if (page.sigmas.length === steps && page.stage_bounds.length) {
        // A step is in the stage numbered by how many bounds are at or above its noise level.
        const cuts = page.stage_bounds.map((bound) => page.sigmas.filter((s) => s > bound).length - 0.5);
        bands(svg, [box.left, ...cuts.map((cut) => x.to(Math.max(0, cut))), box.right], box.top, box.bottom);
      }
      frame(svg, x, y, box, "step", "relative error");
      const rows = [];
      for (const run of shown) {
        const ours = run.name === budget().ours, computed = new Set(run.steps);
        const spots = run.step_errors.map((error, step) => error > 0 && {x: x.to(step), y: y.to(error), step,
          title: run.label, lines: [`step ${step}${computed.has(step) ? ", computed" : ""}`,
            `relative error ${error.toPrecision(3)}`]}).filter(Boolean);
        draw(svg, "path", {d: line(spots), fill: "none", stroke: paint(run.contender), "stroke-width": ours ? 3.2 : 1.5,
          "stroke-linejoin": "round", opacity: ours ? 1 : 0.75});
        if (ours) {
          spots.filter((s) => computed.has(s.step)).forEach((s) => marker(svg, run.contender, s.x, s.y, 4.2));
          for (const step of computed)
            draw(svg, "path", {d: `M${x.to(step)},${box.bottom}v-10`, stroke: paint(run.contender), "stroke-width": 3});
        } else {
          const last = spots[spots.length - 1];
          marker(svg, run.contender, last.x, last.y, 3.6);
        }
        rows.unshift(spots);
      }
      return {rows, label};
    });
  }

  function schedule() {
    const listed = () => [...page.budgets.map((b) => b.ours), ...(budget() ? budget().peers : [])]
      .map((name) => byName.get(name))
      .filter((r) => r.steps.length && r.num_inference_steps === page.sigmas.length && !state.hidden.has(r.contender));
    const rowHeight = 46;
    chart("schedule", () => 34 + listed().length * rowHeight + 44, (svg, width, height) => {
      const box = {left: 8, right: width - 8, top: 8, bottom: height - 44};
      const high = Math.max(...page.sigmas, 1), low = Math.min(...page.sigmas, 0);
      const x = axis(high, low, box.left + 6, box.right - 6, false, 1);
      const edges = page.stage_bounds.map((bound) => x.to(bound));
      if (edges.length) bands(svg, [box.left, ...edges, box.right], box.top, box.bottom);
      const rows = listed().map((run, i) => {
        const base = box.top + 26 + (i + 1) * rowHeight - 12, computed = new Set(run.steps);
        const chosen = budget() && run.name === budget().ours, color = paint(run.contender);
        draw(svg, "text", {x: box.left + 6, y: base - 24, class: chosen ? "strong" : ""},
          `${run.short}: ${run.steps.length} of ${run.num_inference_steps} steps`);
        page.sigmas.forEach((sigma, step) => {
          if (!computed.has(step))
            draw(svg, "path", {d: `M${x.to(sigma)},${base}v-5`, stroke: "var(--soft)", "stroke-width": 1,
              opacity: 0.55});
        });
        return run.steps.map((step) => {
          const at = x.to(page.sigmas[step]);
          draw(svg, "path", {d: `M${at},${base}v-16`, stroke: color, "stroke-width": chosen ? 4 : 2.4,
            "stroke-linecap": "round",
            opacity: chosen || !isOurs(run.contender) ? 1 : 0.7});
          return {x: at, y: base - 8, title: run.label, lines: [`step ${step}, sigma ${page.sigmas[step].toFixed(3)}`]};
        });
      });
      for (const value of niceTicks(low, high, Math.min(10, width / 70)))
        draw(svg, "text", {x: x.to(value), y: box.bottom + 18, "text-anchor": "middle"}, tickText(value));
      draw(svg, "text", {x: box.right, y: box.bottom + 37, "text-anchor": "end"},
        "sigma, the noise level; time goes to the right");
      return {rows, label: "Computed steps on the axis of noise levels"};
    });
  }

  function pictures() {
    const compare = find("#compare");
    if (!compare) return;
    const [under, over] = all("img", compare), range = find("input", compare), map = find("#map img");
    const set = (image, source, alt) => { image.src = source; image.alt = alt; image.classList.toggle("pixelated",
      page.pixelated); };
    document.documentElement.style.setProperty("--aspect", page.aspect);

    const split = () => {
      compare.style.setProperty("--split", `${range.value}%`);
      range.setAttribute("aria-valuetext", `${range.value} % reference`);
    };
    range.addEventListener("input", split);
    const follow = (event) => {
      const box = compare.getBoundingClientRect();
      range.value = Math.round((event.clientX - box.left) / box.width * 100);
      split();
    };
    compare.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault();
      compare.setPointerCapture(event.pointerId);
      range.focus({preventScroll: true, focusVisible: false});
      follow(event);
    });
    compare.addEventListener("pointermove", (event) => { if (compare.hasPointerCapture(event.pointerId)) follow(event);
      });
    split();

    const names = () => (budget() ? [budget().ours,
      ...budget().peers] : page.pictured).filter((n) => n in page.pictures);
    const of = (run, sample) => page.pictures[run.name][sample];

    function fill() {
      const shown = names();
      // The same contender stays chosen when the budget changes.
      if (!shown.includes(state.run)) {
        const before = byName.get(state.run);
        state.run = shown.find((n) => before && byName.get(n).contender === before.contender) || shown[0] || null;
      }
      if (!state.run) return;
      const strip = find("#strip"), focused = strip.contains(document.activeElement);
      strip.replaceChildren(...shown.map((name) => {
        const run = byName.get(name), image = make("img", {alt: ""});
        set(image, of(run, state.sample).picture, "");
        const quality = run.per_sample_psnr[state.sample];
        const button = make("button", {type: "button", "aria-pressed": String(name === state.run)}, image, make("b",
          {}, run.short),
          make("small", {}, `${show(run.step_equivalents, 1)} steps`),
          make("small", {}, quality === null || quality === undefined ? "no difference" : `${show(quality, 1)} dB`));
        button.addEventListener("click", () => { state.run = name; fill(); });
        return button;
      }));
      if (focused) find('[aria-pressed="true"]', strip).focus();
      const absent = budget() ? budget().absent : [];
      find("#absent").textContent = absent.length
        ? `Cannot reach this budget of step equivalents: ${absent.join(", ")}.` : "";
      const run = byName.get(state.run), shownOne = of(run, state.sample);
      set(under, page.reference_pictures[state.sample], `Sample ${state.sample + 1}, all steps computed`);
      set(over, shownOne.picture, `Sample ${state.sample + 1}, ${run.label}`);
      const differs = `differs by ${(100 * shownOne.mean).toFixed(2)} % of the range on average`;
      set(map, shownOne.error, `Where ${run.label} differs; it ${differs}`);
      find(".tag.right", compare).textContent = run.label;
      const pace = `${show(run.seconds)} s, ${show(run.speedup, 1)}× as fast`;
      const costs = `${show(run.step_equivalents, 1)} step equivalents, ${pace}`;
      find("#compare-caption").textContent = `${run.label}: ${costs}. This sample ${differs}.`;
    }

    page.reference_pictures.forEach((source, sample) => {
      const input = make("input", {type: "radio", name: "sample", "aria-label": `Sample ${sample + 1}`});
      input.checked = sample === 0;
      input.addEventListener("change", () => { state.sample = sample; fill(); });
      const image = make("img", {alt: ""});
      set(image, source, "");
      find("#samples").append(make("label", {}, input, image));
    });
    redraws.push(fill);
  }

  function table() {
    const heads = all("#figures thead th"), body = find("#figures tbody");
    heads.forEach((head, column) => find("button", head).addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");  // what is missing stays below
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      });
      body.append(...rows);
    }));
    find("#all").addEventListener("change", (event) =>
      all("tr[data-other]").forEach((row) => { row.hidden = !event.target.checked; }));
  }

  all('input[name="budget"]').forEach((input) => input.addEventListener("change", () => { state.budget = +input.value;
    redraw(); }));
  all('input[name="metric"]').forEach((input) => input.addEventListener("change", () => { state.metric = +input.value;
    redraw(); }));
  legend();
  pictures();
  curves("over-steps", (run) => run.step_equivalents, "step equivalents");
  curves("over-seconds", (run) => run.pace, page.timed_apart ? "seconds, at the latest pace" : "seconds");
  errors();
  schedule();
  table();
  redraws.push(() => all("div[data-budget]").forEach((part) => {
    part.hidden = +part.dataset.budget !== state.budget;
  }));
  redraw();
})();
