"""HTML without scripts: elements with escaped texts, tables, curves as SVG."""

from collections.abc import Iterable, Mapping, Sequence
import html
import math
from typing import Any

from realm_jax.evaluation import report

_MAX_POINTS = 300  # Points that a curve keeps.
_COLORS = 7  # Colours of curves in page.css.
_WIDE = 28  # Letters of a cell, from which on its lines may break.


class Html(str):
  """Text that is HTML; `element` escapes all other text."""


def element(name: str, *children: Any, **attributes: Any) -> Html:
  """Returns an element; `class_` and `aria_label` stand for such attributes.

  Children that are `Html` stay as they are, None is left out, and everything
  else is escaped.
  """
  written = ''.join(
      f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
      for key, value in attributes.items()
  )
  inner = ''.join(
      child if isinstance(child, Html) else html.escape(str(child))
      for child in children
      if child is not None
  )
  return Html(f'<{name}{written}>{inner}</{name}>')


def note(text: str, kind: str = 'missing') -> Html:
  """Returns a paragraph; commands stand between backticks."""
  parts = [
      element('code', part) if number % 2 else part
      for number, part in enumerate(text.split('`'))
  ]
  return element('p', *parts, class_=kind)


def with_bar(text: str, share: float) -> Html:
  fill = element('span', class_='fill', style=f'width:{100 * share:.1f}%')
  bar = element('span', fill, class_='track', aria_hidden='true')
  return element('span', text, bar)


def side_by_side(
    title: str,
    columns: Mapping[str, Mapping[str, Any]],
    names: Iterable[str] | None = None,
) -> Html:
  """Returns a table with a row for each name, by default all of them."""
  if names is None:
    names = dict.fromkeys(name for c in columns.values() for name in c)
  rows = [[name, *(c.get(name) for c in columns.values())] for name in names]
  return table(title, ['', *columns], *rows)


def table(title: str, heads: Sequence[str], *rows: Sequence[Any]) -> Html:
  """Returns a table that scrolls; columns without any value are left out."""
  kept = [
      column
      for column in range(len(heads))
      if not column or any(row[column] not in (None, '') for row in rows)
  ]
  head = element('tr', *(element('th', heads[i], scope='col') for i in kept))
  lines = []
  for row in rows:
    # A phone has no room for columns and shows the head in the cell.
    cells = [
        element('td', row[i], class_=_kind(row[i]), data_label=heads[i])
        for i in kept[1:]
    ]
    lines.append(element('tr', element('th', row[0], scope='row'), *cells))
  table = element('table', element('thead', head), element('tbody', *lines))
  # The keyboard reaches the region and scrolls it.
  return element(
      'div', table, class_='scroll', role='region', tabindex=0, aria_label=title
  )


def _kind(value: Any) -> str:
  return 'long' if len(str(value)) > _WIDE and type(value) is not Html else ''


def panel(
    title: str,
    curves: report.Curves,
    heading: str = 'h3',
    order: Sequence[str] = (),
) -> Html:
  """Draws the curves of a panel as SVG; page.css has the colours.

  A single curve may have an empty name. `heading` is the element of the title.
  The places of names in `order` decide the colours, the same in all panels.
  """
  order = list(dict.fromkeys([*order, *curves]))
  curves = {name: thinned(points) for name, points in curves.items()}
  curves = {name: points for name, points in curves.items() if points}
  width, height, left, right, bottom, top = 360, 200, 54, 12, 24, 10
  every = [point for points in curves.values() for point in points] or [(1, 0)]
  last = max(1, *(step for step, _ in every), 1)
  low = min(0.0, *(value for _, value in every), 0.0)
  high = max(value for _, value in every)
  if high <= low or (low == 0 and 0.5 < high < 1):
    high = low + 1  # Shares are seen between 0 and 1.

  def x(step: float) -> str:
    return f'{left + (width - left - right) * step / last:.1f}'

  def y(value: float) -> str:
    part = (value - low) / (high - low)
    return f'{height - bottom - (height - bottom - top) * part:.1f}'

  drawn = []
  for quarter in range(5):
    value = low + (high - low) * quarter / 4
    end, at = width - right, y(value)
    drawn.append(element('line', class_='grid', x1=left, x2=end, y1=at, y2=at))
    label = {'text_anchor': 'end', 'dominant_baseline': 'central'}
    drawn.append(element('text', short(value), x=left - 6, y=at, **label))
  text, below = f'step {last}', height - 6
  drawn += [
      element('text', '0', x=left, y=below),
      element('text', text, x=width - right, y=below, text_anchor='end'),
  ]
  names, labels = [], []
  for name, points in curves.items():
    color = f'c{order.index(name) % _COLORS}'
    path = ' '.join(f'{x(step)},{y(value)}' for step, value in points)
    drawn.append(element('polyline', class_=f'curve {color}', points=path))
    if len(points) < 8:
      drawn += [
          element('circle', class_=color, cx=x(step), cy=y(value), r=3)
          for step, value in points
      ]
    step, value = points[-1]
    labels.append(f'{name} {short(value)} at step {step}'.strip())
    if name:
      names.append(element('li', name, class_=color))
  svg = element(
      'svg', *drawn, viewBox=f'0 0 {width} {height}', role='img',
      aria_label=f'{title}: {", ".join(labels)}',
  )
  legend = element('ul', *names, class_='legend') if names else None
  head = element(heading, title)
  return element('section', head, svg, legend, class_='panel')


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
  """Returns at most `_MAX_POINTS` finite points, with the last one."""
  finite = [point for point in points if math.isfinite(point[1])]
  step = -(-len(finite) // _MAX_POINTS) or 1
  return finite[::-1][::step][::-1]


def short(value: float) -> str:
  """Returns a number with three digits, or without decimals."""
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'
