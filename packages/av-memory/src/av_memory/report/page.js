"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plot = document.getElementById("plot");
  const LEFT = 68, RIGHT = 14, TOP = 10, HEIGHT = 260, AXIS = 26, ROW = 20, BOTTOM = TOP + HEIGHT;
  const FILLS = 9, SHORTEST_VIEW_S = 1e-5;

  const sums = (differences, unit) => {
    const values = new Float64Array(differences.length);
    let sum = 0;
    differences.forEach((difference, i) => { values[i] = (sum += difference) * unit; });
    return values;
  };
  const curves = data.series.map((one) => ({ ...one, t: sums(one.t, data.tick), v: sums(one.v, data.step) }));
  const scopes = data.scopes.name.map((name, i) => ({
    name, label: data.names[name], row: data.scopes.row[i], start: data.scopes.start[i] / 1e6, wall: data.scopes.wall[i] / 1e6,
    peak: data.scopes.peak[i] * data.step, net: data.scopes.net[i] * data.step, error: data.errors[data.scopes.error[i] - 1],
  }));

  let view = [0, data.span];
  let picked = -1;
  const hidden = new Set();
  let width = 0, topMb = 1, drag = null, overlay = null;

  // Numbers

  const formatMb = (mb) => {
    const size = Math.abs(mb);
    if (size >= 10240) return `${(mb / 1024).toFixed(1)} GB`;
    if (size >= 1024) return `${(mb / 1024).toFixed(2)} GB`;
    return `${mb.toFixed(size >= 100 ? 0 : 1)} MB`;
  };
  const formatS = (s) => {
    if (s < 1e-3) return `${(s * 1e6).toFixed(0)} µs`;
    if (s < 1) return `${(s * 1e3).toFixed(s < 0.01 ? 2 : s < 0.1 ? 1 : 0)} ms`;
    if (s < 60) return `${s.toFixed(2)} s`;
    const whole = Math.round(s), two = (n) => String(n).padStart(2, "0");
    return whole < 3600 ? `${Math.floor(whole / 60)} min ${two(whole % 60)} s` : `${Math.floor(whole / 3600)} h ${two(Math.floor(whole % 3600 / 60))} min`;
  };
  const roundStep = (rough) => {
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= rough * (1 - 1e-9));
  };
  const decimals = (step) => Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const timeStep = (rough) => rough <= 5 ? roundStep(rough)
    : [10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400].find((step) => step >= rough) || 86400 * Math.ceil(rough / 86400);
  const timeLabel = (t, step) => {
    if (step >= 3600) return `${Math.round(t / 3600)} h`;
    if (step >= 60) {
      const minutes = Math.round(t / 60), hours = Math.floor(minutes / 60);
      return hours ? `${hours} h ${String(minutes % 60).padStart(2, "0")}` : `${minutes} min`;
    }
    return view[1] < 1 ? `${(t * 1e3).toFixed(decimals(step * 1e3))} ms` : `${t.toFixed(decimals(step))} s`;
  };

  // Drawing

  const make = (tag, attributes, parent, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const x = (t) => LEFT + (t - view[0]) / (view[1] - view[0]) * (width - LEFT - RIGHT);
  const y = (mb) => BOTTOM - mb / topMb * HEIGHT;
  const timeAt = (px) => view[0] + (Math.min(Math.max(px, LEFT), width - RIGHT) - LEFT) / (width - LEFT - RIGHT) * (view[1] - view[0]);
  const firstAtOrAfter = (times, t) => {
    let low = 0, high = times.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle] < t) low = middle + 1; else high = middle;
    }
    return low;
  };

  // In each column of a pixel the first, smallest, largest and last point: the same picture as of all points.
  const pathsOf = ({ t, v, gap }) => {
    const from = Math.max(firstAtOrAfter(t, view[0]) - 1, 0), to = Math.min(firstAtOrAfter(t, view[1]) + 1, t.length);
    let line = "", gaps = "", area = "", i = from, stretchX = 0, lastX = 0, lastY = 0;
    const at = (k) => [x(t[k]).toFixed(1), y(v[k]).toFixed(1)];
    while (i < to) {
      const column = Math.floor(x(t[i]));
      let low = i, high = i, end = i;
      while (end + 1 < to && Math.floor(x(t[end + 1])) === column && t[end + 1] - t[end] <= gap) {
        end += 1;
        if (v[end] < v[low]) low = end;
        if (v[end] > v[high]) high = end;
      }
      [...new Set([i, low, high, end])].sort((a, b) => a - b).forEach((k, position) => {
        const [px, py] = at(k);
        if (position === 0 && (i === from || t[i] - t[i - 1] > gap)) {
          if (i !== from) {
            area += `L${lastX} ${BOTTOM}L${stretchX} ${BOTTOM}Z`;
            gaps += `M${lastX} ${lastY}L${px} ${py}`;
          }
          stretchX = px;
          line += `M${px} ${py}h0`;
          area += `M${px} ${py}`;
        } else {
          line += `L${px} ${py}`;
          area += `L${px} ${py}`;
        }
        lastX = px;
        lastY = py;
      });
      i = end + 1;
    }
    if (area) area += `L${lastX} ${BOTTOM}L${stretchX} ${BOTTOM}Z`;
    return { line, gaps, area };
  };

  const draw = () => {
    width = Math.max(plot.clientWidth, 260);
    const shown = curves.filter((_, i) => !hidden.has(i));
    const peak = shown.reduce((most, one) => one.v.reduce((a, b) => Math.max(a, b), most), 0);
    const near = data.limits.map((limit) => limit.mb).filter((mb) => mb > 0 && mb <= 1.6 * peak);
    topMb = Math.max(peak, ...near) * 1.08 || 1;
    const right = width - RIGHT;
    const height = BOTTOM + AXIS + data.threads.length * ROW + 4;
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Memory over time" });
    const clip = make("clipPath", { id: "inside" }, svg);
    make("rect", { x: LEFT, y: 0, width: Math.max(right - LEFT, 1), height }, clip);

    const unit = topMb >= 2048 ? 1024 : 1, step = roundStep(topMb / unit / 5);
    for (let i = 0; i * step * unit <= topMb * (1 + 1e-9); i += 1) {
      const py = y(i * step * unit);
      make("path", { class: "grid", d: `M${LEFT} ${py}H${right}` }, svg);
      make("text", { class: "tick", x: LEFT - 8, y: py, dy: 4, "text-anchor": "end" }, svg,
        i ? `${(i * step).toFixed(decimals(step))} ${unit > 1 ? "GB" : "MB"}` : "0");
    }
    const span = view[1] - view[0], every = timeStep(span / Math.max(3, Math.min(9, (right - LEFT) / 85)));
    for (let i = Math.ceil(view[0] / every - 1e-9); i * every <= view[1] + every * 1e-9; i += 1) {
      const px = x(i * every);
      make("path", { class: "grid", d: `M${px} ${TOP}V${BOTTOM}` }, svg);
      make("text", { class: "tick time", x: px, y: BOTTOM + 17, "text-anchor": px > right - 20 ? "end" : "middle" }, svg, timeLabel(i * every, every));
    }

    const inside = make("g", { "clip-path": "url(#inside)" }, svg);
    if (picked >= 0) {
      let last = -1;
      for (const scope of scopes) {
        if (scope.name !== picked) continue;
        const from = x(scope.start), to = Math.max(x(scope.start + scope.wall), from + 1);
        if (to <= last || to < LEFT || from > right) continue;
        make("rect", { class: "band", x: Math.max(from, last), y: TOP, width: to - Math.max(from, last), height: HEIGHT }, inside);
        last = to;
      }
    }
    curves.map((one, i) => [one, i]).reverse().forEach(([one, i]) => {
      if (hidden.has(i)) return;
      const { line, gaps, area } = pathsOf(one);
      if (i === 0) make("path", { class: one.style.replace("curve", "area"), d: area }, inside);
      make("path", { class: one.style.replace("curve", "gap"), d: gaps }, inside);
      make("path", { class: one.style, d: line }, inside);
    });
    for (const limit of data.limits) {
      if (limit.mb > topMb) continue;
      make("path", { class: "limit", d: `M${LEFT} ${y(limit.mb)}H${right}` }, svg);
      make("text", { class: "limit-name", x: right, y: y(limit.mb), dy: -4, "text-anchor": "end" }, svg, `${limit.label} ${formatMb(limit.mb)}`);
    }
    if (!curves.length) make("text", { class: "empty", x: width / 2, y: TOP + 120, "text-anchor": "middle" }, svg, "Nothing was sampled");
    drawLanes(svg, inside, right);
    overlay = make("g", { "pointer-events": "none" }, svg);
    plot.querySelector("svg").replaceWith(svg);
  };

  const drawLanes = (svg, inside, right) => {
    const top = BOTTOM + AXIS;
    data.threads.forEach((thread, row) => {
      if (row && thread === data.threads[row - 1]) return;
      const label = make("text", { class: "tick thread", x: LEFT - 8, y: top + row * ROW + 13, "text-anchor": "end" }, svg,
        thread.length > 8 ? `${thread.slice(0, 7)}…` : thread);
      make("title", {}, label, thread);
    });
    const last = data.threads.map(() => -1);
    const lanes = make("g", { class: picked >= 0 ? "picking" : "" }, inside);
    scopes.forEach((scope, index) => {
      const from = Math.max(x(scope.start), LEFT), to = Math.min(x(scope.start + scope.wall), right);
      if (to < LEFT || from > right || (to <= last[scope.row] + 0.3 && scope.name !== picked)) return;
      last[scope.row] = to;
      const group = make("g", { class: `scope f${scope.name % FILLS}${scope.name === picked ? " picked" : ""}`, "data-index": index }, lanes);
      make("rect", { x: from, y: top + scope.row * ROW, width: Math.max(to - from - 0.5, 0.8), height: ROW - 2 }, group);
      const room = Math.floor((to - from - 8) / 6.5);
      if (room >= 3) {
        make("text", { x: from + 4, y: top + scope.row * ROW + 13 }, group, scope.label.length > room ? `${scope.label.slice(0, room - 1)}…` : scope.label);
      }
    });
  };

  // Hover

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  plot.append(tip);
  const entry = (style, name, value) => {
    const row = document.createElement("div"), mark = document.createElement("i"), strong = document.createElement("b");
    mark.className = style;
    mark.textContent = style ? "■ " : "";
    strong.textContent = value;
    row.append(mark, name ? `${name}: ` : "", strong);
    tip.append(row);
  };
  const valueAt = ({ t, v, gap }, time) => {
    const after = firstAtOrAfter(t, time), before = after - 1;
    const near = after < t.length && (before < 0 || t[after] - time < time - t[before]) ? after : before;
    return Math.abs(t[near] - time) <= Math.max(gap, (view[1] - view[0]) / 200) ? { t: t[near], v: v[near] } : null;
  };
  const hover = (px, py, target) => {
    const time = timeAt(px), at = x(time);
    overlay.replaceChildren();
    make("path", { class: "cross", d: `M${at} ${TOP}V${BOTTOM + AXIS + data.threads.length * ROW}` }, overlay);
    tip.replaceChildren();
    entry("", "", formatS(time));
    curves.forEach((one, i) => {
      if (hidden.has(i)) return;
      const found = valueAt(one, time);
      if (!found) return;
      entry(one.style.split(" ")[1], one.label, formatMb(found.v));
      if (found.t >= view[0] && found.t <= view[1]) make("circle", { class: `dot ${one.style.split(" ")[1]}`, cx: x(found.t), cy: y(found.v), r: 4 }, overlay);
    });
    const group = target && target.closest && target.closest(".scope");
    if (group) {
      const scope = scopes[group.dataset.index];
      const failed = scope.error ? `, left by ${scope.error}` : "";
      entry(`f${scope.name % FILLS}`, scope.label, `${formatS(scope.wall)}, peak ${formatMb(scope.peak)}, net ${scope.net > 0 ? "+" : ""}${formatMb(scope.net)}${failed}`);
    } else {
      const open = scopes.filter((scope) => scope.start <= time && time <= scope.start + scope.wall).sort((a, b) => a.row - b.row);
      const stacks = new Map();
      open.forEach((scope) => stacks.set(data.threads[scope.row], [...(stacks.get(data.threads[scope.row]) || []), scope]));
      [...stacks].slice(0, 6).forEach(([thread, stack]) => entry(`f${stack[stack.length - 1].name % FILLS}`, stacks.size > 1 ? thread : "in", stack.map((scope) => scope.label).join(" › ")));
      if (stacks.size > 6) entry("", "", `and ${stacks.size - 6} more threads`);
    }
    tip.hidden = false;
    const beside = at + 14 + tip.offsetWidth <= width ? at + 14 : at - 14 - tip.offsetWidth;
    tip.style.left = `${Math.max(4, beside)}px`;
    tip.style.top = `${Math.max(4, Math.min(py + 12, plot.clientHeight - tip.offsetHeight - 6))}px`;
  };
  const leave = () => { tip.hidden = true; overlay.replaceChildren(); };

  // Zoom

  const show = (from, to) => {
    const span = Math.min(Math.max(to - from, SHORTEST_VIEW_S), data.span);
    const start = Math.min(Math.max(from + (to - from - span) / 2, 0), data.span - span);
    view = [start, start + span];
    leave();
    draw();
  };
  const zoomBy = (factor, around = (view[0] + view[1]) / 2) => show(around - (around - view[0]) * factor, around + (view[1] - around) * factor);
  const moveBy = (share) => {
    const by = Math.min(Math.max(share * (view[1] - view[0]), -view[0]), data.span - view[1]);
    show(view[0] + by, view[1] + by);
  };
  const local = (event) => {
    const box = plot.getBoundingClientRect();
    return [event.clientX - box.left - plot.clientLeft, event.clientY - box.top - plot.clientTop];
  };
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    drag = local(event)[0];
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", (event) => {
    const [px, py] = local(event);
    if (drag === null || Math.abs(px - drag) < 4) {
      hover(px, py, document.elementFromPoint(event.clientX, event.clientY));
      return;
    }
    tip.hidden = true;
    overlay.replaceChildren();
    const from = x(timeAt(Math.min(px, drag))), to = x(timeAt(Math.max(px, drag)));
    make("rect", { class: "drag", x: from, y: TOP, width: to - from, height: BOTTOM - TOP + AXIS + data.threads.length * ROW }, overlay);
  });
  plot.addEventListener("pointerup", (event) => {
    const from = drag, to = local(event)[0];
    drag = null;
    if (from !== null && Math.abs(to - from) >= 4) show(timeAt(Math.min(from, to)), timeAt(Math.max(from, to)));
  });
  plot.addEventListener("pointercancel", () => { drag = null; leave(); });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("dblclick", () => show(0, data.span));
  plot.addEventListener("wheel", (event) => {
    // A bare wheel scrolls the page.
    if (!event.ctrlKey && !event.metaKey && !event.shiftKey) return;
    event.preventDefault();
    zoomBy((event.deltaY || event.deltaX) > 0 ? 1.25 : 0.8, timeAt(local(event)[0]));
  }, { passive: false });
  plot.addEventListener("keydown", (event) => {
    const act = { "+": () => zoomBy(0.5), "=": () => zoomBy(0.5), "-": () => zoomBy(2), 0: () => show(0, data.span), ArrowLeft: () => moveBy(-0.2), ArrowRight: () => moveBy(0.2) }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  });
  document.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
    ({ in: () => zoomBy(0.5), out: () => zoomBy(2), all: () => show(0, data.span) })[button.dataset.zoom]();
  }));
  document.querySelectorAll("[data-series]").forEach((button) => button.addEventListener("click", () => {
    const index = Number(button.dataset.series), off = !hidden.delete(index);
    if (off) hidden.add(index);
    button.setAttribute("aria-pressed", String(!off));
    draw();
  }));
  const names = document.querySelectorAll("[data-name]");
  names.forEach((button) => button.addEventListener("click", () => {
    picked = picked === Number(button.dataset.name) ? -1 : Number(button.dataset.name);
    names.forEach((other) => other.setAttribute("aria-pressed", String(Number(other.dataset.name) === picked)));
    draw();
  }));

  plot.tabIndex = 0;
  plot.classList.add("live");
  document.querySelector(".zoom").hidden = false;
  draw();
  new ResizeObserver(() => { if (Math.max(plot.clientWidth, 260) !== width) draw(); }).observe(plot);
})();
