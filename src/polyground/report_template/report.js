// Everything the page says is there without this: here are tabs, filters, sorting, switches for boxes, and values under the pointer.
const root = document.documentElement;
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
root.classList.add("js");

// One tab of a set is shown; the others are there for a printer.
for (const tabs of all(".tabs")) {
  const panels = all(":scope > .tab", tabs);
  if (panels.length < 2) continue;
  const list = document.createElement("div");
  list.className = "tablist";
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", tabs.dataset.of);
  const buttons = panels.map((panel) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = panel.dataset.title;
    button.setAttribute("role", "tab");
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-label", panel.dataset.title);
    list.append(button);
    return button;
  });
  const show = (place) => {
    panels.forEach((panel, i) => {
      panel.hidden = i !== place;
      buttons[i].setAttribute("aria-selected", String(i === place));
      buttons[i].tabIndex = i === place ? 0 : -1;
    });
  };
  buttons.forEach((button, place) => {
    button.addEventListener("click", () => show(place));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (place + step + panels.length) % panels.length;
      show(next);
      buttons[next].focus();
    });
  });
  // The comparison that is read first is the last step of the figure: the middle one of three.
  show(tabs.dataset.of === "comparison" ? Math.min(1, panels.length - 1) : 0);
  tabs.prepend(list);
}

// Filters over the gallery: one split, one task, one outcome, some words; a sample shows when it fits all.
const chosen = { split: "", task: "", outcome: "" };
const words = document.getElementById("words");
function filter() {
  const sought = words ? words.value.toLowerCase().split(" ").filter(Boolean) : [];
  const samples = all("#gallery .sample");
  let shown = 0;
  for (const sample of samples) {
    const text = sample.textContent.toLowerCase();
    const fits = Object.entries(chosen).every(([field, value]) => !value || sample.dataset[field] === value);
    sample.hidden = !fits || !sought.every((word) => text.includes(word));
    shown += sample.hidden ? 0 : 1;
  }
  document.getElementById("nothing").hidden = shown > 0;
  document.getElementById("count").textContent = `${shown} of ${samples.length}`;
}
for (const button of all(".filters button")) {
  button.addEventListener("click", () => {
    const { field, value } = button.dataset;
    chosen[field] = value;
    for (const peer of all(`.filters button[data-field="${field}"]`)) peer.setAttribute("aria-pressed", String(peer === button));
    filter();
  });
}
if (words) {
  words.addEventListener("input", filter);
  filter();
}

// Whoever acts like a button is one for the keyboard too.
function pressable(element, act) {
  element.tabIndex = 0;
  element.addEventListener("click", act);
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    act();
  });
}

// Boxes of one model are switched off and on everywhere.
for (const name of all(".legend.boxes span")) {
  const box = name.dataset.box;
  name.setAttribute("role", "button");
  name.setAttribute("aria-pressed", "true");
  name.title = "show or hide these boxes";
  pressable(name, () => {
    const hidden = document.body.classList.toggle(`hide-${box}`);
    for (const peer of all(`.legend.boxes span[data-box="${box}"]`)) peer.setAttribute("aria-pressed", String(!hidden));
  });
}

// A picture grows when it is clicked.
for (const figure of all(".strip figure")) pressable(figure, () => figure.classList.toggle("large"));

// A click on a column's head sorts the tasks by it, the largest first; a second click turns the order; averages stay below.
for (const table of all("table.sortable")) {
  const heads = all("thead tr:last-child th", table);
  const body = table.tBodies[0];
  const value = (row, place) => {
    const text = row.cells[place].textContent.trim();
    return Number.isFinite(parseFloat(text)) ? parseFloat(text) : text === "–" ? -Infinity : text;
  };
  heads.forEach((head, place) => {
    pressable(head, () => {
      const rising = head.getAttribute("aria-sort") === (place ? "descending" : null);
      heads.forEach((peer) => peer.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = all("tr:not(.total)", body).sort((a, b) => {
        const [x, y] = [value(a, place), value(b, place)];
        return (x < y ? -1 : x > y ? 1 : 0) * (rising ? 1 : -1);
      });
      body.prepend(...rows);
    });
  });
}

// The values of all lines of a drawing, at the step under the pointer.
const tip = document.createElement("div");
tip.id = "needle";
tip.hidden = true;
document.body.append(tip);
const short = (number) => (number === 0 ? "0" : Math.abs(number) >= 100 && Math.abs(number) < 1e6 ? number.toFixed(0) : String(Number(number.toPrecision(3))));
for (const svg of all("svg[data-frame]")) {
  const [left, top, width, height, x0, x1, y0, y1] = svg.dataset.frame.split(" ").map(Number);
  const needle = document.createElementNS(svg.namespaceURI, "line");
  needle.setAttribute("class", "needle");
  needle.setAttribute("y1", top);
  needle.setAttribute("y2", top + height);
  let lines = null;
  const read = () =>
    all("g", svg)
      .filter((group) => group.querySelector(".line:not(.raw)"))
      .map((group) => {
        const title = group.querySelector("title");
        const points = group.querySelector(".line:not(.raw)").getAttribute("d").slice(1).split("L").map((point) => point.split(" ").map(Number));
        const name = title ? title.textContent : "";
        if (title) title.remove();
        return { name, points };
      });
  svg.addEventListener("pointermove", (event) => {
    lines ??= read();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const near = (points) => points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
    const found = lines.filter((line) => line.points.length).map((line) => ({ name: line.name, point: near(line.points) }));
    if (!found.length) return;
    const x = found[0].point[0];
    needle.setAttribute("x1", x);
    needle.setAttribute("x2", x);
    svg.append(needle);
    const place = x0 + ((x - left) / width) * (x1 - x0);
    const values = found.map(({ name, point }) => `${name}: ${short(y0 + ((top + height - point[1]) / height) * (y1 - y0))}`);
    tip.textContent = [`at ${short(Number(place.toFixed(2)))}`, ...values].join("\n");
    tip.hidden = false;
    const over = event.clientX + 14 + tip.offsetWidth > window.innerWidth;
    tip.style.left = `${over ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    needle.remove();
  });
}

// Light, dark, or as the system says.
const theme = document.createElement("button");
const themes = ["auto", "light", "dark"];
theme.type = "button";
theme.className = "theme";
const dress = (name) => {
  theme.textContent = `theme: ${name}`;
  if (name === "auto") delete root.dataset.theme;
  else root.dataset.theme = name;
};
theme.addEventListener("click", () => dress(themes[(themes.indexOf(root.dataset.theme ?? "auto") + 1) % 3]));
dress("auto");
document.querySelector("nav .wrap").append(theme);

// The section being read is marked in the bar.
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of all("nav a")) {
        if (link.hash === `#${entry.target.id}`) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  },
  { rootMargin: "-20% 0px -75% 0px" },
);
for (const section of all("section[id]")) seen.observe(section);

// What is folded is printed too.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = all("details:not([open])");
  for (const part of folded) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});
