"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // What a reload must not lose. A browser may refuse to keep anything; the page works without.
  const key = name => `knet ${root.dataset.sweep} ${name}`;
  const remember = (name, value) => {
    try { sessionStorage.setItem(key(name), JSON.stringify(value)); } catch { /* see above */ }
  };
  const recall = name => {
    try { return JSON.parse(sessionStorage.getItem(key(name))); } catch { return null; }
  };

  // Light and dark: as the system says until somebody says otherwise.
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (recall("theme") ?? (system.matches ? "dark" : "light")) === "dark";
  const paint = () => {
    root.style.colorScheme = isDark() ? "dark" : "light";
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  theme.addEventListener("click", () => {
    remember("theme", isDark() ? "light" : "dark");
    paint();
  });
  system.addEventListener("change", paint);
  paint();

  // Tables: a click sorts, the next one the other way, the third restores the sweep's order.
  // Cells without a value stay at the end.
  const sortBy = (table, heading, order) => {
    const body = table.tBodies[0];
    for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", order);
    const sign = order === "descending" ? -1 : 1;
    const value = row => row.cells[heading.dataset.column].dataset.value;
    const compare = (a, b) => {
      const [left, right] = [value(a), value(b)];
      if (order === "none") return a.dataset.place - b.dataset.place;
      if (!left || !right) return Boolean(right) - Boolean(left);
      const text = left.localeCompare(right, undefined, { numeric: true });
      return sign * (Number(left) - Number(right) || text);
    };
    body.append(...[...body.rows].sort(compare));
  };
  const NEXT = { none: "descending", descending: "ascending", ascending: "none" };
  all("table.sortable").forEach((table, number) => {
    for (const heading of all("th[aria-sort]", table)) {
      heading.firstElementChild.addEventListener("click", () => {
        const order = NEXT[heading.getAttribute("aria-sort")];
        sortBy(table, heading, order);
        remember(`sort ${number}`, [heading.dataset.column, order]);
      });
    }
    const [column, order] = recall(`sort ${number}`) ?? [];
    const heading = table.querySelector(`th[data-column="${column}"]`);
    if (heading && order !== "none") sortBy(table, heading, order);
  });

  // Single seeds and bands: their opacity, so that the legend still shows and hides whole arms.
  for (const box of all("input[data-layer]")) {
    const show = () => {
      for (const plot of all(".layers .js-plotly-plot")) {
        const places = plot.data.flatMap((trace, place) => trace.meta === box.dataset.layer ? [place] : []);
        if (places.length) Plotly.restyle(plot, { opacity: box.checked ? Number(box.dataset.opacity) : 0 }, places);
      }
    };
    box.checked = recall(box.id) ?? box.checked;
    box.addEventListener("change", () => { remember(box.id, box.checked); show(); });
    if (!box.checked) show();
  }

  // Sliders: over the evaluations, and over the updates of the kernels.
  const slider = (id, show) => {
    const input = document.getElementById(id);
    if (!input) return;
    const update = () => {
      const text = show(Number(input.value));
      document.getElementById(`${id}-shown`).textContent = text;
      input.setAttribute("aria-valuetext", text);
    };
    input.value = recall(id) ?? input.value;
    input.addEventListener("input", () => { remember(id, Number(input.value)); update(); });
    update();
  };
  slider("evaluation", place => {
    const steps = document.getElementById("evaluation").dataset.steps.split(" ").map(Number);
    for (const sheet of all(".evaluations figure")) {
      const pictures = all("img", sheet);
      const shown = pictures.findLast(picture => picture.dataset.step <= steps[place]) ?? pictures[0];
      for (const picture of pictures) picture.hidden = picture !== shown;
      sheet.querySelector(".at").textContent = `step ${shown.dataset.step}`;
    }
    return `step ${steps[place]}`;
  });
  const after = update => update ? `after update ${update}` : "static kernels";
  slider("update", update => {
    for (const sheet of all(".updates figure")) {
      const cell = Math.min(update, Number(sheet.dataset.updates));
      const moving = sheet.querySelector(".moving");
      moving.style.setProperty("--cell", cell + 1);
      moving.setAttribute("aria-label", `Masks of arm ${sheet.dataset.arm}, ${after(cell)}`);
      sheet.querySelector(".at").textContent = after(cell);
    }
    return after(update);
  });

  // Paper has another width than the window: A4 across takes two charts, or one that is whole.
  const resize = size => all(".js-plotly-plot").forEach(plot => Plotly.relayout(plot, size(plot)));
  addEventListener("beforeprint", () => resize(plot => ({ autosize: false, width: plot.closest(".whole") ? 960 : 460 })));
  addEventListener("afterprint", () => resize(() => ({ autosize: true, width: null })));

  // A page that is served asks whether there is news, and comes again where it was.
  const live = document.getElementById("live");
  if (live) {
    history.scrollRestoration = "manual";
    const place = recall("place");
    if (place !== null) scrollTo(0, place);
    addEventListener("pagehide", () => remember("place", scrollY));
    const ask = async () => {
      try {
        const answer = await fetch("version", { cache: "no-store" });
        if (!answer.ok) throw new Error(await answer.text());
        const version = await answer.text();
        if (version !== live.dataset.version) return location.reload();
        live.textContent = "live";
        live.classList.remove("lost");
      } catch (error) {
        live.textContent = "not live any more";
        live.title = String(error);
        live.classList.add("lost");
      }
      setTimeout(ask, 1000 * live.dataset.seconds);
    };
    setTimeout(ask, 1000 * live.dataset.seconds);
  }
  root.dataset.ready = performance.now().toFixed(0);
})();
