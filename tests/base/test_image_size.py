"""A size has one form in memory, one as JSON, one as text, and they lead back to each other."""

from __future__ import annotations

from typing import Any

import pytest

from paretoprune.base.image_size import (
    ImageSize,
    area_of,
    height_width,
    larger_side,
    parse_size,
    plain_size,
    read_size,
    size_text,
    sizes_text,
)


@pytest.mark.parametrize(
    ("size", "plain", "text", "area"), [(640, 640, "640", 409_600), ((384, 640), [384, 640], "384,640", 245_760)]
)
def test_every_form_leads_back(size: ImageSize, plain: Any, text: str, area: int) -> None:
    assert (plain_size(size), size_text(size), area_of(size)) == (plain, text, area)
    assert read_size(plain) == parse_size(text) == read_size(size) == size
    assert larger_side(size) == max(height_width(size)) == 640


def test_equal_sides_are_a_square() -> None:
    assert read_size([64, 64]) == parse_size("64,64") == read_size([64]) == 64


@pytest.mark.parametrize("wrong", [0, -32, 1.5, True, None, "64", [64, 96, 3], [64, 0], [], {}])
def test_anything_else_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="a side in pixels, or height and width"):
        read_size(wrong)


@pytest.mark.parametrize("wrong", ["", "wide", "64,", "64x96", "64,96,3", "0", "-64", "6_4", "64.0"])
def test_text_that_is_no_size_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="a side in pixels, or height and width"):
        parse_size(wrong)


def test_rectangles_in_a_list_are_told_apart() -> None:
    assert sizes_text([256, 224]) == "256, 224"
    assert sizes_text([256, (96, 160)]) == "256; 96,160"
