// The live view. It follows a slider while it is dragged and sends Python the position when it rests.

// A slider rests when it has not moved for this many milliseconds.
const REST_MS = 250;
// Key of the undo history in the tab's session storage.
const HISTORY = "transact-positions";

class LiveView {
  constructor(root) {
    this.root = root;
    this.find = (selector) => root.querySelector(selector);
    this.view = { mha: 0, mlp: 0, context: 1024 };
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
    root.addEventListener("click", (event) => this.pressed(event.target.closest("button")));
    root.addEventListener("keydown", (event) => this.typed(event));
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.find(".live"));
  }

  update({ data, setStateValue }) {
    if (!data) return;
    this.send = setStateValue;
    const first = !this.data, tablesChanged = JSON.stringify(data.maps) !== this.mapsRead;
    this.data = data;
    this.readTheme();
    if (tablesChanged) this.readMaps();
    if (first || data.start.revision !== this.revision) {
      this.revision = data.start.revision;
      this.view = { mha: data.start.mha, mlp: data.start.mlp, context: data.start.context };
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
    this.show();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.rest(), REST_MS);
  }

  place(view) {
    this.view = { ...this.view, ...view };
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
  }

  typed(event) {
    if (!(event.ctrlKey || event.metaKey)) return;
    const key = event.key.toLowerCase();
    const by = key === "y" || (key === "z" && event.shiftKey) ? 1 : key === "z" ? -1 : 0;
    if (!by) return;
    event.preventDefault();
    this.go(by);
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
    for (const [name, value] of Object.entries({ ...this.data.choices, ...this.view })) link.searchParams.set(name, value);
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
      this.find(".live").dataset.shown = `${this.view.mha},${this.view.mlp},${this.view.context}`;
    });
  }

  optionsAt() {
    const { data, view } = this;
    return { mha: data.mha.map((side) => side.options[side.option_at[view.mha]]), mlp: data.mlp.options[data.mlp.option_at[view.mlp]] };
  }

  write() {
    const { data, view } = this;
    const { mha, mlp } = this.optionsAt();
    for (const side of ["mha", "mlp"]) {
      const box = this.find(`.slider[data-side="${side}"]`), input = this.inputs[side];
      if (Number(input.value) !== view[side]) input.value = view[side];
      input.style.setProperty("--at", `calc(8px + (100% - 16px) * ${view[side] / 95})`);
      box.querySelector("output").textContent = `${view[side]} %`;
      const words = side === "mlp" ? mlp.words : data.mha.map((table, index) =>
        (data.mha.length > 1 ? `${table.granularity}: ` : "") + mha[index].words).join(" ");
      input.setAttribute("aria-valuetext", `${view[side]} percent. ${words}`);
      box.querySelector(".words").textContent = `${words} ${side === "mlp" ? data.mlp.possible : data.mha.length > 1 ? data.undecided : data.mha[0].possible}`;
    }
    if (this.root.activeElement !== this.inputs.context) this.inputs.context.value = view.context;
    const every = costsAt(data, view).map((cost) => figuresOf(data, cost, view.context));
    const whole = figuresOf(data, data.dense, view.context);
    for (const name of Object.keys(whole)) {
      const values = every.map((figures) => figures[name]), value = this.find(`[data-figure="${name}"]`);
      value.value = Math.min(...values);
      value.textContent = rangeInWords(values, UNITS[name]);
      value.title = values.map((amount) => amount.toLocaleString("en")).join(" or ") + ` of the dense model's ${whole[name].toLocaleString("en")}`;
      this.find(`[data-note="${name}"]`).textContent = changeInWords(values, whole[name]);
    }
    this.writePrediction();
    this.find(".reading").textContent = data.serving;
    for (const button of this.root.querySelectorAll(".presets button"))
      button.setAttribute("aria-pressed", Number(button.dataset.mha) === view.mha && Number(button.dataset.mlp) === view.mlp);
    this.find('[data-do="undo"]').setAttribute("aria-disabled", this.step <= 0);
    this.find('[data-do="redo"]').setAttribute("aria-disabled", this.step >= this.history.length - 1);
    this.writeLayer(mha, mlp);
    this.writeCaptions(mha, mlp);
  }

  writePrediction() {
    const { data, view } = this;
    const predicted = predictionAt(data, view), measured = measuredAt(data, view);
    const nothing = view.mha === 0 && view.mlp === 0;
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
      : data.mha.length > 1 ? "not predicted while auto is undecided" : nothing ? "nothing is cut" : data.unpredicted;
    note.textContent = parts.join("\n");
  }

  writeLayer(mha, mlp) {
    const { data, layer, tables } = this;
    const input = this.find("#live-layer");
    input.max = data.layers - 1;
    if (this.root.activeElement !== input) input.value = layer;
    const rows = [
      ["MHA width", `${mha.map((option) => option.width.toLocaleString("en")).filter(unique).join(" or ")} of ${data.mha[0].options[0].width.toLocaleString("en")}`],
      ["MLP width", `${mlp.width.toLocaleString("en")} of ${data.mlp.options[0].width.toLocaleString("en")}`],
      ["Parameters", mha.map((option) => (data.layer_parameters - (option.saving.parameters + mlp.saving.parameters) / data.layers).toLocaleString("en")).filter(unique).join(" or ")],
    ];
    if (tables && data.mha.length === 1) {
      const option = data.mha[0].option_at[this.view.mha];
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
    this.find('[data-caption="channels"]').textContent = removed
      ? `MLP channels, best first: the last ${removed.toLocaleString("en")} are removed` : "MLP channels, best first: all are kept";
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

  energy(side) {
    const { data, tables, view } = this;
    const option = (side === "mha" ? data.mha[0] : data.mlp).option_at[view[side]];
    const shares = tables.energy[side].subarray(option * data.layers, (option + 1) * data.layers);
    return Array.from(shares, (share) => share / 65535);
  }

  draw() {
    if (!this.data || !this.find(".live").clientWidth) return;
    const { data, tables, ink, layer, view } = this;
    const { mha, mlp } = this.optionsAt();
    const decided = data.mha.length === 1, kept = mlp.width / data.mlp.options[0].width;
    const waists = { mha: Math.max(...mha.map((option) => option.width)), mlp: mlp.width };
    for (const side of ["mha", "mlp"]) drawStrip(this.find(`.slider[data-side="${side}"] .strip`), data, side, view, ink);
    drawLayer(this.find("canvas.layer"), data, waists, ink);
    drawAnatomy(this.find("canvas.anatomy"), data, waists, ink, layer);
    if (tables) {
      drawHeads(this.find("canvas.heads"), data, tables, decided ? data.mha[0].option_at[view.mha] : null, ink, layer);
      drawChannels(this.find("canvas.channels"), data, this.image, kept, ink, layer);
      drawEnergy(this.find("canvas.energy"), data, decided ? this.energy("mha") : null, this.energy("mlp"), ink, layer);
      drawCurve(this.find("canvas.curve"), tables, layer, kept, ink);
    } else {
      for (const name of ["heads", "channels", "energy"]) waiting(this.find(`canvas.${name}`), rowHeight(data.layers) * data.layers, data.waiting, ink);
      prepared(this.find("canvas.curve"));
    }
    const summary = this.summary();
    for (const canvas of this.root.querySelectorAll("canvas")) canvas.setAttribute("aria-label", `${canvas.className}: ${summary}`);
  }

  summary() {
    const { view } = this;
    const text = (name) => this.find(`[data-figure="${name}"]`).textContent;
    const words = ["mha", "mlp"].map((side) => this.inputs[side].getAttribute("aria-valuetext"));
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
