// Pictures on canvases. Each function draws a whole picture, which takes a few milliseconds.

function prepared(canvas, height) {
  const width = canvas.clientWidth, sharp = window.devicePixelRatio || 1;
  if (height !== undefined && canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
  const tall = height ?? canvas.clientHeight;
  const [w, h] = [Math.max(1, Math.round(width * sharp)), Math.max(1, Math.round(tall * sharp))];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const pen = canvas.getContext("2d");
  pen.setTransform(sharp, 0, 0, sharp, 0, 0);
  pen.clearRect(0, 0, width, tall);
  pen.font = `11px ${getComputedStyle(canvas).fontFamily}`;
  pen.textBaseline = "middle";
  return { pen, width, height: tall };
}

// Width of the axis of layer indices, in CSS pixels.
const AXIS = 22;

function rowHeight(layers) {
  return Math.max(7, Math.min(22, Math.floor(560 / layers)));
}

function layerNumbers(pen, layers, row, ink) {
  pen.fillStyle = ink.quiet;
  pen.textAlign = "right";
  const every = [1, 5, 10, 20, 50].find((step) => step * row >= 14) ?? 50;
  for (let layer = 0; layer < layers; layer += every) pen.fillText(layer, AXIS - 5, (layer + 0.5) * row);
}

// A module: two trapezoids, from the width of the residual stream to the waist and back.
function module(pen, middle, top, height, outer, waist, colour) {
  const centre = top + height / 2;
  pen.fillStyle = colour;
  pen.beginPath();
  pen.moveTo(middle - outer / 2, top);
  pen.lineTo(middle + outer / 2, top);
  pen.lineTo(middle + waist / 2, centre);
  pen.lineTo(middle + outer / 2, top + height);
  pen.lineTo(middle - outer / 2, top + height);
  pen.lineTo(middle - waist / 2, centre);
  pen.closePath();
  pen.fill();
}

function drawAnatomy(canvas, data, waists, ink, chosen) {
  const row = rowHeight(data.layers);
  const { pen, width, height } = prepared(canvas, row * data.layers);
  const widest = Math.max(data.hidden, data.mha[0].options[0].width, data.mlp.options[0].width);
  const scale = (width - AXIS - 2) / widest, middle = AXIS + (width - AXIS) / 2;
  const stream = data.hidden * scale;
  marked(pen, chosen, row, width, ink);
  pen.fillStyle = ink.stream;
  pen.fillRect(middle - stream / 2, 0, stream, height);
  // `waists` has both widths of every layer.
  for (let layer = 0; layer < data.layers; layer++) {
    const top = layer * row;
    const dense = [data.mha[0].options[0].width, data.mlp.options[0].width];
    [waists.mha[layer], waists.mlp[layer]].forEach((waist, place) => {
      const at = top + place * row / 2, tall = row / 2 - (row > 10 ? 1 : 0);
      module(pen, middle, at, tall, stream, dense[place] * scale, ink.gone);
      module(pen, middle, at, tall, stream, waist * scale, place ? ink.mlp : ink.mha);
    });
  }
  // A line for the residual stream through the modules, since their output is added to it.
  pen.fillStyle = ink.through;
  pen.fillRect(middle - 1.5, 0, 3, height);
  layerNumbers(pen, data.layers, row, ink);
}

function marked(pen, chosen, row, width, ink) {
  pen.fillStyle = ink.mark;
  pen.fillRect(0, chosen * row, width, row);
}

function drawLayer(canvas, data, waists, ink) {
  const { pen, width, height } = prepared(canvas);
  const widest = Math.max(data.hidden, data.mha[0].options[0].width, data.mlp.options[0].width);
  const scale = (width - 2) / widest, middle = width / 2, stream = data.hidden * scale;
  pen.fillStyle = ink.stream;
  pen.fillRect(middle - stream / 2, 0, stream, height);
  const tall = height / 2 - 24;
  [["mha", "MHA", 14], ["mlp", "MLP", height / 2 + 12]].forEach(([side, name, top]) => {
    const dense = side === "mha" ? data.mha[0].options[0].width : data.mlp.options[0].width;
    module(pen, middle, top, tall, stream, dense * scale, ink.gone);
    module(pen, middle, top, tall, stream, waists[side] * scale, ink[side]);
    pen.fillStyle = side === "mha" ? "#ffffff" : "#000000";
    pen.textAlign = "center";
    pen.fillText(`${name} ${waists[side].toLocaleString("en")}`, middle, top + tall / 2);
  });
  pen.fillStyle = ink.text;
  [7, height / 2 - 1, height - 5].forEach((at) => pen.fillText(data.hidden.toLocaleString("en"), middle, at));
}

function colourOf(ramp, share) {
  return ramp[Math.round(share * (ramp.length - 1))];
}

// `options` are those of the layers, null where they are not decided.
function drawHeads(canvas, data, tables, options, ink, chosen) {
  const row = rowHeight(data.layers);
  const { pen, width } = prepared(canvas, row * data.layers);
  marked(pen, chosen, row, width, ink);
  const count = data.heads, cell = (width - 1) / count, gap = cell > 5 && row > 8 ? 1 : 0;
  for (let layer = 0; layer < data.layers; layer++) {
    for (let head = 0; head < count; head++) {
      const place = layer * count + head, stays = options === null || tables.staysUntil[place] >= options[layer];
      const [x, y] = [head * cell, layer * row];
      const [w, h] = [cell - gap, row - gap];
      pen.fillStyle = colourOf(ink.ramp, tables.heads[place] / 255);
      if (stays) {
        pen.fillRect(x, y, w, h);
        continue;
      }
      pen.fillRect(x, y + h * 0.36, w, Math.max(1, h * 0.28));
    }
  }
}

// The map of scores is drawn once; the slider only moves the veil over the removed channels.
function channelImage(data, tables, ink) {
  const image = new ImageData(tables.ranks, data.layers);
  for (let place = 0; place < tables.channels.length; place++) {
    const [red, green, blue] = ink.rgb[Math.round(tables.channels[place] / 255 * (ink.rgb.length - 1))];
    image.data.set([red, green, blue, 255], place * 4);
  }
  const canvas = new OffscreenCanvas(tables.ranks, data.layers);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// `kept` is each layer's share of its channels.
function drawChannels(canvas, data, image, kept, ink, chosen) {
  const row = rowHeight(data.layers);
  const { pen, width, height } = prepared(canvas, row * data.layers);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image, 0, 0, width, height);
  kept.forEach((share, layer) => {
    if (share >= 1) return;
    const cut = share * width;
    pen.fillStyle = ink.veil;
    pen.fillRect(cut, layer * row, width - cut, row);
    pen.fillStyle = ink.mlp;
    pen.fillRect(cut - 1, layer * row, 2, row);
  });
  pen.strokeStyle = ink.text;
  pen.strokeRect(0.5, chosen * row + 0.5, width - 1, row - 1);
}

function drawEnergy(canvas, data, mha, mlp, ink, chosen) {
  const row = rowHeight(data.layers);
  const { pen, width, height } = prepared(canvas, row * data.layers);
  marked(pen, chosen, row, width, ink);
  const at = (share) => 4 + share * (width - 8);
  pen.strokeStyle = ink.line;
  pen.beginPath();
  [0, 0.5, 1].forEach((share) => { pen.moveTo(at(share), 0); pen.lineTo(at(share), height); });
  pen.stroke();
  const size = Math.max(1.8, Math.min(3.5, row / 4));
  [[mlp, ink.mlp, 0.72], [mha, ink.mha, 0.28]].forEach(([shares, colour, place]) => {
    if (!shares) return;
    pen.fillStyle = colour;
    for (let layer = 0; layer < data.layers; layer++) {
      pen.beginPath();
      pen.arc(at(shares[layer]), (layer + place) * row, size, 0, 2 * Math.PI);
      pen.fill();
    }
  });
}

function drawCurve(canvas, tables, layer, kept, ink) {
  const { pen, width, height } = prepared(canvas);
  const x = (place) => place * (width - 2) + 1, y = (share) => height - 2 - share * (height - 6);
  const shares = tables.channels.subarray(layer * tables.ranks, (layer + 1) * tables.ranks);
  const last = tables.ranks - 1;
  const area = (from, to, colour) => {
    pen.beginPath();
    pen.moveTo(x(from), y(0));
    for (let rank = 0; rank <= last; rank++) {
      const place = rank / Math.max(1, last);
      if (place >= from && place <= to) pen.lineTo(x(place), y(shares[rank] / 255));
    }
    pen.lineTo(x(to), y(0));
    pen.closePath();
    pen.fillStyle = colour;
    pen.fill();
  };
  area(0, kept, ink.mlp);
  area(kept, 1, ink.goneStrong);
  pen.fillStyle = ink.text;
  pen.fillRect(x(kept) - 0.5, 0, 1, height);
}

// Perplexity along one slider, with the other slider at its present position.
// `here` says whether that is the cut in view, and not only its budget.
function drawStrip(canvas, data, side, view, ink, here) {
  const { pen, width, height } = prepared(canvas);
  const at = (place) => 8 + place / 95 * (width - 16);
  const along = Array.from({ length: 96 }, (_, place) => predictionAt(data, { ...view, [side]: place }));
  const places = new Map();
  for (let place = 0; place < 96; place++) {
    const point = measuredAt(data, { ...view, [side]: place });
    if (point) places.set(point, [...(places.get(point) ?? []), place]);
  }
  // Several positions give the width of a point: it is drawn at the slider, or in their middle.
  const dots = [...places].map(([point, all]) => [all.includes(view[side]) ? view[side] : all[all.length >> 1], point]);
  if (along.every((ratio) => !ratio) && !dots.length) {
    pen.fillStyle = ink.quiet;
    pen.fillText(data.mha.length > 1 ? "" : "Perplexity along this slider: nothing is measured or predicted yet", 0, height / 2, width);
    return;
  }
  const highest = 4, y = (ratio) => 4 + (1 - Math.log(Math.min(highest, Math.max(1, ratio))) / Math.log(highest)) * (height - 8);
  const levels = [[1, "dense"], [2, "2 ×"], [4, "≥ 4 ×"]];
  pen.strokeStyle = ink.line;
  levels.forEach(([ratio]) => {
    pen.beginPath(); pen.moveTo(8, y(ratio)); pen.lineTo(width - 44, y(ratio)); pen.stroke();
  });
  const known = along.map((ratio, place) => [place, ratio]).filter(([, ratio]) => ratio);
  if (known.length) {
    pen.beginPath();
    known.forEach(([place, ratio]) => pen.lineTo(at(place), y(ratio.high)));
    known.toReversed().forEach(([place, ratio]) => pen.lineTo(at(place), y(ratio.low)));
    pen.closePath();
    pen.globalAlpha = 0.22;
    pen.fillStyle = ink[side];
    pen.fill();
    pen.globalAlpha = 1;
    pen.strokeStyle = ink[side];
    pen.lineWidth = 2;
    pen.beginPath();
    known.forEach(([place, ratio]) => pen.lineTo(at(place), y(ratio.mid)));
    pen.stroke();
    pen.lineWidth = 1;
  }
  const dot = (place, ratio, fill) => {
    pen.beginPath(); pen.arc(at(place), y(ratio), 4, 0, 2 * Math.PI);
    pen.fillStyle = fill; pen.strokeStyle = ink.text; pen.fill(); pen.stroke();
  };
  const now = along[view[side]];
  if (here && now) dot(view[side], now.mid, ink[side]);
  dots.forEach(([place, point]) => dot(place, point.ratio, ink.paper));
  // Labels are drawn last, with an outline in the background colour, over the band.
  pen.save();
  Object.assign(pen, { textAlign: "right", font: pen.font.replace("11px", "10px"), strokeStyle: ink.paper, fillStyle: ink.quiet, lineWidth: 3 });
  levels.forEach(([ratio, name]) => {
    const middle = Math.min(height - 6, Math.max(6, y(ratio)));
    pen.strokeText(name, width - 10, middle); pen.fillText(name, width - 10, middle);
  });
  pen.restore();
}
