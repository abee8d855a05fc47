// The plot of step times: its numbers under the pointer, a click goes to the step, and what the timeline shows is shaded.

class StepPlot {
  constructor(root, points, timeline) {
    Object.assign(this, { root, points, timeline });
    this.area = root.querySelector(".plot-area");
    this.tooltip = root.querySelector(".tooltip");
    this.cursor = root.querySelector(".cursor");
    this.area.addEventListener("pointermove", (event) => this.hover(event));
    this.area.addEventListener("pointerleave", () => { this.tooltip.hidden = true; this.cursor.setAttribute("visibility", "hidden"); });
    this.area.addEventListener("click", (event) => this.choose(event));
    timeline.onView((view) => this.shade(view));
  }

  position(step) {
    const { step: steps } = this.points;
    const first = steps[0], last = Math.max(steps[steps.length - 1], first + 1);
    return 100 * (step - first) / (last - first);
  }

  nearest(event) {
    const { step: steps } = this.points;
    const box = this.area.getBoundingClientRect(), first = steps[0], last = Math.max(steps[steps.length - 1], first + 1);
    const step = first + ((event.clientX - box.left) / box.width) * (last - first);
    const after = Math.min(firstAbove(steps, step, 0, steps.length), steps.length - 1), before = Math.max(0, after - 1);
    return step - steps[before] < steps[after] - step ? before : after;
  }

  hover(event) {
    const { points, tooltip, area } = this;
    const at = this.nearest(event), x = this.position(points.step[at]);
    this.cursor.setAttribute("visibility", "visible");
    this.cursor.setAttribute("x1", `${x}%`);
    this.cursor.setAttribute("x2", `${x}%`);
    tooltip.textContent = `step ${points.step[at]}\nmedian ${formatTime(points.median[at])}\nfastest rank ${formatTime(points.min[at])}, slowest ${formatTime(points.max[at])}`;
    tooltip.hidden = false;
    const left = area.offsetLeft + (area.clientWidth * x) / 100;
    tooltip.style.left = `${Math.max(0, Math.min(left + 12, this.root.clientWidth - tooltip.offsetWidth))}px`;
    tooltip.style.top = "8px";
  }

  choose(event) {
    const index = this.timeline.steps.number.indexOf(this.points.step[this.nearest(event)]);
    this.timeline.showStep(index);
    this.timeline.root.scrollIntoView({ block: "nearest" });
  }

  shade(view) {
    const { number, start, end } = this.timeline.steps;
    const window_ = this.root.querySelector(".window");
    const first = firstAbove(end, view.from, 0, end.length), last = firstAbove(start, view.to, 0, start.length) - 1;
    const whole = first === 0 && last === number.length - 1;
    window_.setAttribute("visibility", whole || last < first ? "hidden" : "visible");
    if (whole || last < first) return;
    const from = this.position(number[first]), to = this.position(number[last]);
    window_.setAttribute("x", `${from}%`);
    window_.setAttribute("width", `${Math.max(0.5, to - from)}%`);
  }
}
