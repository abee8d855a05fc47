// Mouse, touch and keys on the timeline.

class Gestures {
  constructor(timeline) {
    this.timeline = timeline;
    const { canvas, scroller } = timeline;
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", (event) => this.release(event));
    canvas.addEventListener("pointerleave", () => timeline.leave());
    canvas.addEventListener("dblclick", () => timeline.showAll());
    canvas.addEventListener("keydown", (event) => this.key(event));
    scroller.addEventListener("scroll", () => timeline.schedule());
    document.querySelectorAll("[data-view]").forEach((button) => button.addEventListener("click", () => this.jump(button.dataset.view)));
  }

  // The page scrolls under the wheel until the timeline was clicked; pinching zooms at any time.
  wheel(event) {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
    const active = document.activeElement === this.timeline.canvas || event.ctrlKey || event.metaKey;
    if (!sideways && !active) return;
    event.preventDefault();
    if (sideways) this.pan(event.deltaX);
    else this.zoom(Math.exp(event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), event.offsetX);
  }

  press(event) {
    const { canvas } = this.timeline;
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("dragging");
    this.drag = { x: event.offsetX, from: event.offsetX, choosing: event.shiftKey };
  }

  move(event) {
    const { timeline, drag } = this;
    if (!drag) { timeline.point(event.offsetX, event.offsetY); return; }
    if (drag.choosing) { timeline.selection = [drag.from, event.offsetX]; timeline.schedule(); }
    else this.pan(drag.x - event.offsetX);
    drag.x = event.offsetX;
  }

  release(event) {
    const { timeline, drag } = this;
    timeline.canvas.classList.remove("dragging");
    this.drag = undefined;
    timeline.selection = null;
    if (!drag || !drag.choosing || Math.abs(event.offsetX - drag.from) < 4) { timeline.schedule(); return; }
    const ends = [drag.from, event.offsetX].sort((a, b) => a - b);
    timeline.show(timeline.view.time(Math.max(ends[0], timeline.view.left)), timeline.view.time(ends[1]));
  }

  zoom(factor, x) {
    const { view } = this.timeline;
    const time = view.time(Math.max(x, view.left));
    this.timeline.show(time - (time - view.from) * factor, time + (view.to - time) * factor);
  }

  pan(pixels) {
    const { view } = this.timeline;
    this.timeline.show(view.from + pixels / view.scale, view.to + pixels / view.scale);
  }

  key(event) {
    const { timeline } = this;
    const middle = (timeline.view.left + timeline.view.right) / 2, quarter = (timeline.view.right - timeline.view.left) / 4;
    const actions = {
      "+": () => this.zoom(0.6, middle), "=": () => this.zoom(0.6, middle), "-": () => this.zoom(1 / 0.6, middle),
      ArrowLeft: () => this.pan(-quarter), ArrowRight: () => this.pan(quarter),
      ArrowUp: () => this.moveCursor(-0.5), ArrowDown: () => this.moveCursor(0.5),
      Home: () => timeline.showAll(), Escape: () => timeline.leave(),
      n: () => timeline.showStep(timeline.stepInView() + 1), p: () => timeline.showStep(timeline.stepInView() - 1),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  // Half a lane up or down: from phases to communication to the next rank; what is in the middle is described.
  moveCursor(lanes) {
    const { timeline } = this;
    const { scroller, laneHeight } = timeline, most = timeline.lanes.length * laneHeight - 1;
    const row = this.row === undefined ? 0 : Math.min(Math.max(this.row + lanes, 0), timeline.lanes.length - 0.5);
    this.row = row;
    const y = Math.min(row * laneHeight + laneHeight * (row % 1 ? 0.3 : 0.25), most);
    if (y < scroller.scrollTop || y > scroller.scrollTop + timeline.height - AXIS_HEIGHT - laneHeight) scroller.scrollTop = y - laneHeight;
    timeline.point((timeline.view.left + timeline.view.right) / 2, y - scroller.scrollTop + AXIS_HEIGHT, true);
  }

  jump(view) {
    const { timeline } = this;
    const { start, end } = timeline.steps;
    if (view === "all" || !start.length) { timeline.showAll(); return; }
    if (view === "step") { timeline.showStep(start.length >> 1); return; }
    // The first step is warm-up.
    let slowest = Math.min(1, start.length - 1);
    for (let index = slowest; index < start.length; index += 1) if (end[index] - start[index] > end[slowest] - start[slowest]) slowest = index;
    timeline.showStep(slowest);
  }
}
