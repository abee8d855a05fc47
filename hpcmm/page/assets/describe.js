// What the timeline says about a moment of a lane, as plain text.

class Describer {
  constructor(data, phase, comm) {
    Object.assign(this, { data, phase, comm });
    this.second = 1e9 / data.unit_ns;
    this.names = new Map(data.lanes.map((lane) => [lane.rank, lane.name]));
  }

  who(lane) { return lane.node ? `${lane.name} on ${lane.node}` : lane.name; }

  // `unit` is the time that one pixel stands for.
  at(lane, time, onComm, unit) {
    const row = onComm ? lane.commRow : lane.phaseRow;
    const item = row.at(time);
    if (item >= 0 && row.ends[item] - row.starts[item] >= unit) return onComm ? this.collective(lane, item >> 1) : this.phaseOf(lane, item);
    return this.mixture(lane, row, onComm ? ["waiting", "transfer"] : this.data.phases, time, unit);
  }

  phaseOf(lane, item) {
    const { starts, ends, kinds } = lane.phaseRow;
    const step = this.phase.step[lane.firstPhase + item];
    const name = this.data.phases[kinds[item]];
    const lines = [`${name}${step >= 0 ? `, step ${step}` : ", outside any step"}`, this.who(lane)];
    lines.push(`${formatTime((ends[item] - starts[item]) / this.second)} from ${formatTime(starts[item] / this.second)}`);
    return lines.join("\n");
  }

  collective(lane, item) {
    const { comm } = this, index = lane.firstComm + item;
    const length = comm.length[index], wait = Math.min(comm.wait[index], length), late = comm.late[index];
    const lines = [
      `${this.data.collectives[comm.code[index]]}, sequence ${comm.sequence[index]}`,
      `${this.who(lane)}, ${formatBytes(comm.bytes[index])}`,
      `${formatTime(length / this.second)}: ${formatTime(wait / this.second)} waiting, ${formatTime((length - wait) / this.second)} transfer`,
    ];
    if (late !== NO_RANK) lines.push(late === lane.rank ? "this rank came last" : `last to come: ${this.names.get(late) || `rank ${late}`}`);
    return lines.join("\n");
  }

  // Items too narrow for the eye: what they are in sum.
  mixture(lane, row, names, time, unit) {
    const times = row.shares(time - 1.5 * unit, time + 1.5 * unit);
    const whole = times.reduce((sum, value) => sum + value, 0);
    if (whole <= 0) return "";
    const parts = Array.from(times, (value, kind) => [value / whole, names[kind]]).filter(([share]) => share >= 0.01);
    parts.sort((a, b) => b[0] - a[0]);
    const told = parts.slice(0, 4).map(([share, name]) => `${name} ${formatShare(share)}`).join(", ");
    return `${told}\n${this.who(lane)}\nat ${formatTime(time / this.second)}; zoom in for single ranges`;
  }

  // The lane that the ranks of a collective waited for.
  lateLane(lane, time, lanes) {
    const item = lane.commRow.at(time);
    const late = item < 0 ? NO_RANK : this.comm.late[lane.firstComm + (item >> 1)];
    return late === NO_RANK ? -1 : lanes.findIndex((other) => other.rank === late);
  }
}
