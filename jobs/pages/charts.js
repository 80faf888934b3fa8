"use strict";
// Charts, drawn by Observable Plot from the JSON that stands in the page: <div data-chart="kind" data-from="id">.
(() => {
  const read = place => JSON.parse(document.getElementById(place.dataset.from).textContent);
  const bytes = n => { const units = ["B", "kB", "MB", "GB", "TB"]; let u = 0; while (n >= 1000 && u < 4) { n /= 1000; u++; }
    return `${u ? n.toFixed(2) : n} ${units[u]}`; };
  const roundBytes = n => bytes(n).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ");
  const said = text => Object.assign(document.createElement("p"), { className: "none", textContent: text });
  const FULL = "var(--full)", PART = "var(--part)", FAINT = "var(--faint)";
  const cut = (text, letters) => text.length > letters ? `…${text.slice(1 - letters)}` : text;

  // Round byte counts, as many as there is room for, and never fewer than three: a decade may be wider than the data.
  function byteTicks(low, high, room) {
    for (const digits of [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
      const ticks = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1)
        .flatMap(power => digits.map(digit => digit * 10 ** power)).filter(tick => tick >= low && tick <= high);
      if (ticks.length < 3) return d3.ticks(low, high, Math.max(3, Math.min(5, room)));
      if (ticks.length <= room) return ticks;
    }
    return d3.ticks(low, high, 3);
  }

  // A name is left out where it would cover another; every point tells its own when pointed at.
  function freeNames(points, x, y, width) {
    const placed = [];
    for (const point of points) {
      const half = point.short.length * 3.5;
      const middle = Math.max(60 + half, Math.min(width - half - 4, x(point.nameX))), above = y(point.nameY) - 12;
      if (placed.length < 40 && placed.every(one => Math.abs(one.middle - middle) > one.half + half + 4 ||
        Math.abs(one.above - above) > 15)) placed.push({ ...point, middle, above, half });
    }
    return placed;
  }

  function accuracy(place, width) {
    const measured = read(place), lost = document.getElementById(place.dataset.view ?? "")?.value === "lost";
    const usable = measured.filter(one => one.part && one.full && (!lost || one.float !== null));
    if (!usable.length) return said(lost ? "No version was measured beside its float network." : "No version was measured.");
    const value = (one, mode) => one[mode][1] - (lost ? one.float : 0);
    const dots = usable.flatMap(one => ["full", "part"].map(mode => ({ one, mode, x: one[mode][0], y: value(one, mode),
      error: one[mode][2], title: `${one.name}: ${mode}-bit ${one[mode][1].toFixed(2)}% in ${bytes(one[mode][0])}` })));
    const [low, high] = d3.extent(dots, dot => dot.x).map((n, end) => n * (end ? 1.12 : 1 / 1.12));
    const bars = dots.length <= 80;
    let [bottom, top] = [d3.min(dots, dot => dot.y - bars * dot.error), d3.max(dots, dot => dot.y + bars * dot.error)];
    const spare = Math.max(.5, (top - bottom) * .08);
    [bottom, top] = lost ? [bottom * 1.15 - .2, Math.max(.2, top * 1.15 + .2)] : [Math.max(0, bottom - spare), Math.min(100, top + spare)];
    // Losses are drawn logarithmic beyond a point, so that one bad version does not make all good ones a flat line.
    const losses = [-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50].filter(tick => tick >= bottom && tick <= top);
    const height = Math.max(260, Math.min(420, width * .55));
    const links = usable.map(one => ({ x1: one.part[0], x2: one.full[0], y1: value(one, "part"), y2: value(one, "full") }));
    const ticks = byteTicks(low, high, Math.floor(width / 75));
    const options = {
      width, height, marginLeft: 46, marginBottom: 42, marginTop: 26, marginRight: 12,
      x: { type: "log", domain: [low, high], label: "bytes a device holds →", labelAnchor: "right" },
      y: lost ? { type: "symlog", domain: [bottom, top], label: "↑ points of top-1 against the float network" }
        : { domain: [bottom, top], label: "↑ top-1, %", grid: true, nice: true },
    };
    const marks = [
      Plot.axisX(ticks, { text: roundBytes, label: "bytes a device holds →", labelAnchor: "right" }),
      ...(lost ? [Plot.axisY({ ticks: losses, tickFormat: tick => tick > 0 ? `+${tick}` : String(tick).replace("-", "\u2212") }),
        Plot.gridY({ ticks: losses }), Plot.ruleY([0], { stroke: FAINT })] : []),
      Plot.link(links, { x1: "x1", x2: "x2", y1: "y1", y2: "y2", stroke: FAINT, strokeOpacity: .45 }),
      ...(bars ? [Plot.ruleX(dots, { x: "x", y1: dot => dot.y - dot.error, y2: dot => dot.y + dot.error,
        stroke: dot => dot.mode === "full" ? FULL : PART, strokeOpacity: .55, className: "error" })] : []),
      ...["full", "part"].map(mode => Plot.dot(dots.filter(dot => dot.mode === mode), { x: "x", y: "y", r: 4.5,
        symbol: mode === "full" ? "circle" : "diamond2", fill: mode === "full" ? FULL : PART, title: "title", className: mode })),
    ];
    const named = usable.map(one => ({ ...one, nameX: Math.sqrt(one.part[0] * one.full[0]),
      nameY: Math.max(value(one, "part") + bars * one.part[2], value(one, "full") + bars * one.full[2]) }));
    const empty = Plot.plot({ ...options, color: { type: "identity" }, marks });
    const [x, y] = [empty.scale("x"), empty.scale("y")];
    const names = freeNames(named, x.apply, y.apply, width);
    return Plot.plot({ ...options, color: { type: "identity" }, marks: [...marks,
      Plot.text(names, { x: name => x.invert(name.middle), y: name => y.invert(name.above), text: "short", fill: "currentColor",
        className: "name" }),
      Plot.tip(dots, Plot.pointer({ x: "x", y: "y", title: "title" }))] });
  }

  const labelled = (layers, width) => {
    const room = Math.min(300, Math.floor(width * .42)), letters = Math.floor((room - 14) / 6.4);
    return { width, height: 21 * layers.length + 46, marginLeft: room, marginRight: 64, marginTop: 8, marginBottom: 38,
      y: { type: "band", domain: d3.range(layers.length), label: null, tickSize: 0, padding: .3,
        tickFormat: index => cut(layers[index].name, letters) } };
  };

  function chosen(place) {
    const all = read(place), choice = document.getElementById(place.dataset.choice ?? "");
    return all[choice ? Number(choice.value) : 0] ?? { layers: [] };
  }

  function noise(place, width) {
    const layers = chosen(place).layers.filter(layer => layer.sqnr.length);
    if (!layers.length) return said(place.dataset.none);
    const short = value => value === null ? "exact" : value.toFixed(1);
    const told = value => value === null ? "exact" : `${value.toFixed(1)} dB`;
    const rows = layers.map((layer, index) => ({ index, part: layer.sqnr[0], full: layer.sqnr[layer.sqnr.length - 1],
      title: `${layer.name}: ${layer.weights.toLocaleString("en")} weights, ${layer.bits.join(" over ")} bits, ` +
        `full-bit ${told(layer.sqnr[layer.sqnr.length - 1])}, part-bit ${told(layer.sqnr[0])}` }));
    const known = rows.filter(row => row.part !== null || row.full !== null);
    const most = d3.max(known, row => Math.max(row.part ?? 0, row.full ?? 0)) || 10;
    const right = row => row.full ?? row.part ?? 0;
    return Plot.plot({ ...labelled(layers, width), x: { domain: [0, most * 1.02], label: "signal to noise of the weights, dB →", grid: true },
      marks: [
        Plot.link(known.filter(row => row.part !== null && row.full !== null),
          { x1: "part", x2: "full", y1: "index", y2: "index", stroke: FAINT, strokeOpacity: .5, strokeWidth: 1.5 }),
        Plot.dot(rows.filter(row => row.full !== null), { x: "full", y: "index", fill: FULL, r: 4, className: "full" }),
        Plot.dot(rows.filter(row => row.part !== null), { x: "part", y: "index", fill: PART, r: 4, symbol: "diamond2", className: "part" }),
        Plot.text(rows, { x: right, y: "index", text: row => `${short(row.part)} / ${short(row.full)}`, dx: 9, textAnchor: "start",
          fill: FAINT, title: "title", className: "figure" }),
        Plot.tip(rows, Plot.pointerY({ x: right, y: "index", title: "title" })),
      ] });
  }

  function damage(place, width) {
    const measured = chosen(place).layers.filter(layer => layer.damage);
    if (!measured.length) return said(place.dataset.none);
    if (document.getElementById(place.dataset.order ?? "")?.value === "worst")
      measured.sort((a, b) => b.damage.divergence - a.damage.divergence);
    const rows = measured.map((layer, index) => {
      const { divergence, same, drop } = layer.damage;
      return { index, divergence, bits: layer.bits[layer.bits.length - 1], title: `${layer.name}: ` +
        `${layer.weights.toLocaleString("en")} weights, ${layer.bits.join(" over ")} bits, ${divergence.toPrecision(3)} nats, ` +
        `${same.toFixed(1)}% same answers${drop === null ? "" : `, ${drop.toFixed(2)} points of top-1 lost`}` };
    });
    const { images, noise: ofNoise } = measured[0].damage;
    return Plot.plot({ ...labelled(measured, width), marginRight: 96,
      x: { label: `divergence over ${images} ${ofNoise ? "images of noise" : "calibration images"}, nats →`, grid: true, ticks: 4 },
      marks: [
        Plot.barX(rows, { x: "divergence", y: "index", fill: PART, title: "title", className: "bar" }),
        Plot.text(rows, { x: "divergence", y: "index", text: row => `${row.bits} bits: ${row.divergence.toPrecision(2)}`, dx: 6,
          textAnchor: "start", fill: FAINT, className: "figure" }),
      ] });
  }

  const kinds = { accuracy, noise, damage };
  const places = [...document.querySelectorAll("[data-chart]")];
  function draw(place) {
    const width = Math.floor(place.clientWidth);
    if (!width) return;   // inside something folded: drawn when it opens
    const drawn = kinds[place.dataset.chart](place, width);
    drawn.setAttribute("data-width", width);
    if (drawn.tagName.toLowerCase() === "svg") drawn.setAttribute("aria-hidden", "true");   // its place has the label
    place.replaceChildren(drawn);
  }
  const drawAll = () => places.forEach(draw);
  drawAll();
  document.querySelectorAll("[data-redraws]").forEach(choice => choice.addEventListener("change", drawAll));
  document.querySelectorAll("details").forEach(fold => fold.addEventListener("toggle", drawAll));
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
})();
