// Step times: median over ranks as a line, fastest to slowest rank as a band.
"use strict";

function drawStepTimes() {
  const root = document.getElementById("step-times");
  const data = JSON.parse(document.getElementById("step-data").textContent);
  const canvas = root.querySelector("canvas");
  const ratio = window.devicePixelRatio || 1;
  const width = root.clientWidth, height = 220, left = 56, bottom = 24, top = 8;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  if (!data.step.length) { context.fillText("No closed steps.", 8, 20); return; }
  const first = data.step[0], last = Math.max(data.step[data.step.length - 1], first + 1);
  const most = data.max.reduce((a, b) => Math.max(a, b), 0) * 1.06;
  const x = (step) => left + ((step - first) / (last - first)) * (width - left - 10);
  const y = (value) => top + (1 - value / most) * (height - top - bottom);
  context.strokeStyle = "#e3e7ec"; context.fillStyle = "#5d6b7a"; context.textAlign = "right";
  for (let tick = 0; tick <= 4; tick += 1) {
    const value = (most * tick) / 4;
    context.beginPath(); context.moveTo(left, y(value)); context.lineTo(width - 10, y(value)); context.stroke();
    context.fillText(formatTime(+value.toPrecision(2)), left - 6, y(value));
  }
  context.textAlign = "center";
  const every = Math.max(1, Math.ceil(data.step.length / 10));
  data.step.forEach((step, index) => { if (index % every === 0) context.fillText(String(step), x(step), height - 10); });
  context.fillStyle = "rgba(74, 127, 201, .22)";
  context.beginPath();
  data.step.forEach((step, index) => context.lineTo(x(step), y(data.max[index])));
  [...data.step].reverse().forEach((step, index) => context.lineTo(x(step), y(data.min[data.step.length - 1 - index])));
  context.fill();
  context.strokeStyle = "#1f5fbf"; context.lineWidth = 1.6;
  context.beginPath();
  data.step.forEach((step, index) => context.lineTo(x(step), y(data.median[index])));
  context.stroke();
}

drawStepTimes();
window.addEventListener("resize", drawStepTimes);
