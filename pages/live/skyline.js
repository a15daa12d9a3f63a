// The widths of single layers: their bars, what they lose, and at which prices they would be chosen.

// Left and right of the bars, in CSS pixels: the axis and its numbers.
const BARS_LEFT = 34, BARS_RIGHT = 6;
const UNIT_NAMES = { mha: "query heads", mlp: "channels" };
const SIDE_NAMES = { mha: "MHA", mlp: "MLP" };
// A parameter's price is shown for a million of them.
const MILLION = 1e6;
// A mark this near to the price line, as a factor, counts as on it.
const NEAR = 1.25;

// Bars from a text such as 9x4.6h.9x25, which the address holds too; null where none is set.
function barsOf(text) {
  if (!text) return null;
  const bars = [];
  for (const part of text.split(".")) {
    const found = /^(\d+)(h?)(?:x(\d+))?$/.exec(part);
    if (!found) return null;
    for (let times = Number(found[3] ?? 1); times > 0; times--) bars.push({ units: Number(found[1]), hand: found[2] === "h" });
  }
  return bars;
}

function textOfBars(bars) {
  const runs = [];
  for (const { units, hand } of bars) {
    const name = `${units}${hand ? "h" : ""}`, last = runs.at(-1);
    if (last?.name === name) last.times += 1;
    else runs.push({ name, times: 1 });
  }
  return runs.map(({ name, times }) => (times > 1 ? `${name}x${times}` : name)).join(".");
}

// The nearest number of units that a layer can keep.
function possibleUnits(table, wanted) {
  if (table.units) return table.units.reduce((best, units) => (Math.abs(units - wanted) <= Math.abs(best - wanted) ? units : best));
  const even = Math.max(table.least, Math.round(wanted / table.step) * table.step);
  if (even > table.most || Math.abs(table.most - wanted) <= Math.abs(even - wanted)) return table.most;
  return even;
}

// The next smaller or larger number; `coarse` takes about a fiftieth of the MLP at once.
function nextUnits(table, units, direction, coarse) {
  if (table.units) {
    const place = table.units.indexOf(possibleUnits(table, units)) + direction;
    return table.units[Math.max(0, Math.min(table.units.length - 1, place))];
  }
  const stride = coarse ? Math.max(1, Math.round(table.most / 50 / table.step)) * table.step : table.step;
  const aim = units + direction * stride;
  return aim >= table.most ? table.most : Math.max(table.least, Math.floor(aim / table.step) * table.step);
}

// The cost of a model whose layers keep these units of each module.
function costOfLayers(data, units) {
  const cost = {};
  for (const name of COSTS) cost[name] = data.dense[name];
  for (const side of ["mha", "mlp"]) {
    const table = data.skyline[side], kept = units[side];
    const removed = kept.reduce((sum, each) => sum + table.most - each, 0);
    if (!removed) continue;
    for (const name of COSTS) cost[name] -= Math.round(removed * table.per_unit[name]);
    cost.parameters += Math.round(kept.length * table.bias_constant + (kept.length * table.most - removed) * table.bias_per_unit);
  }
  return cost;
}

// --- what widths lose ------------------------------------------------------------------------

function floatsOf(text) {
  return new Float32Array(bytesOf(text).buffer);
}

// Losses of a module's layers at the widths that were sent, in nats a token.
class Prices {
  constructor(table, perUnit) {
    this.units = table.units;
    this.losses = floatsOf(table.losses);
    this.perUnit = perUnit;
    this.layers = this.losses.length / this.units.length;
    this.uniform = { widths: "", losses: [] };
  }

  // What all layers lose that keep these units each, in nats a token.
  sum(unitsOf) {
    let lost = 0;
    for (let layer = 0; layer < this.layers; layer++) lost += this.at(layer, unitsOf(layer));
    return lost;
  }

  // What uniform cuts to these widths lose; kept, since it stays while bars are dragged.
  uniformLosses(widths) {
    const name = widths.join();
    if (this.uniform.widths !== name) this.uniform = { widths: name, losses: widths.map((units) => this.sum(() => units)) };
    return this.uniform.losses;
  }

  at(layer, units) {
    const place = this.below(units), last = this.units.length - 1;
    const low = this.losses[layer * this.units.length + place];
    if (place === last || units <= this.units[place]) return low;
    const share = (units - this.units[place]) / (this.units[place + 1] - this.units[place]);
    return low + share * (this.losses[layer * this.units.length + place + 1] - low);
  }

  below(units) {
    let place = 0;
    while (place < this.units.length - 1 && this.units[place + 1] <= units) place++;
    return place;
  }

  // Nats a parameter: what the next wider one would save, and what the next narrower would lose.
  // Between the two the layer keeps its width. Nothing is narrower than `least`.
  range(layer, units, least) {
    const place = this.below(units), here = this.at(layer, units), slope = (other) =>
      Math.abs(here - this.at(layer, other)) / (Math.abs(units - other) * this.perUnit);
    const wider = this.units[place + 1], narrower = units > this.units[place] ? this.units[place] : this.units[place - 1];
    const save = wider === undefined ? null : slope(wider), lose = narrower === undefined || narrower < least ? null : slope(narrower);
    return { save, lose };
  }

  best(layer, price, least) {
    let found = 0, lowest = Infinity;
    const last = this.units.length - 1;
    for (let place = 0; place <= last; place++) {
      if (this.units[place] < least && place !== last) continue;
      const total = this.losses[layer * this.units.length + place] + price * this.perUnit * this.units[place];
      if (total < lowest) [lowest, found] = [total, place];
    }
    return this.units[found];
  }
}

// The place among widths of uniform cuts, ascending in what they lose, of the one that loses as much
// as these units of single layers; a fraction between two of them, null beyond the last.
function placeOfEqualLoss(prices, uniform, units) {
  const lost = prices.sum((layer) => units[layer]), losses = prices.uniformLosses(uniform);
  const after = losses.findIndex((loss) => loss >= lost);
  if (after <= 0) return after < 0 ? null : 0;
  return after - (losses[after] - lost) / (losses[after] - losses[after - 1]);
}

// The price of a parameter at which layers that choose freely keep as many parameters as now; 0
// where that is all of them. `groups` are modules that share one budget, `free` their layers.
function multiplier(groups) {
  const budget = groups.reduce((sum, { prices, units, free }) => sum + prices.perUnit * free.reduce((kept, layer) => kept + units[layer], 0), 0);
  const kept = (price) => groups.reduce((sum, { prices, free, least }) => sum + prices.perUnit * free.reduce((part, layer) => part + prices.best(layer, price, least), 0), 0);
  if (!groups.length || kept(0) <= budget) return 0;
  let [low, high] = [1e-16, 1];
  for (let halving = 0; halving < 48; halving++) {
    const middle = Math.sqrt(low * high);
    if (kept(middle) > budget) low = middle;
    else high = middle;
  }
  return high;
}

// --- pictures --------------------------------------------------------------------------------

function barPlaces(width, layers) {
  const step = (width - BARS_LEFT - BARS_RIGHT) / layers;
  return { step, gap: step > 5 ? 1.5 : step > 3 ? 0.75 : 0, left: (layer) => BARS_LEFT + layer * step };
}

function layerUnder(x, width, layers) {
  const { step } = barPlaces(width, layers);
  return Math.max(0, Math.min(layers - 1, Math.floor((x - BARS_LEFT) / step)));
}

const BARS_TOP = 12, BARS_BOTTOM = 4;

function barHeightOf(canvas) {
  return canvas.clientHeight - BARS_TOP - BARS_BOTTOM;
}

function ticks(pen, width, ink, places) {
  pen.textAlign = "right";
  for (const [y, words] of places) {
    pen.fillStyle = ink.line;
    pen.fillRect(BARS_LEFT, Math.round(y), width - BARS_LEFT - BARS_RIGHT, 1);
    pen.fillStyle = ink.quiet;
    pen.fillText(words, BARS_LEFT - 5, y);
  }
}

function chosenColumn(pen, layer, layers, width, height, ink) {
  const { step, left } = barPlaces(width, layers);
  pen.fillStyle = ink.mark;
  pen.fillRect(left(layer), 0, step, height);
}

// `shares` of the dense width, 1 for all of it; `hand` says which bars a hand has set.
function drawBars(canvas, side, shares, hand, ink, chosen, undecided) {
  const { pen, width, height } = prepared(canvas), layers = shares.length;
  const { step, gap, left } = barPlaces(width, layers), tall = height - BARS_TOP - BARS_BOTTOM;
  chosenColumn(pen, chosen, layers, width, height, ink);
  const y = (share) => BARS_TOP + (1 - share) * tall;
  ticks(pen, width, ink, [[y(1), "100 %"], [y(0.5), "50 %"], [y(0), "0"]]);
  shares.forEach((share, layer) => {
    const [x, w] = [left(layer) + gap / 2, step - gap];
    pen.fillStyle = ink.gone;
    pen.fillRect(x, y(1), w, tall);
    pen.globalAlpha = undecided ? 0.35 : 1;
    pen.fillStyle = ink[side];
    pen.fillRect(x, y(share), w, share * tall);
    pen.globalAlpha = 1;
    if (w > 3) {
      pen.strokeStyle = ink.through;
      pen.strokeRect(x + 0.5, y(1) + 0.5, w - 1, tall - 1);
    }
    if (!hand[layer]) return;
    // A bar that a hand has set wears a triangle, and an edge of the text's colour.
    const middle = x + w / 2, half = Math.min(5, Math.max(2.5, w / 2));
    pen.fillStyle = ink.text;
    pen.beginPath();
    pen.moveTo(middle - half, 1); pen.lineTo(middle + half, 1); pen.lineTo(middle, 1 + 1.6 * half);
    pen.fill();
    pen.fillRect(x, y(share) - 1, w, 2);
  });
}

function drawLosses(canvas, side, losses, ink, chosen) {
  const { pen, width, height } = prepared(canvas), layers = losses.length;
  const { step, gap, left } = barPlaces(width, layers);
  chosenColumn(pen, chosen, layers, width, height, ink);
  const most = Math.max(1e-6, ...losses), y = (loss) => 8 + (1 - loss / most) * (height - 14);
  ticks(pen, width, ink, [[y(most), inFewDigits(most)], [y(0), "0"]]);
  pen.fillStyle = ink[side];
  losses.forEach((loss, layer) => pen.fillRect(left(layer) + gap / 2, y(loss), step - gap, y(0) - y(loss)));
}

// Each layer's range of prices at which it keeps its width, and the line of the multiplier.
function drawPrices(canvas, side, ranges, line, ink, chosen) {
  const { pen, width, height } = prepared(canvas), layers = ranges.length;
  const { step, gap, left } = barPlaces(width, layers), bottom = height - 14;
  chosenColumn(pen, chosen, layers, width, bottom, ink);
  const known = ranges.flatMap(({ save, lose }) => [save, lose]).filter((price) => price > 0);
  if (line > 0) known.push(line);
  if (!known.length) return;
  const middle = Math.log10(line > 0 ? line : Math.max(...known));
  const low = Math.max(middle - 2.5, Math.log10(Math.min(...known)) - 0.1), high = Math.min(middle + 2.5, Math.log10(Math.max(...known)) + 0.1);
  const span = Math.max(0.5, high - low);
  const y = (price) => 5 + (1 - Math.min(1, Math.max(0, (Math.log10(price) - low) / span))) * (bottom - 10);
  const decades = [];
  for (let power = Math.ceil(low); power <= low + span; power++) decades.push(power);
  const shown = decades.length ? decades.map((power) => 10 ** power) : [10 ** (low + span / 2)];
  ticks(pen, width, ink, shown.map((price) => [y(price), inFewDigits(price * MILLION)]));
  ranges.forEach((range, layer) => {
    const [x, w] = [left(layer) + gap / 2, step - gap];
    const [top, base] = [y(range.high ?? 10 ** (low + span)), y(range.low ?? 10 ** low)];
    const tall = Math.max(4, base - top), at = base - top < 4 ? (top + base) / 2 - 2 : top;
    const place = sideOfLine(range, line);
    pen.fillStyle = pen.strokeStyle = ink[side];
    pen.globalAlpha = place === 0 ? 0.45 : 1;
    // Below the line only an outline, above it full: the two are told apart without colour.
    if (place < 0) pen.strokeRect(x + 0.75, at + 0.75, Math.max(1, w - 1.5), tall - 1.5);
    else pen.fillRect(x, at, w, tall);
    pen.globalAlpha = 1;
  });
  if (line > 0) {
    pen.strokeStyle = ink.text;
    pen.setLineDash([6, 3]);
    pen.lineWidth = 1.5;
    pen.beginPath();
    pen.moveTo(BARS_LEFT, y(line)); pen.lineTo(width - BARS_RIGHT, y(line));
    pen.stroke();
    pen.setLineDash([]);
    pen.lineWidth = 1;
  }
  pen.fillStyle = ink.quiet;
  pen.textAlign = "center";
  const every = [1, 2, 5, 10, 20, 50].find((number) => number * step >= 22) ?? 50;
  for (let layer = 0; layer < layers; layer += every) pen.fillText(layer, left(layer) + step / 2, height - 6);
}

// From the two slopes at a width to the range of prices at which a layer keeps it.
function rangeOf({ save, lose }) {
  const [low, high] = [save, lose].map((price) => (price === null ? null : Math.max(price, 1e-18)));
  // Where losses are not convex the two change places: then no price chooses this width.
  return low !== null && high !== null && low > high ? { save, lose, low: high, high: low } : { save, lose, low, high };
}

// 1 where a layer is worth widening at this price, -1 where it is worth narrowing, else 0.
function sideOfLine({ save, lose }, line) {
  if (!(line > 0)) return 0;
  if (save !== null && save > line * NEAR) return 1;
  if (lose !== null && lose * NEAR < line) return -1;
  return 0;
}

function inFewDigits(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(2)).toString();
}

// Numbers of layers in words: 0–2, 5.
function layersInWords(layers) {
  const runs = [];
  for (const layer of layers) {
    const run = runs.at(-1);
    if (run && run.at(-1) === layer - 1) run.push(layer);
    else runs.push([layer]);
  }
  const words = runs.map((run) => (run.length > 1 ? `${run[0]}–${run.at(-1)}` : `${run[0]}`));
  return words.length > 6 ? `${words.slice(0, 6).join(", ")} and more` : words.join(", ");
}
