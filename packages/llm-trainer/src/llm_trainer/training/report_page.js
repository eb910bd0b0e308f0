"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const figures = [...document.querySelectorAll(".chart")];
  const choice = { axis: "steps", log: false };
  const domain = () => data.axes[`${choice.axis} ${choice.log ? "log" : "linear"}`];
  const place = ({ low, high, log }, value) => data.units
    * (log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low));
  const points = (series) => series.x[choice.axis].map((value, i) => [place(domain(), value), series.y[i]]);

  const draw = () => {
    figures.forEach((figure, number) => {
      data.charts[number].forEach((series, position) => {
        const drawn = points(series).map(([x, y]) => `${x.toFixed(1)} ${y}`);
        figure.querySelector(`.line.s${position}`).setAttribute("d", `M${drawn.join("L")}`);
        const dots = figure.querySelector(`.dots.s${position}`);
        if (dots) dots.setAttribute("d", drawn.map((point) => `M${point}h0`).join(""));
      });
      figure.querySelector(".ticks").replaceChildren(...domain().ticks.map(([at, label]) => {
        const tick = document.createElement("span");
        tick.className = "x";
        tick.style.left = `${at / data.units * 100}%`;
        tick.textContent = label;
        return tick;
      }));
      // The marks of resumed runs are at steps.
      figure.querySelector(".resumed").style.display = choice.axis === "steps" && !choice.log ? "" : "none";
    });
  };

  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  };

  figures.forEach((figure, number) => {
    const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg");
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "path");
    cross.setAttribute("class", "cross");
    svg.append(cross);
    plot.append(tip);
    plot.classList.add("live");
    const leave = () => { tip.hidden = true; cross.setAttribute("d", ""); };
    const hover = (event) => {
      const box = plot.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * data.units;
      const found = data.charts[number].map((series, position) => {
        const xs = points(series).map(([x]) => x), i = nearest(xs, at);
        return { series, position, i, x: xs[i] };
      });
      const first = found.reduce((best, one) => Math.abs(one.x - at) < Math.abs(best.x - at) ? one : best);
      // Values of other records than the nearest one would pass for values of that step.
      const shown = found.filter((one) => one.series.at[one.i] === first.series.at[first.i]);
      tip.replaceChildren(...shown.map((one) => {
        const row = document.createElement("div"), key = document.createElement("span"), value = document.createElement("b");
        key.className = `key s${one.position}`;
        key.textContent = `${one.series.label} `;
        value.textContent = one.series.values[one.i];
        row.append(key, value);
        return row;
      }));
      const where = document.createElement("small");
      where.textContent = first.series.at[first.i];
      tip.append(where);
      tip.hidden = false;
      cross.setAttribute("d", `M${first.x} 0V${data.units}`);
      const left = first.x / data.units * box.width;
      const beside = left + 12 + tip.offsetWidth <= box.width ? left + 12 : left - 12 - tip.offsetWidth;
      tip.style.left = `${Math.max(beside, -40)}px`;
      tip.style.top = "8px";
    };
    plot.addEventListener("pointermove", hover);
    plot.addEventListener("pointerdown", hover);
    // A finger leaves when it is lifted, and what it touched should then be read.
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
    document.addEventListener("pointerdown", (event) => { if (!plot.contains(event.target)) leave(); });
    plot.addEventListener("pointercancel", leave);
  });

  const controls = document.querySelector(".controls");
  if (!controls) return;
  controls.hidden = false;
  const axes = [...controls.querySelectorAll("[data-axis]")], log = controls.querySelector("[data-log]");
  const choose = (change) => {
    Object.assign(choice, change);
    axes.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.axis === choice.axis)));
    log.setAttribute("aria-pressed", String(choice.log));
    draw();
  };
  axes.forEach((button) => button.addEventListener("click", () => choose({ axis: button.dataset.axis })));
  log.addEventListener("click", () => choose({ log: !choice.log }));
})();
