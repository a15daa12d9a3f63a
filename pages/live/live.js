// The live view. It follows a slider while it is dragged and sends Python the position when it rests.

// A slider rests when it has not moved for this many milliseconds.
const REST_MS = 250;
// Key of the undo history in the tab's session storage.
const HISTORY = "transact-positions";

class LiveView {
  constructor(root) {
    this.root = root;
    this.find = (selector) => root.querySelector(selector);
    // The texts of heads and channels are empty where no hand has set a bar and nothing is filled.
    this.view = { mha: 0, mlp: 0, context: 1024, heads: "", channels: "" };
    this.layer = 0;
    this.history = [];
    this.step = -1;
    this.serial = 0;
    this.inputs = { mha: this.find("#live-mha"), mlp: this.find("#live-mlp"), context: this.find("#live-context") };
    for (const [name, input] of Object.entries(this.inputs)) {
      input.addEventListener("input", () => this.moved(name, input));
      input.addEventListener("change", () => this.rest());
    }
    const layer = this.find("#live-layer");
    layer.addEventListener("input", () => this.look(Number(layer.value)));
    for (const name of ["anatomy", "heads", "channels", "energy"]) {
      const canvas = this.find(`canvas.${name}`);
      canvas.addEventListener("pointermove", (event) => this.look(Math.floor(event.offsetY / rowHeight(this.data.layers))));
    }
    for (const side of ["mha", "mlp"]) this.listenToBars(side);
    root.addEventListener("click", (event) => this.pressed(event.target.closest("button")));
    root.addEventListener("keydown", (event) => this.typed(event));
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.find(".live"));
  }

  update({ data, setStateValue, setTriggerValue }) {
    if (!data) return;
    [this.send, this.ask] = [setStateValue, setTriggerValue];
    const first = !this.data, tablesChanged = JSON.stringify(data.maps) !== this.mapsRead;
    this.data = data;
    this.readTheme();
    if (tablesChanged) this.readMaps();
    this.readPrices();
    if (first || data.start.revision !== this.revision) {
      this.revision = data.start.revision;
      const { mha, mlp, context, heads, channels } = data.start;
      this.view = { mha, mlp, context, heads, channels };
      if (first) this.resume();
      if (first) this.showPresets();
    }
    this.remember();
    this.show();
  }

  close() {
    clearTimeout(this.timer);
    cancelAnimationFrame(this.frame);
    this.resized.disconnect();
  }

  // --- data from Python -------------------------------------------------------------------

  readTheme() {
    const live = this.find(".live");
    const { colours } = this.data;
    live.style.setProperty("--mha", colours.mha);
    live.style.setProperty("--mlp", colours.mlp);
    const style = getComputedStyle(live);
    const value = (name) => style.getPropertyValue(name).trim();
    const text = value("--st-text-color"), paper = value("--st-background-color");
    const mixed = (share) => `color-mix(in srgb, ${text} ${share}%, transparent)`;
    const rgb = colours.ramp.map((colour) => colour.match(/\w\w/g).map((pair) => parseInt(pair, 16)));
    this.ink = {
      ...colours, text, paper, rgb, quiet: mixed(65), line: mixed(18), stream: mixed(14), through: mixed(45),
      gone: mixed(22), goneStrong: mixed(35), mark: mixed(10), veil: `color-mix(in srgb, ${paper} 78%, transparent)`,
    };
  }

  readMaps() {
    const { maps, layers } = this.data;
    this.mapsRead = JSON.stringify(maps);
    this.image = this.tables = null;
    if (!maps) return;
    const channels = bytesOf(maps.channels);
    this.tables = {
      heads: bytesOf(maps.heads), channels, ranks: channels.length / layers,
      staysUntil: maps.stays_until && bytesOf(maps.stays_until),
      energy: { mha: maps.energy_mha && sharesOf(maps.energy_mha), mlp: sharesOf(maps.energy_mlp) },
    };
    this.image = channelImage(this.data, this.tables, this.ink);
  }

  showPresets() {
    const box = this.find(".presets");
    box.replaceChildren(...this.data.presets.map(({ name, mha, mlp }) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: name, title: `MHA ${mha} %, MLP ${mlp} %` });
      Object.assign(button.dataset, { do: "preset", mha, mlp });
      return button;
    }));
  }

  // --- input of the visitor ---------------------------------------------------------------

  moved(name, input) {
    const value = Math.round(Number(input.value));
    if (!(value >= Number(input.min) && value <= Number(input.max)) || input.value === "") return;
    this.view = { ...this.view, [name]: value };
    if (name !== "context") this.followBudget(name);
    this.show();
    this.restSoon();
  }

  restSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.rest(), REST_MS);
  }

  // Puts the sliders somewhere, with the same widths in every layer.
  place(view) {
    this.view = { ...this.view, heads: "", channels: "", ...view };
    this.show();
    this.rest();
  }

  rest() {
    clearTimeout(this.timer);
    this.remember();
    this.tell();
    this.find(".said").textContent = this.summary();
  }

  look(layer) {
    if (!(layer >= 0 && layer < this.data.layers)) return;
    this.layer = layer;
    this.show();
  }

  pressed(button) {
    const what = button?.dataset.do;
    if (what === "undo") this.go(-1);
    if (what === "redo") this.go(1);
    if (what === "reset") this.place({ mha: 0, mlp: 0 });
    if (what === "preset") this.place({ mha: Number(button.dataset.mha), mlp: Number(button.dataset.mlp) });
    if (what === "link") this.copyLink(button);
    if (what === "uniform") this.uniformAgain();
    if ((what === "fill" || what === "price") && button.getAttribute("aria-disabled") !== "true") {
      this.rest();
      this.serial += 1;
      this.ask(what, { ...this.view, revision: this.revision, serial: this.serial });
    }
  }

  typed(event) {
    if (!(event.ctrlKey || event.metaKey)) return;
    const key = event.key.toLowerCase();
    const by = key === "y" || (key === "z" && event.shiftKey) ? 1 : key === "z" ? -1 : 0;
    if (!by) return;
    event.preventDefault();
    this.go(by);
  }

  // --- widths of single layers ------------------------------------------------------------

  listenToBars(side) {
    const module = this.find(`.module[data-side="${side}"]`), canvas = module.querySelector(".bars");
    for (const each of module.querySelectorAll("canvas"))
      each.addEventListener("pointermove", (event) => { if (!this.grabbed) this.look(layerUnder(event.offsetX, each.clientWidth, this.data.layers)); });
    const drag = (event) => {
      const share = 1 - (event.offsetY - BARS_TOP) / barHeightOf(canvas);
      const { most } = this.data.skyline[side];
      this.setBar(side, this.grabbed.layer, possibleUnits(this.data.skyline[side], Math.max(0, Math.min(1, share)) * most));
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (this.data.skyline.fixed || event.button) return;
      const layer = layerUnder(event.offsetX, canvas.clientWidth, this.data.layers);
      this.grabbed = { side, layer };
      canvas.setPointerCapture(event.pointerId);
      this.look(layer);
      drag(event);
    });
    canvas.addEventListener("pointermove", (event) => { if (this.grabbed?.side === side) drag(event); });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => {
      if (!this.grabbed) return;
      this.grabbed = null;
      this.rest();
    });
    canvas.addEventListener("dblclick", () => this.giveBack(side, this.layer));
    canvas.addEventListener("keydown", (event) => this.typedOnBars(side, event));
  }

  typedOnBars(side, event) {
    const table = this.data.skyline[side], { layers } = this.data;
    const along = { ArrowLeft: this.layer - 1, ArrowRight: this.layer + 1 }[event.key];
    if (along !== undefined) {
      event.preventDefault();
      this.look(Math.max(0, Math.min(layers - 1, along)));
      return;
    }
    if (this.data.skyline.fixed || event.ctrlKey || event.metaKey) return;
    const units = this.unitsNow()[side][this.layer].units;
    const aim = {
      ArrowUp: nextUnits(table, units, 1, !event.shiftKey), ArrowDown: nextUnits(table, units, -1, !event.shiftKey),
      PageUp: possibleUnits(table, units + table.most / 10), PageDown: possibleUnits(table, Math.max(table.least, units - table.most / 10)),
      Home: table.most, End: table.least,
    }[event.key];
    if (aim !== undefined) {
      event.preventDefault();
      this.setBar(side, this.layer, aim);
      this.restSoon();
    }
    if (event.key === "Delete" || event.key === "Backspace") {
      event.preventDefault();
      this.giveBack(side, this.layer);
    }
  }

  // The bars as they stand, those of the sliders included.
  unitsNow() {
    const own = this.ownUnits();
    if (own) return own;
    const bars = (side) => Array.from({ length: this.data.layers }, () => ({ units: this.unitsOfSlider(side), hand: false }));
    return { mha: bars("mha"), mlp: bars("mlp") };
  }

  unitsOfSlider(side) {
    const { mha, mlp } = this.optionsAt();
    if (side === "mlp") return mlp.width;
    return Math.round(mha[0].width / this.data.mha[0].options[0].width * this.data.skyline.mha.most);
  }

  setBar(side, layer, units, hand = true) {
    const bars = this.unitsNow();
    bars[side] = bars[side].map((bar, place) => (place === layer ? { units, hand } : bar));
    this.takeBars(bars);
    this.show();
  }

  // Bars that are all as the sliders say, and none of which a hand has set, need no text.
  takeBars(bars) {
    const plain = ["mha", "mlp"].every((side) => bars[side].every((bar) => !bar.hand && bar.units === this.unitsOfSlider(side)));
    const [heads, channels] = plain ? ["", ""] : [textOfBars(bars.mha), textOfBars(bars.mlp)];
    this.view = { ...this.view, heads, channels };
  }

  // Gives a bar back to the sliders and the allocator.
  giveBack(side, layer) {
    if (!this.byHand) return;
    this.setBar(side, layer, this.unitsOfSlider(side), false);
    this.rest();
  }

  // A slider has moved: the bars of its module that no hand has set go with it.
  followBudget(side) {
    if (!this.byHand) return;
    const bars = this.unitsNow();
    bars[side] = bars[side].map((bar) => (bar.hand ? bar : { units: this.unitsOfSlider(side), hand: false }));
    this.takeBars(bars);
  }

  uniformAgain() {
    // Bars that were moved a moment ago have not rested yet, and are to be undone to.
    this.remember();
    this.view = { ...this.view, heads: "", channels: "" };
    const { choices } = this.data;
    this.asked = choices.widths && choices.widths !== "uniform" ? { ...choices, widths: "uniform" } : null;
    this.show();
    if (!this.asked) {
      this.rest();
      return;
    }
    clearTimeout(this.timer);
    this.tell(this.asked);
  }

  layerParameters(layer, own) {
    const { data } = this;
    return ["mha", "mlp"].reduce((sum, side) => {
      const table = data.skyline[side], bars = own[side];
      const cut = bars.some((bar) => bar.units < table.most);
      const added = cut ? table.bias_constant + table.bias_per_unit * bars[layer].units : 0;
      return sum - Math.round((table.most - bars[layer].units) * table.per_unit.parameters) + Math.round(added);
    }, data.layer_parameters);
  }

  readPrices() {
    const { prices, skyline } = this.data, read = JSON.stringify(prices);
    if (read === this.pricesRead) return;
    this.pricesRead = read;
    this.prices = prices && skyline.mha && {
      mha: new Prices(prices.mha, skyline.mha.per_unit.parameters), mlp: new Prices(prices.mlp, skyline.mlp.per_unit.parameters),
    };
  }

  // The price line of each module: one for both where heads are traded against channels.
  priceLines(bars) {
    const group = (side) => {
      const free = bars[side].map((bar, layer) => (bar.hand ? -1 : layer)).filter((layer) => layer >= 0);
      const all = bars[side].map((_, layer) => layer);
      return {
        prices: this.prices[side], units: bars[side].map((bar) => bar.units), free: free.length ? free : all,
        least: this.data.skyline.floor * this.unitsOfSlider(side),
      };
    };
    const sides = ["mha", "mlp"].filter((side) => bars[side].some((bar) => bar.units < this.data.skyline[side].most));
    if (this.data.choices.widths === "traded" && !this.byHand) {
      const line = multiplier(sides.map(group));
      return { mha: sides.includes("mha") ? line : 0, mlp: sides.includes("mlp") ? line : 0 };
    }
    return { mha: sides.includes("mha") ? multiplier([group("mha")]) : 0, mlp: sides.includes("mlp") ? multiplier([group("mlp")]) : 0 };
  }

  conclusionOfBars(side) {
    const { data, widths } = this, dense = (side === "mha" ? data.mha[0] : data.mlp).options[0].width;
    const name = SIDE_NAMES[side], own = this.ownUnits();
    if (data.mha.length > 1 && side === "mha") return `${name}: auto has not decided; at most what is drawn.`;
    if (this.undecided) return `${name}: each layer's width is chosen when the cut is measured; drawn is the mean.`;
    const least = Math.min(...widths[side]), mean = widths[side].reduce((sum, width) => sum + width, 0) / widths[side].length / dense;
    if (!own || least === Math.max(...widths[side])) return `${name}: every layer keeps ${PERCENT.format(least / dense)} of its width.`;
    const table = data.skyline[side], layer = widths[side].indexOf(least);
    const set = own[side].filter((bar) => bar.hand).length;
    return `${name}: ${PERCENT.format(mean)} of the width stays; layer ${layer} keeps least, ${own[side][layer].units.toLocaleString("en")} of ${table.most.toLocaleString("en")} ${UNIT_NAMES[side]}.`
      + (set ? ` ${set} set by hand.` : "");
  }

  writeSkyline() {
    const { data, layer } = this, own = this.ownUnits(), { fixed } = data.skyline;
    this.undecided = !own && data.choices.widths !== undefined && data.choices.widths !== "uniform" && (this.view.mha > 0 || this.view.mlp > 0);
    const box = this.find(".skylines"), bars = fixed ? null : this.unitsNow();
    box.dataset.fixed = fixed ? "yes" : "no";
    this.find('[data-do="fill"]').setAttribute("aria-disabled", Boolean(fixed) || data.filling);
    this.find('[data-do="uniform"]').setAttribute("aria-disabled", !this.byHand && (data.choices.widths ?? "uniform") === "uniform");
    this.lines = this.prices && bars ? this.priceLines(bars) : null;
    const parts = [];
    for (const side of ["mha", "mlp"]) {
      const module = this.find(`.module[data-side="${side}"]`), words = (name, text) => { module.querySelector(`[data-of="${name}"]`).textContent = text; };
      words("bars", this.conclusionOfBars(side));
      for (const name of ["losses", "prices"]) {
        module.querySelector(`canvas.${name}`).hidden = !this.lines;
        module.querySelector(`[data-of="${name}"]`).hidden = !this.lines;
      }
      const canvas = module.querySelector(".bars");
      if (bars) {
        const bar = bars[side][layer], table = data.skyline[side];
        const said = `Layer ${layer}: ${bar.units.toLocaleString("en")} of ${table.most.toLocaleString("en")} ${UNIT_NAMES[side]}${bar.hand ? ", set by hand" : ""}`;
        canvas.setAttribute("aria-valuemin", table.least);
        canvas.setAttribute("aria-valuemax", table.most);
        canvas.setAttribute("aria-valuenow", bar.units);
        canvas.setAttribute("aria-valuetext", said);
      }
      canvas.setAttribute("aria-disabled", Boolean(fixed));
      if (!this.lines) continue;
      this.writeLosses(side, bars[side], words);
      parts.push(this.layerInWords(side, bars[side]));
    }
    this.find(".pricing").hidden = Boolean(fixed) || Boolean(this.prices);
    this.find('[data-do="price"]').setAttribute("aria-disabled", Boolean(data.pricing.busy));
    this.find(".pricing-words").textContent = data.pricing.words;
    const how = "Drag a bar, or walk to it by ← and → and change it by ↑ and ↓ (finely with Shift); Delete or a double click gives it back. ▼ marks bars that a hand has set.";
    this.find(".skyline-words").textContent = fixed ? `Bars show what stays of each layer's width. They cannot be set by hand here. ${fixed}`
      : `${parts.length ? `Layer ${layer}: ${parts.join("; ")}.\n` : ""}${how}`;
  }

  writeLosses(side, bars, words) {
    const losses = bars.map((bar, layer) => this.prices[side].at(layer, bar.units));
    const total = losses.reduce((sum, loss) => sum + loss, 0), most = losses.indexOf(Math.max(...losses));
    const line = this.lines[side];
    words("losses", total > 0 ? `Predicted damage, nats a token: layer ${most} loses most, ${inFewDigits(losses[most])} of ${inFewDigits(total)} in all.` : "Predicted damage, nats a token: none.");
    if (!(line > 0)) {
      words("prices", "Price of a million parameters, nats a token, by layer: nothing is cut.");
      return;
    }
    const off = (which) => bars.map((bar, layer) => (sideOfLine(this.rangeAt(side, layer, bar), line) === which ? layer : -1)).filter((layer) => layer >= 0);
    const [widen, narrow] = [off(1), off(-1)];
    const advice = [widen.length && `Worth widening: ${layersInWords(widen)} (full, above).`, narrow.length && `Worth narrowing: ${layersInWords(narrow)} (outlined, below).`].filter(Boolean);
    words("prices", `Price of a million parameters, nats a token, by layer; the line is the budget's, ${inFewDigits(line * MILLION)}. `
      + (advice.length ? advice.join(" ") : "Every layer is at the width that this price asks for."));
  }

  // As `Prices.range`; a bar that is not set by hand goes no lower than the allocator's floor.
  rangeAt(side, layer, { units, hand }) {
    return this.prices[side].range(layer, units, hand ? 0 : this.data.skyline.floor * this.unitsOfSlider(side));
  }

  layerInWords(side, bars) {
    const { layer } = this, { units, hand } = bars[layer], price = this.rangeAt(side, layer, bars[layer]);
    const slopes = [price.save !== null && `widening it would save ${inFewDigits(price.save * MILLION)}`, price.lose !== null && `narrowing it lose ${inFewDigits(price.lose * MILLION)}`].filter(Boolean);
    return `${SIDE_NAMES[side]} ${units.toLocaleString("en")}${hand ? " by hand" : ""} loses ${inFewDigits(this.prices[side].at(layer, units))} nats, ${slopes.join(", ")} a million parameters`;
  }

  drawSkyline() {
    const { data, widths, ink, layer } = this, bars = data.skyline.fixed ? null : this.unitsNow();
    for (const side of ["mha", "mlp"]) {
      const module = this.find(`.module[data-side="${side}"]`), dense = (side === "mha" ? data.mha[0] : data.mlp).options[0].width;
      const hand = bars ? bars[side].map((bar) => bar.hand) : Array(data.layers).fill(false);
      const open = this.undecided || (side === "mha" && data.mha.length > 1);
      drawBars(module.querySelector(".bars"), side, widths[side].map((width) => width / dense), hand, ink, layer, open);
      if (!this.lines) continue;
      drawLosses(module.querySelector(".losses"), side, bars[side].map((bar, place) => this.prices[side].at(place, bar.units)), ink, layer);
      drawPrices(module.querySelector(".prices"), side, bars[side].map((bar, place) => rangeOf(this.rangeAt(side, place, bar))), this.lines[side], ink, layer);
    }
  }

  // --- history ----------------------------------------------------------------------------

  get entry() {
    return { ...this.view, choices: this.data.choices };
  }

  // Leaving the page ends this view, so the history is kept in the session storage of the tab.
  resume() {
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(HISTORY)); } catch { /* no storage: a new history */ }
    if (kept && JSON.stringify(kept.history[kept.step]) === JSON.stringify(this.entry)) {
      [this.history, this.step] = [kept.history, kept.step];
    }
  }

  remember() {
    if (this.asked && JSON.stringify(this.asked) !== JSON.stringify(this.data.choices)) return;
    this.asked = null;
    if (JSON.stringify(this.history[this.step]) !== JSON.stringify(this.entry)) {
      this.history = [...this.history.slice(0, this.step + 1), this.entry].slice(-200);
      this.step = this.history.length - 1;
    }
    this.keepHistory();
  }

  keepHistory() {
    try { sessionStorage.setItem(HISTORY, JSON.stringify({ history: this.history, step: this.step })); } catch { /* full */ }
  }

  go(by) {
    clearTimeout(this.timer);
    const aim = this.history[this.step + by];
    if (!aim) return;
    this.step += by;
    const { choices, ...view } = aim;
    this.view = view;
    // The choices are controls of the page, so Python is asked to set them.
    this.asked = JSON.stringify(choices) === JSON.stringify(this.data.choices) ? null : choices;
    this.keepHistory();
    this.show();
    this.tell(this.asked);
    this.find(".said").textContent = this.summary();
  }

  tell(choices) {
    const message = JSON.stringify([this.view, this.revision]);
    if (message === this.lastSent && !choices) return;
    this.lastSent = message;
    this.serial += 1;
    this.send("view", { ...this.view, revision: this.revision, ...(choices ? { choices, serial: this.serial } : {}) });
  }

  async copyLink(button) {
    const link = new URL(window.location.href);
    for (const [name, value] of Object.entries({ ...this.data.choices, ...this.view })) {
      if (value === "") link.searchParams.delete(name);
      else link.searchParams.set(name, value);
    }
    const field = this.find(".address");
    field.value = link.href;
    try {
      await navigator.clipboard.writeText(link.href);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy link"; }, 1500);
    } catch {
      field.hidden = false;
      field.select();
    }
  }

  // --- drawing ----------------------------------------------------------------------------

  show() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.write();
      this.draw();
      this.find(".live").dataset.choices = Object.values(this.data.choices).join(",");
      this.find(".live").dataset.widths = `${this.view.heads}|${this.view.channels}`;
      this.find(".live").dataset.shown = `${this.view.mha},${this.view.mlp},${this.view.context}`;
    });
  }

  optionsAt() {
    const { data, view } = this;
    return { mha: data.mha.map((side) => side.options[side.option_at[view.mha]]), mlp: data.mlp.options[data.mlp.option_at[view.mlp]] };
  }

  // The widths of single layers, where they are not simply those of the sliders: as a hand has set
  // them, or as the allocator has chosen them for these ratios.
  ownUnits() {
    const { data, view } = this, { decided } = data;
    if (!data.skyline.mha) return null;
    const heads = barsOf(view.heads), channels = barsOf(view.channels);
    if (heads?.length === data.layers && channels?.length === data.layers) return { mha: heads, mlp: channels };
    if (decided && decided.mha === view.mha && decided.mlp === view.mlp) return { mha: barsOf(decided.heads), mlp: barsOf(decided.channels) };
    return null;
  }

  get byHand() {
    return this.data.skyline.mha !== undefined && this.view.heads !== "";
  }

  // Of each layer: the width of both waists, and the option of the heads' map.
  layerWidths() {
    const { data } = this, { mha, mlp } = this.optionsAt(), own = this.ownUnits();
    const same = (value) => Array(data.layers).fill(value);
    if (!own) {
      return {
        mha: same(Math.max(...mha.map((option) => option.width))), mlp: same(mlp.width),
        mhaOption: data.mha.length === 1 ? same(data.mha[0].option_at[this.view.mha]) : null,
      };
    }
    const headDim = data.mha[0].options[0].width / data.skyline.mha.most, options = data.mha[0].options;
    const widths = own.mha.map((bar) => bar.units * headDim);
    const optionOf = (width) => {
      const place = options.findIndex((option) => option.width <= width);
      return place < 0 ? options.length - 1 : place;
    };
    return { mha: widths, mlp: own.mlp.map((bar) => bar.units), mhaOption: widths.map(optionOf) };
  }

  costs() {
    const own = this.ownUnits();
    if (!own) return costsAt(this.data, this.view);
    return [costOfLayers(this.data, { mha: own.mha.map((bar) => bar.units), mlp: own.mlp.map((bar) => bar.units) })];
  }

  write() {
    const { data, view } = this;
    const { mha, mlp } = this.optionsAt();
    this.widths = this.layerWidths();
    for (const side of ["mha", "mlp"]) {
      const box = this.find(`.slider[data-side="${side}"]`), input = this.inputs[side];
      if (Number(input.value) !== view[side]) input.value = view[side];
      input.style.setProperty("--at", `calc(8px + (100% - 16px) * ${view[side] / 95})`);
      box.querySelector("output").textContent = `${view[side]} %`;
      const words = side === "mlp" ? mlp.words : data.mha.map((table, index) =>
        (data.mha.length > 1 ? `${table.granularity}: ` : "") + mha[index].words).join(" ");
      input.setAttribute("aria-valuetext", `${view[side]} percent. ${words}`);
      const budget = this.byHand ? "The budget; the bars below are cut. " : "";
      box.querySelector(".words").textContent = `${budget}${words} ${side === "mlp" ? data.mlp.possible : data.mha.length > 1 ? data.undecided : data.mha[0].possible}`;
    }
    if (this.root.activeElement !== this.inputs.context) this.inputs.context.value = view.context;
    const every = this.costs().map((cost) => figuresOf(data, cost, view.context));
    const whole = figuresOf(data, data.dense, view.context);
    for (const name of Object.keys(whole)) {
      const values = every.map((figures) => figures[name]), value = this.find(`[data-figure="${name}"]`);
      value.value = Math.min(...values);
      value.textContent = rangeInWords(values, UNITS[name]);
      value.title = values.map((amount) => amount.toLocaleString("en")).join(" or ") + ` of the dense model's ${whole[name].toLocaleString("en")}`;
      this.find(`[data-note="${name}"]`).textContent = changeInWords(values, whole[name]);
    }
    this.writePrediction();
    this.writeSkyline();
    this.find(".reading").textContent = data.serving;
    for (const button of this.root.querySelectorAll(".presets button"))
      button.setAttribute("aria-pressed", !this.byHand && Number(button.dataset.mha) === view.mha && Number(button.dataset.mlp) === view.mlp);
    this.find('[data-do="undo"]').setAttribute("aria-disabled", this.step <= 0);
    this.find('[data-do="redo"]').setAttribute("aria-disabled", this.step >= this.history.length - 1);
    this.writeLayer(mha, mlp);
    this.writeCaptions(mha, mlp);
  }

  writePrediction() {
    const { data, view } = this;
    const predicted = this.ownUnits() ? this.predictionOfBars() : predictionAt(data, view);
    const measured = this.byHand ? measuredByHand(data, view) : measuredAt(data, view);
    const nothing = view.mha === 0 && view.mlp === 0 && !this.byHand;
    const value = this.find('[data-figure="predicted"]'), note = this.find('[data-note="predicted"]');
    const scale = data.dense_perplexity ?? 1, unit = data.dense_perplexity ? "" : " × dense";
    const between = ({ low, high }, scale) => `${(low * scale).toFixed(2)} to ${(high * scale).toFixed(2)}`;
    const parts = [];
    if (measured) {
      parts.push(`${measured.ratio.toFixed(2)} × dense${measured.low == null ? "" : `, ${between(measured, 1)} (95 %)`}`);
      if (predicted) parts.push(`predicted ${between(predicted, scale)} ${data.interval}`);
    } else if (predicted) {
      if (data.dense_perplexity) parts.push(`${predicted.mid.toFixed(2)} × dense`);
      parts.push(`${between(predicted, scale)} ${data.interval}`);
    }
    const shown = measured?.ratio ?? predicted?.mid;
    this.find('[data-name="perplexity"]').textContent = `Perplexity, ${measured ? "measured" : "predicted"}`;
    value.value = shown ?? "";
    value.classList.toggle("none", shown == null);
    value.textContent = shown != null ? (shown * scale).toFixed(2) + unit
      : data.mha.length > 1 ? "not predicted while auto is undecided" : nothing ? "nothing is cut" : this.byHand ? data.unpredicted_by_hand : data.unpredicted;
    note.textContent = parts.join("\n");
  }

  // Of widths of single layers: that of the uniform cut that would lose as much.
  predictionOfBars() {
    const { data, prices } = this, own = this.ownUnits();
    if (!data.prediction || !prices || data.mha.length > 1) return null;
    const headDim = data.mha[0].options[0].width / data.skyline.mha.most, units = (bars) => bars.map((bar) => bar.units);
    const row = placeOfEqualLoss(prices.mha, data.mha[0].options.map((option) => option.width / headDim), units(own.mha));
    const column = placeOfEqualLoss(prices.mlp, data.mlp.options.map((option) => option.width), units(own.mlp));
    return row === null || column === null ? null : predictionBetween(data, row, column);
  }

  writeLayer(mha, mlp) {
    const { data, layer, tables, widths } = this;
    const input = this.find("#live-layer"), own = this.ownUnits();
    const [mhaWidths, mlpWidth] = own ? [[widths.mha[layer]], widths.mlp[layer]] : [mha.map((option) => option.width), mlp.width];
    const parameters = own ? [this.layerParameters(layer, own)]
      : mha.map((option) => data.layer_parameters - (option.saving.parameters + mlp.saving.parameters) / data.layers);
    input.max = data.layers - 1;
    if (this.root.activeElement !== input) input.value = layer;
    const rows = [
      ["MHA width", `${mhaWidths.map((width) => width.toLocaleString("en")).filter(unique).join(" or ")} of ${data.mha[0].options[0].width.toLocaleString("en")}`],
      ["MLP width", `${mlpWidth.toLocaleString("en")} of ${data.mlp.options[0].width.toLocaleString("en")}`],
      ["Parameters", parameters.map((count) => count.toLocaleString("en")).filter(unique).join(" or ")],
    ];
    if (tables && data.mha.length === 1) {
      const option = widths.mhaOption[layer];
      const gone = Array.from({ length: data.heads }, (_, head) => head).filter((head) => tables.staysUntil[layer * data.heads + head] < option);
      rows.push(["Heads removed", gone.length ? `${gone.length}: ${gone.join(", ")}` : "none"]);
      rows.push(["MHA energy", PERCENT.format(this.energy("mha")[layer])]);
    }
    if (tables) rows.push(["MLP energy", PERCENT.format(this.energy("mlp")[layer])]);
    this.find(".numbers").replaceChildren(...rows.flatMap(([name, value]) => {
      const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, detail.textContent, detail.title] = [name, value, value];
      return [term, detail];
    }));
  }

  writeCaptions(mha, mlp) {
    const { data } = this;
    const width = data.mlp.options[0].width, removed = width - mlp.width;
    this.find('[data-caption="heads"]').textContent = data.heads_caption;
    this.find('[data-caption="channels"]').textContent = this.ownUnits() ? "MLP channels, best first: each layer keeps those before its line"
      : removed ? `MLP channels, best first: the last ${removed.toLocaleString("en")} are removed` : "MLP channels, best first: all are kept";
    this.find(".curve-title").textContent = data.maps ? `Channel scores of layer ${this.layer}` : "";
    if (this.legendsFor === this.mapsRead) return;
    this.legendsFor = this.mapsRead;
    const [anatomy, heads, channels, energy] = this.root.querySelectorAll(".legend");
    const keys = `<span class="key" style="background:${data.colours.mha}"></span>MHA <span class="key" style="background:${data.colours.mlp}"></span>MLP`;
    const ramp = `<span class="ramp" style="background:linear-gradient(to right,${data.colours.ramp.join(",")})"></span>`;
    anatomy.innerHTML = `${keys}, grey: the stream, and what is removed`;
    energy.innerHTML = `${keys}, from 0 to 100 %`;
    for (const [legend, scale] of [[heads, data.maps?.heads_scale], [channels, data.maps?.channels_scale]])
      legend.innerHTML = scale ? { linear: `0 ${ramp} layer's best`, log: `≤ 0.001 ${ramp} layer's best`, order: `first removed ${ramp} last` }[scale] : "";
  }

  // Of each layer, at its own width; between two options of the sliders along a line.
  energy(side) {
    const { data, tables, widths } = this;
    const { options } = side === "mha" ? data.mha[0] : data.mlp;
    const share = (option, layer) => tables.energy[side][option * data.layers + layer] / 65535;
    return widths[side].map((width, layer) => {
      const narrower = options.findIndex((option) => option.width <= width);
      if (narrower < 0) return share(options.length - 1, layer);
      const over = options[narrower - 1], at = options[narrower].width;
      if (at === width || !over) return share(narrower, layer);
      return share(narrower, layer) + (width - at) / (over.width - at) * (share(narrower - 1, layer) - share(narrower, layer));
    });
  }

  draw() {
    if (!this.widths || !this.find(".live").clientWidth) return;
    const { data, tables, ink, layer, view } = this;
    const { widths } = this, denseMlp = data.mlp.options[0].width;
    const decided = data.mha.length === 1, kept = widths.mlp.map((width) => width / denseMlp);
    const waists = { mha: widths.mha[layer], mlp: widths.mlp[layer] };
    for (const side of ["mha", "mlp"]) drawStrip(this.find(`.slider[data-side="${side}"] .strip`), data, side, view, ink, !this.byHand);
    this.drawSkyline();
    drawLayer(this.find("canvas.layer"), data, waists, ink);
    drawAnatomy(this.find("canvas.anatomy"), data, widths, ink, layer);
    if (tables) {
      drawHeads(this.find("canvas.heads"), data, tables, widths.mhaOption, ink, layer);
      drawChannels(this.find("canvas.channels"), data, this.image, kept, ink, layer);
      drawEnergy(this.find("canvas.energy"), data, decided ? this.energy("mha") : null, this.energy("mlp"), ink, layer);
      drawCurve(this.find("canvas.curve"), tables, layer, kept[layer], ink);
    } else {
      for (const name of ["heads", "channels", "energy"]) waiting(this.find(`canvas.${name}`), rowHeight(data.layers) * data.layers, data.waiting, ink);
      prepared(this.find("canvas.curve"));
    }
    const summary = this.summary();
    for (const canvas of this.root.querySelectorAll("canvas:not(.bars)")) canvas.setAttribute("aria-label", `${canvas.className}: ${summary}`);
  }

  summary() {
    const { view } = this;
    const text = (name) => this.find(`[data-figure="${name}"]`).textContent;
    const words = ["mha", "mlp"].map((side) => this.byHand ? this.conclusionOfBars(side) : this.inputs[side].getAttribute("aria-valuetext"));
    return `MHA ${words[0]} MLP ${words[1]} ${text("parameters")} parameters, KV cache ${text("kv")} at ${view.context} tokens. Perplexity: ${text("predicted")}.`;
  }
}

function unique(value, place, all) {
  return all.indexOf(value) === place;
}

function waiting(canvas, height, text, ink) {
  const { pen, width } = prepared(canvas, height);
  pen.fillStyle = ink.mark;
  pen.fillRect(0, 0, width, height);
  pen.fillStyle = ink.quiet;
  pen.textAlign = "center";
  pen.fillText(text, width / 2, height / 2, width - 8);
}

export default function (component) {
  const root = component.parentElement;
  root.live ??= new LiveView(root);
  root.live.update(component);
  return () => {
    // Streamlit also calls this when one rerun overtakes another; the view must then stay.
    if (root.host?.isConnected) return;
    root.live?.close();
    delete root.live;
  };
}
