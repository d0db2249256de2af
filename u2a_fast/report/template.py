"""The page around the figures: jinja2 with autoescaping, because answers and prompts are other people's text."""

__all__ = ["PAGE"]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root {
  --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --paper: #fff; --back: #f5f7fa; --good: #1b7837;
  --bad: #b2182b;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 8px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.muted { color: var(--muted); }
section {
  background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 20px 24px;
  margin-top: 20px;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin-top: 20px; }
.tile {
  background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px 18px;
 
}
.tile b { display: block; font-size: 22px; line-height: 1.3; }
.tile span { color: var(--muted); font-size: 13px; }
.figures { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.figures img { max-width: 100%; height: auto; }
.figures img.half { width: calc(50% - 8px); }
.figures img.third { width: calc(33.3% - 11px); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0 12px; font-size: 13.5px; }
th {
  text-align: left; color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--line);
  padding: 5px 14px 5px 0; vertical-align: bottom;
}
td { border-bottom: 1px solid var(--line); padding: 5px 14px 5px 0; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 90px; }
.notice {
  border-left: 4px solid var(--bad); background: #fdf3f3; padding: 8px 14px; margin: 8px 0 12px;
}
.holds {
  border-left: 4px solid var(--good); background: #f2f8f3; padding: 8px 14px; margin: 8px 0;
}
@media (max-width: 760px) {
  .figures img.half, .figures img.third { width: 100%; }
  section { padding: 16px; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<div class="muted">{{ subtitle }}</div>
{% if tiles %}<div class="tiles">{% for tile in tiles %}
<div class="tile"><b>{{ tile.value }}</b><span>{{ tile.label }}</span></div>{% endfor %}
</div>{% endif %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for text in section.text %}
<p>{{ text }}</p>
{% endfor %}
{% for notice in section.notices %}
<div class="{{ 'holds' if notice.good else 'notice' }}">{{ notice.text }}</div>
{% endfor %}
{% if section.figures %}
<div class="figures">
{% for figure in section.figures %}
<img class="{{ figure.width }}" alt="{{ figure.alt }}" src="data:image/png;base64,{{ figure.data }}">
{% endfor %}
</div>
{% endif %}
{% for table in section.tables %}
{% if table.title %}
<p class="muted">{{ table.title }}</p>
{% endif %}
<div class="wide"><table>
<thead><tr>
{% for name in table.header %}
<th class="{{ table.classes[loop.index0] }}">{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
<td class="{{ table.classes[loop.index0] }}">{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
