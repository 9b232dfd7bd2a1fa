"use strict";
// Draws the charts of the page from the JSON in it, in the colours of the style sheet, and again when those change.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const place = (chart) => document.getElementById(`chart-${chart.name}`);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "solid"];
  const MARKS = { restart: 3, rollback: 6, skip: 5, stop: 4, "loss not finite": 6, "lost checkpoint": 2 };
  const axis = () => document.querySelector("input[name=axis]:checked")?.value ?? "images";
  const logarithmic = (chart) => chart.log_scale && document.getElementById("logarithmic").checked;

  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function line(name, x, y, ink, more) {
    return { type: "scatter", mode: "lines", name: escaped(name), x, y, line: { color: ink, width: 2 }, ...more };
  }

  // lowest and highest value of what counts; steps that were done again may lie far off
  function extent(chart) {
    const known = chart.series.filter((s) => s.style !== "dots").flatMap((s) => [...s.y, ...(s.low ?? [])]);
    const shown = known.filter((y) => y !== null && (y > 0 || !logarithmic(chart)));
    return [shown.reduce((a, b) => Math.min(a, b), Infinity), shown.reduce((a, b) => Math.max(a, b), -Infinity)];
  }

  // of the vertical axis at first; undefined: the library's choice
  function range(chart) {
    const scale = logarithmic(chart) ? Math.log10 : (y) => y;
    const [low, high] = extent(chart).map(scale);
    if (!chart.series.some((s) => s.style === "dots") || !Number.isFinite(low)) return undefined;
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    return [low - margin, high + margin];
  }

  function traces(chart, by) {
    const found = [];
    let number = 0;
    const own = chart.series.filter((s) => s.style !== "faint" && s.style !== "dots").length;
    for (const s of chart.series) {
      const x = s[by];
      if (s.style === "faint") {
        found.push(line(s.name, x, s.y, colour("faint"), { line: { color: colour("faint"), width: 1 } }));
      } else if (s.style === "dots") {
        const marker = { color: colour("series-2"), size: 5, symbol: "circle-open" };
        found.push({ type: "scatter", mode: "markers", name: escaped(s.name), x, y: s.y, marker });
      } else {
        const ink = colour(`series-${(number % 6) + 1}`);
        const dash = own > 1 ? DASHES[number % 6] : "solid";
        if (s.style === "band") {
          const edge = { line: { color: ink, width: 1 }, legendgroup: s.name, hoverinfo: "skip" };
          found.push(line(`${s.name}, lower edge`, x, s.low, ink, { ...edge, showlegend: false }));
          found.push(line(s.name, x, s.y, ink, { ...edge, fill: "tonexty", fillcolor: `${ink}33` }));
        } else if (s.style === "area") {
          found.push(line(s.name, x, s.y, ink, { stackgroup: "parts", line: { color: ink, width: 1 }, fillcolor: `${ink}99` }));
        } else {
          found.push(line(s.name, x, s.y, ink, { line: { color: ink, width: 2, dash } }));
        }
        number += 1;
      }
    }
    const [, top] = extent(chart);
    for (const kind of new Set(chart.marks.map((m) => m.kind))) {
      const of = chart.marks.filter((m) => m.kind === kind);
      const marker = { color: colour(`series-${MARKS[kind] || 4}`), size: 9, symbol: "triangle-down" };
      const text = of.map((m) => escaped(m.text).replace(/(.{60}\S*)\s/g, "$1<br>"));
      const x = of.map((m) => m[by]);
      const y = of.map(() => (Number.isFinite(top) ? top : 1));
      found.push({ type: "scatter", mode: "markers", name: escaped(kind), x, y, text, hoverinfo: "text", marker });
    }
    return found;
  }

  function layout(chart, by) {
    const frame = { gridcolor: colour("grid"), zerolinecolor: colour("grid"), linecolor: colour("edge"), automargin: true };
    const shapes = chart.marks.map((m) => ({
      type: "line", x0: m[by], x1: m[by], yref: "paper", y0: 0, y1: 1,
      line: { color: colour(`series-${MARKS[m.kind] || 4}`), width: 1, dash: "dot" },
    }));
    const legend = chart.series.length + chart.marks.length > 1;
    const span = range(chart);
    return {
      autosize: true, shapes, hovermode: "x unified", hoverdistance: -1, showlegend: legend,
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // fingers scroll the page
      paper_bgcolor: colour("page"), plot_bgcolor: colour("page"), font: { color: colour("text"), family: "inherit", size: 13 },
      margin: { l: 10, r: 10, t: 34, b: legend ? 72 : 10 },
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("edge"), font: { color: colour("text") } },
      legend: { orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("link") },
      xaxis: { ...frame, title: { text: by === "images" ? "images seen" : "step" } },
      yaxis: {
        ...frame, title: { text: escaped(chart.unit) }, type: logarithmic(chart) ? "log" : "linear", exponentformat: "power",
        ...(span ? { range: span } : {}),
      },
    };
  }

  const CONFIG = {
    displaylogo: false, responsive: true, displayModeBar: true, // and nothing is handed to a service:
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"],
  };

  function draw() {
    const by = axis();
    return Promise.all(charts.map((c) => Plotly.react(place(c), traces(c, by), layout(c, by), CONFIG)));
  }

  function keyboard(chart) {
    place(chart).addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const target = place(chart);
      const [low, high] = target.layout.xaxis.range.map(Number);
      const middle = (low + high) / 2, half = (high - low) / 2;
      const to = (a, b) => Plotly.relayout(target, { "xaxis.range": [a, b] });
      const actions = {
        "+": () => to(middle - half / 2, middle + half / 2),
        "=": () => to(middle - half / 2, middle + half / 2),
        "-": () => to(middle - half * 2, middle + half * 2),
        ArrowLeft: () => to(low - half / 2, high - half / 2),
        ArrowRight: () => to(low + half / 2, high + half / 2),
        0: () => Plotly.relayout(target, { "xaxis.autorange": true, "yaxis.autorange": true }),
      };
      if (!actions[event.key]) return;
      event.preventDefault();
      actions[event.key]();
    });
  }

  // A served page asks whether the run has moved on, and loads itself again where the reader was
  function follow() {
    const version = document.body.dataset.version, live = document.getElementById("live");
    if (!version) return;
    history.scrollRestoration = "manual";
    const opened = () => [...document.querySelectorAll("details")].map((d) => d.open);
    const stored = JSON.parse(sessionStorage.getItem("place") || "null");
    if (stored) {
      sessionStorage.removeItem("place");
      const all = document.querySelectorAll("details");
      if (all.length === stored.open.length) stored.open.forEach((open, i) => (all[i].open = open));
      scrollTo({ top: stored.y, behavior: "instant" });
    }
    setInterval(async () => {
      try {
        const answer = await (await fetch("version", { cache: "no-store" })).text();
        live.textContent = "This page follows the run.";
        if (answer !== version) {
          sessionStorage.setItem("place", JSON.stringify({ y: scrollY, open: opened() }));
          location.reload();
        }
      } catch {
        live.textContent = "The server has stopped; the page stays as it is.";
      }
    }, 2000);
  }

  for (const control of document.querySelectorAll(".controls input")) control.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  charts.forEach(keyboard);
  draw().then(() => {
    follow();
    document.documentElement.dataset.drawn = String(charts.length);
  });
})();
