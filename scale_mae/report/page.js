"use strict";
// Draws the charts from the JSON data in the page, in the colors of the style sheet. Draws them again when the colors change.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const chartElement = (chart) => document.getElementById(`chart-${chart.name}`);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "solid"];
  const MARKER_COLORS = {
    restart: 3, rollback: 6, "rollback failed": 6, "skipped step": 5, stop: 4, "loss not finite": 6, "failed checkpoint": 2,
  };
  const axis = () => document.querySelector("input[name=axis]:checked")?.value ?? "images";
  const logarithmic = (chart) => chart.log_scale && document.getElementById("logarithmic").checked;

  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function lineTrace(name, x, y, lineColor, options) {
    return { type: "scatter", mode: "lines", name: escaped(name), x, y, line: { color: lineColor, width: 2 }, ...options };
  }

  // Lowest and highest value, without the steps that were repeated later: those may lie far away.
  function extent(chart) {
    const known = chart.series.filter((s) => s.style !== "dots").flatMap((s) => [...s.y, ...(s.low ?? [])]);
    const shown = known.filter((y) => y !== null && (y > 0 || !logarithmic(chart)));
    return [shown.reduce((a, b) => Math.min(a, b), Infinity), shown.reduce((a, b) => Math.max(a, b), -Infinity)];
  }

  // Initial range of the vertical axis; undefined leaves the choice to the library.
  function initialRange(chart) {
    const scale = logarithmic(chart) ? Math.log10 : (y) => y;
    const [low, high] = extent(chart).map(scale);
    if (!chart.series.some((s) => s.style === "dots") || !Number.isFinite(low)) return undefined;
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    return [low - margin, high + margin];
  }

  function traces(chart, by) {
    const result = [];
    let index = 0;
    const drawn = chart.series.filter((s) => s.style !== "faint" && s.style !== "dots").length;
    for (const s of chart.series) {
      const x = s[by];
      if (s.style === "faint") {
        result.push(lineTrace(s.name, x, s.y, color("faint"), { line: { color: color("faint"), width: 1 } }));
      } else if (s.style === "dots") {
        const marker = { color: color("series-2"), size: 5, symbol: "circle-open" };
        result.push({ type: "scatter", mode: "markers", name: escaped(s.name), x, y: s.y, marker });
      } else {
        const lineColor = color(`series-${(index % 6) + 1}`);
        const dash = drawn > 1 ? DASHES[index % 6] : "solid";
        if (s.style === "band") {
          const edge = { line: { color: lineColor, width: 1 }, legendgroup: s.name, hoverinfo: "skip" };
          result.push(lineTrace(`${s.name}, lower edge`, x, s.low, lineColor, { ...edge, showlegend: false }));
          result.push(lineTrace(s.name, x, s.y, lineColor, { ...edge, fill: "tonexty", fillcolor: `${lineColor}33` }));
        } else if (s.style === "area") {
          const area = { stackgroup: "parts", line: { color: lineColor, width: 1 }, fillcolor: `${lineColor}99` };
          result.push(lineTrace(s.name, x, s.y, lineColor, area));
        } else {
          result.push(lineTrace(s.name, x, s.y, lineColor, { line: { color: lineColor, width: 2, dash } }));
        }
        index += 1;
      }
    }
    const [, top] = extent(chart);
    for (const kind of new Set(chart.markers.map((m) => m.kind))) {
      const markers = chart.markers.filter((m) => m.kind === kind);
      const marker = { color: color(`series-${MARKER_COLORS[kind] || 4}`), size: 9, symbol: "triangle-down" };
      const text = markers.map((m) => escaped(m.text).replace(/(.{60}\S*)\s/g, "$1<br>"));
      const x = markers.map((m) => m[by]);
      const y = markers.map(() => (Number.isFinite(top) ? top : 1));
      result.push({ type: "scatter", mode: "markers", name: escaped(kind), x, y, text, hoverinfo: "text", marker });
    }
    return result;
  }

  function layout(chart, by) {
    const frame = { gridcolor: color("grid"), zerolinecolor: color("grid"), linecolor: color("edge"), automargin: true };
    const shapes = chart.markers.map((m) => ({
      type: "line", x0: m[by], x1: m[by], yref: "paper", y0: 0, y1: 1,
      line: { color: color(`series-${MARKER_COLORS[m.kind] || 4}`), width: 1, dash: "dot" },
    }));
    const legend = chart.series.length + chart.markers.length > 1;
    const range = initialRange(chart);
    return {
      autosize: true, shapes, hovermode: "x unified", hoverdistance: -1, showlegend: legend,
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a touch scrolls the page
      paper_bgcolor: color("page"), plot_bgcolor: color("page"), font: { color: color("text"), family: "inherit", size: 13 },
      margin: { l: 10, r: 10, t: 34, b: legend ? 72 : 10 },
      hoverlabel: { bgcolor: color("panel"), bordercolor: color("edge"), font: { color: color("text") } },
      legend: { orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("muted"), activecolor: color("link") },
      xaxis: { ...frame, title: { text: by === "images" ? "images seen" : "step" } },
      yaxis: {
        ...frame, title: { text: escaped(chart.unit) }, type: logarithmic(chart) ? "log" : "linear", exponentformat: "power",
        ...(range ? { range } : {}),
      },
    };
  }

  const CONFIG = {
    displaylogo: false, responsive: true, displayModeBar: true, // without the button that sends the chart to a service:
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"],
  };

  function draw() {
    const by = axis();
    return Promise.all(charts.map((c) => Plotly.react(chartElement(c), traces(c, by), layout(c, by), CONFIG)));
  }

  function keyboard(chart) {
    chartElement(chart).addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const target = chartElement(chart);
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

  // A served page polls the version of its content. When the version changes, the page reloads and restores its scroll position.
  function follow() {
    const version = document.body.dataset.version, live = document.getElementById("live");
    if (!version) return;
    history.scrollRestoration = "manual";
    const opened = () => [...document.querySelectorAll("details")].map((d) => d.open);
    const stored = JSON.parse(sessionStorage.getItem("reading-position") || "null");
    if (stored) {
      sessionStorage.removeItem("reading-position");
      const all = document.querySelectorAll("details");
      if (all.length === stored.open.length) stored.open.forEach((open, i) => (all[i].open = open));
      scrollTo({ top: stored.y, behavior: "instant" });
    }
    setInterval(async () => {
      try {
        const current = await (await fetch("version", { cache: "no-store" })).text();
        live.textContent = "This page reloads when the run advances.";
        if (current !== version) {
          sessionStorage.setItem("reading-position", JSON.stringify({ y: scrollY, open: opened() }));
          location.reload();
        }
      } catch {
        live.textContent = "The server has stopped. This page no longer updates.";
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
