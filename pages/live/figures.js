// The figures at a slider position, computed from the tables that Python sent, and their texts.

const PERCENT = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });

const COSTS = ["parameters", "flops", "flops_per_context", "kv_values"];

// The cost of the cut at this position for each possible granularity: one, or several with `auto`.
function costsAt(data, view) {
  const mlp = data.mlp.options[data.mlp.option_at[view.mlp]];
  return data.mha.map((side) => {
    const mha = side.options[side.option_at[view.mha]];
    const cost = {};
    for (const name of COSTS) cost[name] = data.dense[name] - mha.saving[name] - mlp.saving[name];
    return cost;
  });
}

function figuresOf(data, cost, context) {
  const kv = cost.kv_values * context * data.saved_bytes;
  return {
    parameters: cost.parameters,
    weights4: cost.parameters * 4,
    weights2: cost.parameters * 2,
    kv,
    flops: cost.flops + cost.flops_per_context * context,
    serve: cost.parameters * data.saved_bytes + kv,
  };
}

function scaled(value, unit) {
  // Parameters are counted in millions, however many there are.
  if (unit === "M" && value >= 1e8) return `${Math.round(value / 1e6).toLocaleString("en")} M`;
  if (unit === "M") unit = "";
  const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [size, prefix] = steps.find(([size]) => value >= size) ?? [1, ""];
  const shown = value / size;
  const digits = size === 1 ? 0 : shown < 10 ? 2 : shown < 100 ? 1 : 0;
  return `${shown.toFixed(digits)} ${prefix}${unit}`.trim();
}

const UNITS = { parameters: "M", weights4: "B", weights2: "B", kv: "B", flops: "", serve: "B" };

function rangeInWords(values, unit) {
  const low = scaled(Math.min(...values), unit), high = scaled(Math.max(...values), unit);
  return low === high ? low : `${low} – ${high}`;
}

function changeInWords(values, dense) {
  const low = Math.min(...values) / dense - 1, high = Math.max(...values) / dense - 1;
  const words = (change) => (change ? `${change > 0 ? "+" : "−"}${PERCENT.format(Math.abs(change))}` : "unchanged");
  return low === high ? words(low) : `${words(low)} to ${words(high)}`;
}

// Along the sliders, whose widths are the same in every layer.
function predictionAt(data, view) {
  if (!data.prediction || data.mha.length > 1 || (data.choices.widths ?? "uniform") !== "uniform") return null;
  const row = data.mha[0].option_at[view.mha], column = data.mlp.option_at[view.mlp];
  const mid = data.prediction.mid[row]?.[column];
  if (mid === null || mid === undefined) return null;
  return { low: data.prediction.low[row][column], mid, high: data.prediction.high[row][column] };
}

// Between the widths of the options, at fractions of their places.
function predictionBetween(data, row, column) {
  const [top, left] = [Math.floor(row), Math.floor(column)], [down, right] = [row - top, column - left];
  const corners = [[0, 0], [0, 1], [1, 0], [1, 1]].map(([below, beside]) => [top + below, left + beside, (below ? down : 1 - down) * (beside ? right : 1 - right)]);
  const found = {};
  for (const name of ["low", "mid", "high"]) {
    const parts = corners.filter(([, , weight]) => weight > 0).map(([y, x, weight]) => [data.prediction[name][y]?.[x], weight]);
    if (parts.some(([value]) => value == null)) return null;
    found[name] = parts.reduce((sum, [value, weight]) => sum + weight * value, 0);
  }
  return found;
}

// The measured point of the bars that a hand has set.
function measuredByHand(data, view) {
  const plain = (text) => textOfBars(barsOf(text).map(({ units }) => ({ units, hand: false })));
  const [heads, channels] = [plain(view.heads), plain(view.channels)];
  return data.measured.find((point) => point.heads === heads && point.channels === channels) ?? null;
}

function measuredAt(data, view) {
  if (data.mha.length > 1) return null;
  const row = data.mha[0].option_at[view.mha], column = data.mlp.option_at[view.mlp];
  return data.measured.find((point) => point.mha === row && point.mlp === column) ?? null;
}

function bytesOf(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// Shares are sent as 16-bit integers, 65535 for 1.
function sharesOf(text) {
  return new Uint16Array(bytesOf(text).buffer);
}
