// One row of the timeline: disjoint items sorted by start, each of one kind. A row is painted in
// O(columns x log items): where items are narrower than a column, the column shows how much of it each kind fills,
// from prefix sums, so that no zoom level costs more than the screen can show, and none hides what takes the time.

// First index in [low, high) whose value is above the limit; values ascend.
function firstAbove(values, limit, low, high) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > limit) high = middle; else low = middle + 1;
  }
  return low;
}

// The same where it is expected near `low`.
function firstAboveNear(values, limit, low, high) {
  let reach = 4;
  while (low + reach < high && values[low + reach] <= limit) { low += reach; reach *= 2; }
  return firstAbove(values, limit, low, Math.min(high, low + reach + 1));
}

const FEW_ITEMS = 12;
const MOST_ON_AN_EDGE = 3;

class Row {
  constructor(starts, ends, kinds, kindCount) {
    this.starts = starts; this.ends = ends; this.kinds = kinds; this.kindCount = kindCount;
    this.sums = new Float64Array((starts.length + 1) * kindCount);
    this.times = new Float64Array(kindCount);
    for (let item = 0, at = 0; item < starts.length; item += 1, at += kindCount) {
      for (let kind = 0; kind < kindCount; kind += 1) this.sums[at + kindCount + kind] = this.sums[at + kind];
      this.sums[at + kindCount + kinds[item]] += ends[item] - starts[item];
    }
  }

  at(time) {
    const item = firstAbove(this.starts, time, 0, this.starts.length) - 1;
    return item >= 0 && time < this.ends[item] ? item : -1;
  }

  // Time by kind in [from, to), into this.times; the items from `low` to before `high` are those that reach into it.
  timesWithin(from, to, low, high) {
    const { starts, ends, kinds, kindCount, sums, times } = this;
    times.fill(0);
    if (high - low <= FEW_ITEMS) {
      for (let item = low; item < high; item += 1) times[kinds[item]] += Math.max(0, Math.min(ends[item], to) - Math.max(starts[item], from));
      return times;
    }
    for (let kind = 0; kind < kindCount; kind += 1) times[kind] = sums[high * kindCount + kind] - sums[low * kindCount + kind];
    times[kinds[low]] -= Math.max(0, from - starts[low]);
    times[kinds[high - 1]] -= Math.max(0, ends[high - 1] - to);
    return times;
  }

  shares(from, to) {
    const low = firstAbove(this.ends, from, 0, this.ends.length);
    const high = firstAbove(this.starts, to, low, this.starts.length);
    return this.timesWithin(from, to, low, high);
  }

  // Fill rows `top` to before `bottom` of `image`; its column 0 begins at time `from`, one column is `unit` long.
  paint(image, top, bottom, from, unit, paint) {
    const { starts, ends, kinds } = this;
    const count = starts.length;
    let item = firstAbove(ends, from, 0, count), column = 0;
    while (column < image.columns && item < count) {
      const begin = from + column * unit, end = begin + unit;
      if (starts[item] >= end) {
        column = Math.max(column + 1, Math.floor((starts[item] - from) / unit));
      } else if (starts[item] <= begin && ends[item] >= end) {
        const stop = Math.max(column + 1, Math.min(image.columns, Math.floor((ends[item] - from) / unit)));
        image.fill(column, stop, top, bottom, paint.solid[kinds[item]]);
        column = stop;
        if (ends[item] <= from + column * unit) item += 1;
      } else {
        const next = Math.max(item + 1, firstAboveNear(starts, end, item, count));
        const times = this.timesWithin(begin, end, item, next);
        const edge = next - item <= MOST_ON_AN_EDGE ? this.edge(times, unit, item, next, paint) : 0;
        if (edge) image.fill(column, column + 1, top, bottom, edge);
        else image.stack(column, top, bottom, times, unit, paint);
        column += 1;
        item = ends[next - 1] > end ? next - 1 : next;
      }
    }
  }

  // The colour of a column that a few items fill, one of them wide as a rule; 0 where they leave some of it empty.
  edge(times, unit, low, high, paint) {
    let best = 0, whole = 0;
    for (let kind = 0; kind < times.length; kind += 1) {
      whole += times[kind];
      if (times[kind] > times[best]) best = kind;
    }
    if (whole < 0.95 * unit) return 0;
    // The seam between two items of one kind stays visible.
    return high - low === 2 && this.kinds[low] === this.kinds[low + 1] ? paint.edge[best] : paint.solid[best];
  }

  // Items at least `width` long within [from, to), few enough to label.
  wide(from, to, width, most) {
    const found = [];
    let item = firstAbove(this.ends, from, 0, this.ends.length);
    for (; item < this.starts.length && this.starts[item] < to && found.length < most; item += 1) {
      if (Math.min(this.ends[item], to) - Math.max(this.starts[item], from) >= width) found.push(item);
    }
    return found;
  }
}
