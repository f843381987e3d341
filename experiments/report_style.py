"""The style sheet of a run's report."""

CSS = """
:root {
  --page: #f7f6f3; --card: #ffffff; --ink: #24292f; --muted: #6a707a; --grid: #e4e2dc;
  --first: #2f6cab; --second: #b8652a; --mark: #eef3f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1c1f24; --ink: #e3e1db; --muted: #989fa8; --grid: #30343a;
    --first: #7fb2e5; --second: #e3a063; --mark: #25303c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0.25rem 0 0; color: var(--muted); }
section > p { max-width: 44rem; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: 1.25rem 1rem; margin: 2rem 0;
}
.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.facts dd { margin: 0; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.facts dt { color: var(--muted); font-size: 0.85rem; line-height: 1.3; }
.cards {
  display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
}
.card {
  margin: 0; padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--grid);
  border-radius: 10px; min-width: 0;
}
figcaption { margin-bottom: 0.75rem; }
figcaption p { font-size: 0.9rem; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg image { image-rendering: pixelated; }
.bar {
  display: grid; grid-template-columns: 6rem 1fr 3.5rem; align-items: center; gap: 0.5rem;
  margin: 0.4rem 0;
}
.bar span { white-space: nowrap; }
.bar i { height: 1.1rem; border-radius: 3px; background: var(--muted); opacity: 0.45; }
.bar.ours i { background: var(--first); opacity: 1; }
.bar b { font-weight: 500; font-variant-numeric: tabular-nums; text-align: right; }
.scale {
  display: flex; align-items: center; gap: 0.6rem; margin-top: 0.75rem; max-width: 30rem;
  color: var(--muted); font-size: 0.85rem;
}
.scale i {
  flex: 1; height: 0.7rem; border-radius: 3px; border: 1px solid var(--grid);
  background: linear-gradient(90deg, rgb(64 120 184), rgb(64 120 184 / 0) 50%,
    rgb(214 118 44 / 0) 50%, rgb(214 118 44));
}
pre {
  margin: 0.5rem 0 0; padding: 1rem 1.1rem; background: var(--card);
  border: 1px solid var(--grid); border-radius: 10px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.85rem/1.55 ui-monospace, SFMono-Regular, Menlo, monospace;
}
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0.1em 0; }
.command { user-select: all; }
details { border-bottom: 1px solid var(--grid); }
summary { padding: 0.55rem 0; cursor: pointer; }
table { border-collapse: collapse; width: 100%; margin-bottom: 0.75rem; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 1rem 0.2rem 0; }
th { font-weight: 400; color: var(--muted); width: 14rem; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 30rem) { th { width: 45%; } .bar { grid-template-columns: 5.5rem 1fr 3rem; } }
@media print { body { background: none; } .card, pre { break-inside: avoid; } }
"""
