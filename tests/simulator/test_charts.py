"""Every line of a chart looks unlike every other, and its legend shows how."""

import re

from kvtier.simulator.charts import Axis, Series, line_chart


def test_lines_can_be_told_apart_however_many_there_are():
    x = y = Axis("x", str, 0.0, 1.0)
    series = [Series(f"line {index}", [(0.0, 0.0), (1.0, 1.0)]) for index in range(30)]
    series.append(Series("without limit", [(0.0, 1.0), (1.0, 1.0)], dashed=True))
    text = line_chart("chart", x, y, series)
    lines = re.findall(r'<polyline [^>]*stroke="([^"]+)" stroke-width="2"(?: stroke-dasharray="([^"]+)")?/>', text)
    swatches = re.findall(r'<i style="background:([^"]+)">', text)
    assert len(lines) == len(set(lines)) == 31
    assert len(swatches) == len(set(swatches)) == 31
    for (colour, dashes), swatch in zip(lines, swatches, strict=True):
        assert colour in swatch
        assert bool(dashes) == ("gradient" in swatch)
    assert lines[-1][0] not in [colour for colour, _ in lines[:-1]]
