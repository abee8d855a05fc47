// Numbers for people.

function formatTime(seconds) {
  const size = Math.abs(seconds);
  if (size >= 1 || size === 0) return `${+seconds.toPrecision(4)} s`;
  return size >= 1e-3 ? `${+(seconds * 1e3).toPrecision(4)} ms` : `${+(seconds * 1e6).toPrecision(3)} µs`;
}

// A moment on an axis whose ticks are `step` seconds apart: as many digits as tell two ticks apart.
function formatMoment(seconds, step) {
  const decimals = Math.min(9, Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)));
  return `${seconds.toFixed(decimals)} s`;
}

function formatBytes(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (bytes >= 1000 && index < units.length - 1) { bytes /= 1000; index += 1; }
  return `${+bytes.toPrecision(3)} ${units[index]}`;
}

function formatShare(share) {
  return share >= 0.1 ? `${Math.round(share * 100)}%` : `${+(share * 100).toPrecision(2)}%`;
}
