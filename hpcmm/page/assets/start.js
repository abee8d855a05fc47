// Wire the page up.

const PHASE_ARRAYS = { gap: Uint32Array, length: Uint32Array, code: Uint8Array, step: Int32Array };
const COMM_ARRAYS = { delta: Uint32Array, length: Uint32Array, wait: Uint32Array, code: Uint16Array, sequence: Uint32Array, bytes: Float32Array, late: Int32Array };

function readData(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

// A row of the bottlenecks leads to the step where it shows best.
function linkVerdicts(timeline) {
  document.querySelectorAll("[data-step]").forEach((row) => {
    const index = timeline.steps.number.indexOf(Number(row.dataset.step));
    if (index < 0) return;
    const button = row.querySelector("button");
    button.hidden = false;
    row.classList.add("linked");
    row.addEventListener("click", (event) => {
      if (event.target.closest("a, summary") || (!event.target.closest("button") && String(window.getSelection()))) return;
      document.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
      row.classList.add("chosen");
      timeline.showStep(index, row.dataset.ranks.split(",").filter(Boolean).map(Number));
      document.getElementById("timeline-section").scrollIntoView({ block: "start" });
    });
  });
}

// A printed page is light, and shows all that is folded.
function followTheme(timeline) {
  const redraw = () => { timeline.readColours(); timeline.draw(); };
  const folded = [];
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => {
    document.documentElement.dataset.theme = "light";
    document.querySelectorAll("details[data-print]:not([open])").forEach((part) => { part.open = true; folded.push(part); });
    redraw();
  });
  window.addEventListener("afterprint", () => {
    delete document.documentElement.dataset.theme;
    folded.splice(0).forEach((part) => { part.open = false; });
    redraw();
  });
}

async function startPage() {
  const data = readData("timeline-data");
  if (!data.lanes.length) return;
  const [phase, comm] = await Promise.all([unpackAll(data.phase, PHASE_ARRAYS), unpackAll(data.comm, COMM_ARRAYS)]);
  const timeline = new Timeline(document.getElementById("timeline"), data, phase, comm);
  timeline.gestures = new Gestures(timeline);
  new ResizeObserver(() => timeline.resize()).observe(timeline.scroller);
  const plot = document.getElementById("step-plot");
  if (plot) new StepPlot(plot, readData("step-data"), timeline);
  linkVerdicts(timeline);
  followTheme(timeline);
  window.hpcmmTimeline = timeline;
}

startPage().catch((error) => {
  document.getElementById("timeline-failed").hidden = false;
  console.error(error);
});
