// Timeline of all ranks: two rows a rank, phases above and communication below. Zoom, pan, hover.
// A row is drawn in O(pixels x log n): where items are narrower than a pixel, the column takes the colour of
// what fills most of it, from prefix sums, so that no zoom level draws more than the screen can show.
"use strict";

const PHASE_COLOURS = { data: "#e8a33d", forward: "#4a7fc9", backward: "#7d62c4", optimizer: "#4aa564", checkpoint: "#9a5f3b", other: "#d3d9e0" };
const EXTRA_COLOURS = ["#6aa7b8", "#8f9d3f", "#b5785a", "#5c7080", "#d9b3c9", "#c2659b"];
const WAIT_COLOUR = "#d64545";
const TRANSFER_COLOUR = "#1f9e97";

function phaseColour(name, index) {
  return PHASE_COLOURS[name] || EXTRA_COLOURS[index % EXTRA_COLOURS.length];
}

async function unpack(text, Type) {
  if (!text) return new Type(0);
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Type(await new Response(stream).arrayBuffer());
}

async function unpackAll(packed, types) {
  const names = Object.keys(types);
  const arrays = await Promise.all(names.map((name) => unpack(packed[name], types[name])));
  return Object.fromEntries(names.map((name, index) => [name, arrays[index]]));
}

function formatTime(seconds) {
  const size = Math.abs(seconds);
  if (size >= 1 || size === 0) return `${+seconds.toPrecision(4)} s`;
  return size >= 1e-3 ? `${+(seconds * 1e3).toPrecision(4)} ms` : `${+(seconds * 1e6).toPrecision(3)} µs`;
}

function formatBytes(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (bytes >= 1000 && index < units.length - 1) { bytes /= 1000; index += 1; }
  return `${+bytes.toPrecision(3)} ${units[index]}`;
}

// First index in [low, high) whose value is above the limit; values ascend.
function firstAbove(values, limit, low, high) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > limit) high = middle; else low = middle + 1;
  }
  return low;
}

// One row of disjoint items sorted by start, each of one kind, with prefix sums of time by kind.
class Row {
  constructor(starts, ends, kinds, kindCount) {
    this.starts = starts; this.ends = ends; this.kinds = kinds;
    this.sums = Array.from({ length: kindCount }, () => new Float64Array(starts.length + 1));
    for (let item = 0; item < starts.length; item += 1) {
      for (let kind = 0; kind < kindCount; kind += 1) this.sums[kind][item + 1] = this.sums[kind][item];
      this.sums[kinds[item]][item + 1] += ends[item] - starts[item];
    }
  }

  at(time) {
    const item = firstAbove(this.starts, time, 0, this.starts.length) - 1;
    return item >= 0 && time < this.ends[item] ? item : -1;
  }

  // The kind that fills most of [from, to), and the share that is filled.
  dominant(from, to, low, high) {
    let best = -1, most = 0, whole = 0;
    for (let kind = 0; kind < this.sums.length; kind += 1) {
      const time = this.sums[kind][high] - this.sums[kind][low];
      whole += time;
      if (time > most) { most = time; best = kind; }
    }
    return [best, Math.min(1, whole / (to - from))];
  }

  draw(context, view, top, height, colours) {
    const count = this.starts.length;
    let item = Math.max(0, firstAbove(this.starts, view.from, 0, count) - 1);
    while (item < count && this.starts[item] < view.to) {
      const left = view.x(this.starts[item]), right = view.x(this.ends[item]);
      if (right - left >= 1.5) {
        context.fillStyle = colours[this.kinds[item]];
        const begin = Math.max(left, view.left), end = Math.min(right, view.right);
        if (end > begin) context.fillRect(begin, top, Math.max(1, end - begin - (right - left > 4 ? 0.5 : 0)), height);
        item += 1;
        continue;
      }
      const column = Math.floor(left);
      const from = view.time(column), to = view.time(column + 1);
      let next = Math.max(item + 1, firstAbove(this.starts, to, item, count));
      // The last item that starts in this column may be a wide one, which is drawn on its own.
      if (next - 1 > item && view.x(this.ends[next - 1]) - view.x(this.starts[next - 1]) >= 1.5) next -= 1;
      const [kind, filled] = this.dominant(from, to, item, next);
      if (kind >= 0 && column >= view.left && column < view.right) {
        context.globalAlpha = Math.max(0.35, filled);
        context.fillStyle = colours[kind];
        context.fillRect(column, top, 1, height);
        context.globalAlpha = 1;
      }
      item = next;
    }
  }
}

class View {
  constructor(left, right, from, to) { Object.assign(this, { left, right, from, to }); }
  get scale() { return (this.right - this.left) / (this.to - this.from); }
  x(time) { return this.left + (time - this.from) * this.scale; }
  time(x) { return this.from + (x - this.left) / this.scale; }
}

class Timeline {
  constructor(root, data, phase, comm) {
    this.canvas = root.querySelector("canvas");
    this.tooltip = root.querySelector(".tooltip");
    this.context = this.canvas.getContext("2d");
    this.data = data; this.phase = phase; this.comm = comm;
    this.second = 1e9 / data.unit_ns;
    this.colours = data.phases.map(phaseColour);
    this.lanes = this.buildLanes();
    const lanes = Math.max(1, this.lanes.length);
    this.laneHeight = Math.max(9, Math.min(38, Math.floor(620 / lanes)));
    this.axis = 26; this.label = 104;
    this.height = this.axis + lanes * this.laneHeight + 6;
    this.limits = this.findLimits();
    this.view = new View(this.label, this.label + 1, ...this.limits);
    this.resize();
    this.listen();
  }

  buildLanes() {
    let phaseAt = 0, commAt = 0;
    return this.data.lanes.map((lane) => {
      const phases = { from: phaseAt, to: phaseAt + lane.phases }, comms = { from: commAt, to: commAt + lane.comm };
      phaseAt = phases.to; commAt = comms.to;
      return { ...lane, first: phases.from, firstComm: comms.from, phaseRow: this.phaseRow(phases), commRow: this.commRow(comms) };
    });
  }

  phaseRow({ from, to }) {
    const starts = this.phase.start.subarray(from, to);
    const ends = starts.map((start, item) => start + this.phase.length[from + item]);
    return new Row(starts, ends, this.phase.code.subarray(from, to), this.data.phases.length);
  }

  // Each collective is a waiting part, then a transfer part.
  commRow({ from, to }) {
    const count = to - from;
    const starts = new Uint32Array(2 * count), ends = new Uint32Array(2 * count), kinds = new Uint8Array(2 * count);
    for (let item = 0; item < count; item += 1) {
      const begin = this.comm.begin[from + item], end = this.comm.end[from + item];
      const split = Math.min(end, Math.max(begin, this.comm.start[from + item] + this.comm.wait[from + item]));
      starts[2 * item] = begin; ends[2 * item] = split;
      starts[2 * item + 1] = split; ends[2 * item + 1] = end; kinds[2 * item + 1] = 1;
    }
    return new Row(starts, ends, kinds, 2);
  }

  findLimits() {
    let from = Infinity, to = 0;
    for (const { phaseRow, commRow } of this.lanes) {
      for (const row of [phaseRow, commRow]) {
        if (!row.starts.length) continue;
        from = Math.min(from, row.starts[0]);
        to = Math.max(to, row.ends[row.ends.length - 1]);
      }
    }
    return from < to ? [from, to] : [0, this.second];
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.parentElement.clientWidth;
    this.canvas.style.height = `${this.height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.view = new View(this.label, width, this.view.from, this.view.to);
    this.schedule();
  }

  schedule() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.draw(); });
  }

  show(from, to) {
    const [first, last] = this.limits;
    const span = Math.min(last - first, Math.max(to - from, 10));
    const begin = Math.min(Math.max(from, first), last - span);
    this.view = new View(this.view.left, this.view.right, begin, begin + span);
    this.schedule();
  }

  draw() {
    const { context, view } = this;
    context.clearRect(0, 0, view.right, this.height);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.drawAxis();
    const gap = this.laneHeight > 14 ? 3 : 1;
    const high = this.laneHeight - gap, upper = Math.round(high * 0.62);
    this.lanes.forEach((lane, index) => {
      const top = this.axis + index * this.laneHeight;
      context.fillStyle = index % 2 ? "#fbfcfd" : "#f3f5f8";
      context.fillRect(view.left, top, view.right - view.left, this.laneHeight);
      lane.phaseRow.draw(context, view, top + 1, upper - 1, this.colours);
      lane.commRow.draw(context, view, top + upper, high - upper, [WAIT_COLOUR, TRANSFER_COLOUR]);
      context.fillStyle = "#3c4854";
      if (this.laneHeight >= 12 || index % Math.ceil(12 / this.laneHeight) === 0) {
        const name = lane.rank >= 0 ? `rank ${lane.rank}` : "rank ?";
        context.fillText(lane.node ? `${name}  ${lane.node}` : name, 0, top + high / 2, this.label - 8);
      }
    });
  }

  drawAxis() {
    const { context, view } = this;
    const raw = ((view.to - view.from) / this.second) / Math.max(2, (view.right - view.left) / 120);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw) * this.second;
    context.strokeStyle = "#e3e7ec";
    context.fillStyle = "#5d6b7a";
    for (let time = Math.ceil(view.from / step) * step; time <= view.to; time += step) {
      const x = Math.round(view.x(time)) + 0.5;
      context.beginPath(); context.moveTo(x, 18); context.lineTo(x, this.height); context.stroke();
      if (x < view.right - 40) context.fillText(formatTime(time / this.second), x + 3, 9);
    }
    this.drawSteps();
  }

  drawSteps() {
    const { context, view } = this;
    const visible = this.data.steps.filter(([, start]) => start >= view.from && start <= view.to);
    if (visible.length > (view.right - view.left) / 44) return;
    context.fillStyle = "#1f5fbf";
    for (const [number, start] of visible) {
      const x = view.x(start);
      context.fillRect(x, 18, 1, 8);
      context.fillText(`step ${number}`, x + 3, 21, 60);
    }
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.pan(event.deltaX);
      else this.zoom(Math.exp(event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), event.offsetX);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => { this.drag = event.offsetX; canvas.setPointerCapture(event.pointerId); canvas.classList.add("dragging"); });
    canvas.addEventListener("pointerup", () => { this.drag = undefined; canvas.classList.remove("dragging"); });
    canvas.addEventListener("pointermove", (event) => {
      if (this.drag === undefined) { this.hover(event.offsetX, event.offsetY); return; }
      this.pan(this.drag - event.offsetX);
      this.drag = event.offsetX;
    });
    canvas.addEventListener("pointerleave", () => { this.tooltip.hidden = true; });
    canvas.addEventListener("dblclick", () => this.show(...this.limits));
    canvas.addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("resize", () => this.resize());
    document.querySelectorAll("[data-view]").forEach((button) => button.addEventListener("click", () => this.jump(button.dataset.view)));
  }

  zoom(factor, x) {
    const time = this.view.time(Math.max(x, this.view.left));
    this.show(time - (time - this.view.from) * factor, time + (this.view.to - time) * factor);
    this.tooltip.hidden = true;
  }

  pan(pixels) {
    const shift = pixels / this.view.scale;
    this.show(this.view.from + shift, this.view.to + shift);
    this.tooltip.hidden = true;
  }

  key(event) {
    const middle = (this.view.left + this.view.right) / 2;
    const actions = { "+": () => this.zoom(0.7, middle), "=": () => this.zoom(0.7, middle), "-": () => this.zoom(1.4, middle), ArrowLeft: () => this.pan(-120), ArrowRight: () => this.pan(120), Home: () => this.show(...this.limits) };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  }

  jump(view) {
    const steps = this.data.steps;
    if (view === "all" || steps.length < 3) { this.show(...this.limits); return; }
    let chosen = Math.floor(steps.length / 2);
    if (view === "slowest") {
      for (let index = 1; index + 1 < steps.length; index += 1) {
        if (steps[index + 1][1] - steps[index][1] > steps[chosen + 1 < steps.length ? chosen + 1 : chosen][1] - steps[chosen][1]) chosen = index;
      }
    }
    const from = steps[chosen][1], to = chosen + 1 < steps.length ? steps[chosen + 1][1] : this.limits[1];
    this.show(from - (to - from) * 0.04, to + (to - from) * 0.04);
  }

  hover(x, y) {
    const lane = this.lanes[Math.floor((y - this.axis) / this.laneHeight)];
    const text = lane && x >= this.view.left ? this.describe(lane, this.view.time(x), (y - this.axis) % this.laneHeight) : "";
    this.tooltip.hidden = !text;
    if (!text) return;
    this.tooltip.textContent = text;
    const left = Math.min(x + 14, this.view.right - this.tooltip.offsetWidth - 4);
    this.tooltip.style.left = `${Math.max(0, left)}px`;
    this.tooltip.style.top = `${y + 16}px`;
  }

  describe(lane, time, offset) {
    const onComm = offset > this.laneHeight * 0.6;
    const item = (onComm ? lane.commRow : lane.phaseRow).at(time);
    if (item < 0) return "";
    return onComm ? this.describeComm(lane, lane.firstComm + (item >> 1)) : this.describePhase(lane, item);
  }

  describePhase(lane, item) {
    const { starts, ends, kinds } = lane.phaseRow;
    const step = this.phase.step[lane.first + item];
    const name = this.data.phases[kinds[item]];
    return `${name}${step >= 0 ? `, step ${step}` : ""}\nrank ${lane.rank} ${lane.node}\n${formatTime((ends[item] - starts[item]) / this.second)} from ${formatTime(starts[item] / this.second)}`;
  }

  describeComm(lane, item) {
    const { comm } = this;
    const length = comm.length[item], wait = Math.min(comm.wait[item], length);
    const late = comm.late[item];
    const lines = [
      `${this.data.collectives[comm.code[item]]}, sequence ${comm.sequence[item]}`,
      `rank ${lane.rank} ${lane.node}, ${formatBytes(comm.bytes[item])}`,
      `${formatTime(length / this.second)}: ${formatTime(wait / this.second)} waiting, ${formatTime((length - wait) / this.second)} transfer`,
    ];
    if (late > -(2 ** 31)) lines.push(late === lane.rank ? "this rank came last" : `last to come: rank ${late}`);
    return lines.join("\n");
  }
}

function fillLegend(data) {
  const entries = [...data.phases.map((name, index) => [name, phaseColour(name, index)]), ["communication: waiting for a rank", WAIT_COLOUR], ["communication: transfer", TRANSFER_COLOUR]];
  const legend = document.getElementById("timeline-legend");
  for (const [name, colour] of entries) {
    const entry = document.createElement("li"), mark = document.createElement("i");
    mark.style.background = colour;
    entry.append(mark, name);
    legend.append(entry);
  }
  if (data.left_out) legend.append(`${data.left_out} later collectives are not drawn.`);
  document.querySelectorAll(".budget span.work, #budget-legend i.work").forEach((part) => {
    part.style.background = phaseColour(part.dataset.name, Math.max(0, data.phases.indexOf(part.dataset.name)));
  });
}

async function startTimeline() {
  const data = JSON.parse(document.getElementById("timeline-data").textContent);
  fillLegend(data);
  const [phase, comm] = await Promise.all([
    unpackAll(data.phase, { start: Uint32Array, length: Uint32Array, code: Uint8Array, step: Int32Array }),
    unpackAll(data.comm, { start: Uint32Array, length: Uint32Array, begin: Uint32Array, end: Uint32Array, wait: Uint32Array, code: Uint16Array, sequence: Uint32Array, bytes: Float32Array, late: Int32Array }),
  ]);
  window.hpcmmTimeline = new Timeline(document.getElementById("timeline"), data, phase, comm);
}

startTimeline();
