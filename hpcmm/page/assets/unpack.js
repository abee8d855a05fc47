// Arrays as hpcmm.page.timeline packs them: bytes of one weight together, deflated, base64.

async function unpack(text, Type) {
  if (!text) return new Type(0);
  const packed = atob(text);
  const bytes = new Uint8Array(packed.length);
  for (let at = 0; at < packed.length; at += 1) bytes[at] = packed.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = Type.BYTES_PER_ELEMENT, count = planes.length / size;
  const whole = new Uint8Array(planes.length);
  for (let plane = 0; plane < size; plane += 1) {
    for (let item = 0, from = plane * count; item < count; item += 1) whole[item * size + plane] = planes[from + item];
  }
  return new Type(whole.buffer);
}

async function unpackAll(packed, types) {
  const names = Object.keys(types);
  const arrays = await Promise.all(names.map((name) => unpack(packed[name], types[name])));
  return Object.fromEntries(names.map((name, index) => [name, arrays[index]]));
}
