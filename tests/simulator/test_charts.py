"""Every line and area of a chart looks unlike every other, also for who sees few colours, and its legend shows how."""

import itertools
import re

import numpy as np
import pytest

from kvtier.simulator.axes import Axis
from kvtier.simulator.charts import Series, area_chart, line_chart
from kvtier.simulator.looks import DARK, LIGHT, PATTERNS

X = Y = Axis("x", lambda value: f"{value:g}", 0.0, 1.0)

# What a person without one kind of cones sees of linear red, green and blue (severity 1): G. M. Machado, M. M. Oliveira
# and L. A. F. Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009.
EYES = {
    "all cones": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lightness_and_colour(text, eyes):
    """Return a colour in CIELAB, as these eyes see it."""
    values = np.array([int(text[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = TO_XYZ @ np.clip(np.array(eyes) @ linear, 0, 1) / TO_XYZ.sum(axis=1)
    bent = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
    return np.array([116 * bent[1] - 16, 500 * (bent[0] - bent[1]), 200 * (bent[1] - bent[2])])


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("eyes", EYES)
def test_the_first_colours_can_be_told_apart_with_any_eyes(colours, eyes):
    """A difference of 10 in CIELAB is seen at a glance; later lines have other marks and dashes, too."""
    seen = [lightness_and_colour(colour, EYES[eyes]) for colour in colours[:4]]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 10


def test_lines_can_be_told_apart_however_many_there_are():
    series = [Series(f"line {index}", [(0.0, 0.0), (1.0, 1.0)]) for index in range(30)]
    series.append(Series("without limit", [(0.0, 1.0), (1.0, 1.0)], dashed=True))
    drawn, legend = line_chart("chart", X, Y, series).split('<div class="legend">')
    looks = [
        re.findall(r'<polyline [^>]*stroke="([^"]+)"[^/]*?( stroke-dasharray="[^"]+")?/>', text)
        for text in (drawn, legend)
    ]
    assert looks[0] == looks[1]
    assert len(set(looks[0])) == 31
    assert looks[0][-1][0] not in [colour for colour, _ in looks[0][:-1]]


def test_neighbours_have_other_marks_in_chart_and_legend():
    drawn, legend = line_chart("chart", X, Y, [Series(str(n), [(0.5, 0.5)], line=False) for n in range(6)]).split(
        "legend"
    )
    marks = [
        re.findall(r'<(circle|rect|path d="M[\d.]+ [\d.]+l\S+ \S+?[hl])', text.split("<details>")[0])
        for text in (drawn, legend)
    ]
    assert len(marks[0]) == len(marks[1]) == 6
    assert all(one != other for one, other in itertools.pairwise(marks[0]))
    assert [mark[:4] for mark in marks[0]] == [mark[:4] for mark in marks[1]]


def test_areas_have_patterns_that_the_page_defines():
    names = ["from DRAM", "from disk", "from valkey", "computed"]
    text = area_chart("chart", X, Y, names, [(0.0, [0.1] * 4), (1.0, [0.2] * 4)])
    used = re.findall(r"url\(#(\w+)\)", text)
    assert len(used) == 2 * len(set(used)) == 6
    assert all(f'id="{name}"' in PATTERNS for name in used)


def test_the_figures_behind_a_chart_are_all_its_points():
    series = [Series("one", [(0.0, 0.25), (1.0, 0.5)]), Series("two", [(1.0, 0.75)])]
    table = line_chart("chart", X, Y, series).split("<details>")[1]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows == [["0", "0.25", ""], ["1", "0.5", "0.75"]]
