// Timeline of all ranks on one clock: two rows a rank, phases above and communication below.

const AXIS_HEIGHT = 34;
const TALLEST_VIEW = 830;
const MIN_SPAN = 20;

class View {
  constructor(left, right, from, to) { Object.assign(this, { left, right, from, to }); }
  get scale() { return (this.right - this.left) / (this.to - this.from); }
  x(time) { return this.left + (time - this.from) * this.scale; }
  time(x) { return this.from + (x - this.left) / this.scale; }
}

class Timeline {
  constructor(root, data, phase, comm) {
    this.root = root;
    this.scroller = root.querySelector(".scroller");
    this.canvas = root.querySelector("canvas");
    this.tooltip = root.querySelector(".tooltip");
    this.spoken = root.querySelector(".spoken");
    this.context = this.canvas.getContext("2d", { alpha: false, willReadFrequently: true });
    this.data = data;
    this.steps = data.steps;
    this.second = 1e9 / data.unit_ns;
    this.describer = new Describer(data, phase, comm);
    this.lanes = buildLanes(data, phase, comm);
    this.limits = limitsOf(this.lanes, this.second);
    this.laneHeight = Math.max(12, Math.min(38, Math.floor(620 / Math.max(1, this.lanes.length))));
    this.focus = null; this.cursor = null; this.selection = null; this.listeners = [];
    this.view = new View(0, 1, ...this.limits);
    this.readColours();
    this.resize();
  }

  readColours() {
    const ground = cssColour("lane");
    this.colours = Object.fromEntries(["ink", "soft", "line", "paper", "lane", "accent"].map((name) => [name, cssColour(name)]));
    this.ground = pixel(ground, ground, 1);
    this.phasePaint = new Paint(this.data.kinds, ground);
    this.commPaint = new Paint(COMM_KINDS, ground);
  }

  resize() {
    this.ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = this.scroller.clientWidth;
    const whole = AXIS_HEIGHT + this.lanes.length * this.laneHeight + 2;
    this.height = Math.min(whole, TALLEST_VIEW);
    this.canvas.style.height = `${this.height}px`;
    this.scroller.querySelector(".spacer").style.height = `${whole - this.height}px`;
    this.canvas.width = Math.round(width * this.ratio);
    this.canvas.height = Math.round(this.height * this.ratio);
    this.context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    const label = width < 600 ? 62 : 132;
    this.view = new View(label, Math.max(width, label + 10), this.view.from, this.view.to);
    this.schedule();
  }

  schedule() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.draw(); });
  }

  onView(listener) { this.listeners.push(listener); listener(this.view); }

  show(from, to) {
    const [first, last] = this.limits;
    const span = Math.min(last - first, Math.max(to - from, MIN_SPAN));
    const begin = Math.min(Math.max(from, first), last - span);
    this.view = new View(this.view.left, this.view.right, begin, begin + span);
    this.tooltip.hidden = true;
    this.cursor = null;
    this.listeners.forEach((listener) => listener(this.view));
    this.schedule();
  }

  showAll() { this.focus = null; this.show(...this.limits); }

  // Zoom to the step of this index; `ranks` are marked.
  showStep(index, ranks = []) {
    if (index < 0 || index >= this.steps.number.length) return;
    const from = this.steps.start[index], to = this.steps.end[index], margin = (to - from) * 0.06;
    this.focus = { from, to, ranks: new Set(ranks) };
    this.show(from - margin, to + margin);
    const lane = this.lanes.findIndex(({ rank }) => this.focus.ranks.has(rank));
    if (lane >= 0) this.scroller.scrollTop = Math.max(0, (lane + 0.5) * this.laneHeight - (this.height - AXIS_HEIGHT) / 2);
    this.spoken.textContent = `Step ${this.steps.number[index]}, ${formatTime((to - from) / this.second)}`;
  }

  stepInView() {
    const middle = (this.view.from + this.view.to) / 2;
    return Math.max(0, firstAbove(this.steps.start, middle, 0, this.steps.start.length) - 1);
  }

  // Lanes in sight: [index, y of its top].
  visible() {
    const offset = this.scroller.scrollTop;
    const first = Math.max(0, Math.floor(offset / this.laneHeight));
    const last = Math.min(this.lanes.length, Math.ceil((offset + this.height - AXIS_HEIGHT) / this.laneHeight));
    return Array.from({ length: Math.max(0, last - first) }, (_, index) => [first + index, AXIS_HEIGHT + (first + index) * this.laneHeight - offset]);
  }

  draw() {
    const { context, view } = this;
    context.fillStyle = this.colours.paper;
    context.fillRect(0, 0, view.right, this.height);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    const lanes = this.visible();
    const gap = this.laneHeight > 14 ? 3 : 1, high = this.laneHeight - gap, upper = Math.round(high * 0.62);
    this.drawRows(lanes, upper, high);
    if (this.laneHeight >= 20) for (const [index, top] of lanes) this.drawNames(this.lanes[index], top, upper);
    for (const [index, top] of lanes) this.drawLabel(index, top, high);
    this.drawMarks(lanes, high);
    this.drawAxis();
  }

  drawRows(lanes, upper, high) {
    const { view, ratio } = this;
    const columns = Math.max(1, Math.floor((view.right - view.left) * ratio)), rows = Math.max(1, Math.floor((this.height - AXIS_HEIGHT) * ratio));
    if (!this.bitmap || this.bitmap.columns !== columns || this.bitmap.rows !== rows || this.bitmap.ground !== this.ground) this.bitmap = new Bitmap(columns, rows, this.ground);
    this.bitmap.clear();
    const unit = (view.to - view.from) / columns;
    const place = (y) => Math.max(0, Math.min(rows, Math.round((y - AXIS_HEIGHT) * ratio)));
    for (const [index, top] of lanes) {
      const lane = this.lanes[index];
      lane.phaseRow.paint(this.bitmap, place(top + 1), place(top + upper), view.from, unit, this.phasePaint);
      lane.commRow.paint(this.bitmap, place(top + upper), place(top + high), view.from, unit, this.commPaint);
    }
    this.context.putImageData(this.bitmap.image, Math.round(view.left * ratio), Math.round(AXIS_HEIGHT * ratio));
  }

  drawNames(lane, top, upper) {
    const { context, view } = this;
    const row = lane.phaseRow;
    for (const item of row.wide(view.from, view.to, 46 / view.scale, 60)) {
      const left = Math.max(view.left, view.x(row.starts[item])), right = Math.min(view.right, view.x(row.ends[item]));
      context.fillStyle = this.phasePaint.text[row.kinds[item]];
      context.fillText(this.fit(this.data.phases[row.kinds[item]], right - left - 10), left + 5, top + upper / 2 + 1);
    }
  }

  fit(text, width) {
    const { context } = this;
    if (context.measureText(text).width <= width) return text;
    let short = text.slice(0, 48);
    while (short && context.measureText(`${short}…`).width > width) short = short.slice(0, -1);
    return short ? `${short}…` : "";
  }

  drawLabel(index, top, high) {
    const { context } = this;
    const lane = this.lanes[index];
    if (index && this.lanes[index - 1].node !== lane.node) {
      context.fillStyle = this.colours.soft;
      context.fillRect(this.laneHeight < 14 ? this.view.left : 0, Math.round(top) - 1, this.view.right, 1);
    }
    const marked = this.focus && this.focus.ranks.has(lane.rank);
    context.fillStyle = marked ? this.colours.accent : this.colours.ink;
    context.font = `${marked ? "bold " : ""}${this.laneHeight < 14 ? 10 : 12}px system-ui, sans-serif`;
    const text = lane.node && this.view.left > 100 ? `${lane.name} · ${lane.node}` : lane.name;
    context.fillText(this.fit(text, this.view.left - 8), 0, top + high / 2);
    context.font = "12px system-ui, sans-serif";
  }

  // The step and the lanes that a verdict points at, the lane waited for, the cursor, the range being chosen.
  drawMarks(lanes, high) {
    const { context, view } = this;
    context.lineWidth = 2;
    context.strokeStyle = this.colours.accent;
    const frame = (top, from, to) => {
      const left = Math.max(view.left + 1, view.x(from)), right = Math.min(view.right - 1, view.x(to));
      if (right > left) context.strokeRect(left, top + 0.5, right - left, high);
    };
    for (const [index, top] of lanes) {
      if (this.focus && this.focus.ranks.has(this.lanes[index].rank)) frame(top, this.focus.from, this.focus.to);
    }
    if (this.cursor) {
      const of = (lane) => lanes.find(([index]) => index === lane);
      const own = of(this.cursor.lane), late = of(this.cursor.late), x = view.x(this.cursor.time);
      context.strokeStyle = context.fillStyle = this.colours.ink;
      context.lineWidth = 1;
      context.beginPath(); context.moveTo(x, AXIS_HEIGHT); context.lineTo(x, this.height); context.stroke();
      if (own) context.strokeRect(view.left + 0.5, own[1] + 0.5, view.right - view.left - 1, high);
      if (own && late && late !== own) {
        context.lineWidth = 2;
        context.strokeRect(view.left + 1, late[1] + 0.5, view.right - view.left - 2, high);
        context.beginPath(); context.arc(x, late[1] + high / 2, 4, 0, 2 * Math.PI); context.fill();
      }
    }
    if (this.selection) {
      const [a, b] = this.selection;
      context.globalAlpha = 0.25;
      context.fillStyle = this.colours.accent;
      context.fillRect(Math.min(a, b), AXIS_HEIGHT, Math.abs(b - a), this.height);
      context.globalAlpha = 1;
    }
  }

  drawAxis() {
    const { context, view } = this;
    context.fillStyle = this.colours.paper;
    context.fillRect(0, 0, view.right, AXIS_HEIGHT);
    const raw = ((view.to - view.from) / this.second) / Math.max(2, (view.right - view.left) / 110);
    const power = 10 ** Math.floor(Math.log10(raw));
    const seconds = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw), step = seconds * this.second;
    context.fillStyle = this.colours.soft;
    for (let tick = Math.ceil(view.from / step); tick * step <= view.to; tick += 1) {
      const x = Math.round(view.x(tick * step));
      context.fillRect(x, 14, 1, 4);
      const text = formatMoment(tick * seconds, seconds);
      if (x + 3 + context.measureText(text).width < view.right) context.fillText(text, x + 3, 9);
    }
    this.drawSteps();
  }

  drawSteps() {
    const { context, view } = this;
    const { number, start, end } = this.steps;
    const first = Math.max(0, firstAbove(start, view.from, 0, start.length) - 1), last = firstAbove(start, view.to, 0, start.length);
    const room = Math.ceil((last - first) / Math.max(1, (view.right - view.left) / 48)), power = 10 ** Math.floor(Math.log10(Math.max(1, room)));
    const every = last - first < (view.right - view.left) / 26 ? 1 : [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= room);
    const bounds = (index) => [Math.max(view.left, view.x(start[index])), Math.min(view.right, view.x(end[index]))];
    context.fillStyle = this.colours.line;
    for (let index = first; index < last; index += 1) {
      const [left, right] = bounds(index);
      if (right > left && number[index] % 2 === 0) context.fillRect(left, 20, right - left, 12);
    }
    context.fillStyle = this.colours.ink;
    for (let index = first; index < last; index += 1) {
      const [left, right] = bounds(index);
      if (right <= left || number[index] % every) continue;
      const text = right - left > 60 ? `step ${number[index]}` : String(number[index]);
      if (left + 3 + context.measureText(text).width < view.right && (every > 1 || context.measureText(text).width + 4 < right - left)) context.fillText(text, left + 3, 26.5);
    }
  }

  laneAt(y) {
    const index = Math.floor((y - AXIS_HEIGHT + this.scroller.scrollTop) / this.laneHeight);
    return y >= AXIS_HEIGHT && index < this.lanes.length ? index : -1;
  }

  // Describe what lies at a point of the canvas, in the tooltip and, on request, to screen readers.
  point(x, y, speak = false) {
    const index = x >= this.view.left ? this.laneAt(y) : -1;
    const offset = (y - AXIS_HEIGHT + this.scroller.scrollTop) % this.laneHeight, onComm = offset > this.laneHeight * 0.6;
    const time = this.view.time(x);
    const text = index < 0 ? "" : this.describer.at(this.lanes[index], time, onComm, 1 / this.view.scale);
    this.cursor = text ? { lane: index, time, late: onComm ? this.describer.lateLane(this.lanes[index], time, this.lanes) : -1 } : null;
    this.schedule();
    this.tooltip.hidden = !text;
    if (!text) return;
    this.tooltip.textContent = text;
    if (speak) this.spoken.textContent = text;
    const left = Math.min(x + 14, this.view.right - this.tooltip.offsetWidth - 4);
    this.tooltip.style.left = `${Math.max(0, left)}px`;
    this.tooltip.style.top = `${y + 18}px`;
  }

  leave() { this.tooltip.hidden = true; this.cursor = null; this.schedule(); }
}
