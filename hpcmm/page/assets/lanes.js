// From packed arrays to a lane a rank: a row of phases and a row of communication.

const NO_RANK = -(2 ** 31);
const COMM_KINDS = ["wait", "transfer"];

function buildLanes(data, phase, comm) {
  let phaseAt = 0, commAt = 0;
  return data.lanes.map((lane) => {
    const built = { ...lane, firstPhase: phaseAt, firstComm: commAt };
    built.phaseRow = phaseRow(phase, phaseAt, lane.phases, data.phases.length);
    [built.commRow, built.commStart] = commRow(comm, commAt, lane.comm);
    phaseAt += lane.phases; commAt += lane.comm;
    return built;
  });
}

function phaseRow(phase, first, count, kindCount) {
  const starts = new Uint32Array(count), ends = new Uint32Array(count);
  for (let item = 0, at = 0; item < count; item += 1) {
    starts[item] = at + phase.gap[first + item];
    at = ends[item] = starts[item] + phase.length[first + item];
  }
  return new Row(starts, ends, phase.code.subarray(first, first + count), kindCount);
}

// Each collective is a waiting part, then a transfer part; of those in flight together the first has the time.
function commRow(comm, first, count) {
  const own = new Uint32Array(count);
  const starts = new Uint32Array(2 * count), ends = new Uint32Array(2 * count), kinds = new Uint8Array(2 * count);
  for (let item = 0, at = 0, reach = 0; item < count; item += 1) {
    at += comm.delta[first + item];
    own[item] = at;
    const begin = Math.max(at, reach), end = Math.max(begin, at + comm.length[first + item]);
    const split = Math.min(end, Math.max(begin, at + comm.wait[first + item]));
    starts[2 * item] = begin; ends[2 * item] = split;
    starts[2 * item + 1] = split; ends[2 * item + 1] = end; kinds[2 * item + 1] = 1;
    reach = end;
  }
  return [new Row(starts, ends, kinds, COMM_KINDS.length), own];
}

function limitsOf(lanes, second) {
  let from = Infinity, to = 0;
  for (const { phaseRow: phases, commRow: comms } of lanes) {
    for (const row of [phases, comms]) {
      if (!row.starts.length) continue;
      from = Math.min(from, row.starts[0]);
      to = Math.max(to, row.ends[row.ends.length - 1]);
    }
  }
  return from < to ? [from, to] : [0, second];
}
