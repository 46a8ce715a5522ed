const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector) => document.querySelector(selector);
const draw = (id, spec) => vegaEmbed(`#${id}`, spec, { config: data.theme, renderer: "svg", actions: false });

for (const [id, spec] of Object.entries(data.charts)) draw(id, spec).catch(console.error);

// --- tables: sort by a column, search, keep a range of a column --------------------------------------------
for (const table of document.querySelectorAll("table.figures")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const control = (kind) => $(`[data-${kind}="${table.id}"]`);
  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.trim();
    return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
  };

  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    const sorted = [...rows].sort((left, right) => {
      const a = value(left, column), b = value(right, column);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);  // without a figure: last
      return down ? order(b, a) : order(a, b);
    });
    body.append(...sorted);
  }));

  const filter = () => {
    const words = control("search").value.toLowerCase().split(/\s+/), column = Number(control("column").value) + 3;
    const least = control("least").value, most = control("most").value;
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase(), figure = value(row, column);
      const kept = words.every((word) => text.includes(word))
        && (least === "" || figure >= Number(least)) && (most === "" || figure <= Number(most));
      row.hidden = !kept;
      shown += kept;
    }
    control("count").textContent = `${shown} of ${rows.length}`;
  };
  for (const kind of ["search", "column", "least", "most"]) control(kind).addEventListener("input", filter);
  filter();
}

// --- spikes and thresholds of a site -------------------------------------------------------------------------
function spikes(site, row) {
  const events = new Int8Array([...atob(site.events[row])].map((character) => character.charCodeAt(0)));
  const neurons = events.length / site.steps;
  return [...events].map((event, i) => ({ step: Math.floor(i / neurons) + 1, neuron: i % neurons, event }))
    .filter((spike) => spike.event !== 0);
}

function bars(site) {
  const width = site.top / site.values.length;
  return ["values", "thresholds"].flatMap((what) => {
    const all = site[what].reduce((a, b) => a + b, 0);
    return site[what].map((count, i) => ({ what, low: i * width, high: (i + 1) * width, share: count / all }));
  });
}

const filled = (spec, values) => ({ ...spec, data: { values } });

function show() {
  const site = data.senders.sites[$("#site").value];
  if (site === undefined) return;
  const steps = Array.from({ length: site.steps }, (_, i) => i + 1);
  const raster = filled(data.raster, spikes(site, $("#row").value));
  raster.encoding = { ...raster.encoding, x: { ...raster.encoding.x, scale: { domain: steps } } };
  draw("raster-chart", raster).catch(console.error);
  draw("histogram-chart", filled(data.histogram, bars(site))).catch(console.error);
}

$("#site").addEventListener("change", show);
$("#row").addEventListener("change", show);
for (const button of document.querySelectorAll("[data-site]")) {
  button.addEventListener("click", () => {
    $("#site").value = button.dataset.site;
    show();
    $("#spikes").scrollIntoView();
    $("#site").focus({ preventScroll: true });
  });
}
show();

$("#theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark";
});
