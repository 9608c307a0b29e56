"""What a mistyped word is told."""

from __future__ import annotations

import pytest

from worker.core.errors import nearest_name

KNOWN = ["shop.charge", "shop.refund", "billing.charge_all"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("shop.chrge", "shop.charge"),
        ("shp.charge", "shop.charge"),
        ("charge", "shop.charge"),
        ("shop.ship_parcel", None),
        ("shop.x", None),
        ("mail.charge", None),
        ("", None),
    ],
)
def test_a_name_is_like_another_by_its_function_not_by_their_common_module(typed: str, meant: str | None) -> None:
    assert nearest_name(typed, KNOWN) == (f"; did you mean {meant!r}?" if meant else "")


def test_where_nothing_is_known_nothing_is_meant() -> None:
    assert nearest_name("shop.charge", []) == ""
