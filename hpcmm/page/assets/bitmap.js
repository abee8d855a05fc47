// The pixels of the timeline's lanes.

class Bitmap {
  constructor(columns, rows, ground) {
    this.columns = columns; this.rows = rows; this.ground = ground;
    this.image = new ImageData(columns, rows);
    this.pixels = new Uint32Array(this.image.data.buffer);
  }

  clear() { this.pixels.fill(this.ground); }

  fill(left, right, top, bottom, colour) {
    for (let row = top; row < bottom; row += 1) this.pixels.fill(colour, row * this.columns + left, row * this.columns + right);
  }

  // One column filled from below by each kind's share of `unit`, the first kind on top.
  stack(column, top, bottom, times, unit, paint) {
    const height = bottom - top;
    let below = 0, row = bottom - 1, most = 0;
    for (let kind = times.length - 1; kind >= 0; kind -= 1) {
      if (!times[kind]) continue;
      below += times[kind];
      if (times[kind] > times[most]) most = kind;
      const stop = bottom - 1 - Math.round((below / unit) * height);
      for (; row > stop && row >= top; row -= 1) this.pixels[row * this.columns + column] = paint.solid[kind];
    }
    // However little it is, it has to be seen.
    if (below && row === bottom - 1) this.pixels[row * this.columns + column] = paint.solid[most];
  }
}
