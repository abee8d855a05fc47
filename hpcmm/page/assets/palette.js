// The colours of report.css, which knows light from dark, as the canvas needs them.

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function channels(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

// One pixel as ImageData holds it: `share` of the colour over the ground.
function pixel(colour, ground, share) {
  const over = channels(colour), under = channels(ground);
  const [red, green, blue] = over.map((value, index) => Math.round(under[index] + (value - under[index]) * share));
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

// Black or white, whichever reads better on the colour (relative luminance as WCAG has it).
function textOn(colour) {
  const [red, green, blue] = channels(colour).map((value) => (value / 255) ** 2.2);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.3 ? "#000000" : "#ffffff";
}

// What a row of the timeline is painted with: a pixel for each kind, and one for the seam between two items of it.
class Paint {
  constructor(names, ground) {
    this.colours = names.map(cssColour);
    this.text = this.colours.map(textOn);
    this.solid = Uint32Array.from(this.colours, (colour) => pixel(colour, ground, 1));
    this.edge = Uint32Array.from(this.colours, (colour) => pixel(colour, ground, 0.55));
  }
}
