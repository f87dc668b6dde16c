"""Views by modality: what a preset sets, what stays overridable, and what is refused."""

from typing import Any

import pytest
from conftest import ROOT, tiny

from wardround.config import FederationConfig, parse
from wardround.config.federation import ViewsConfig as FromFederation
from wardround.config.views import PRESETS, ViewsConfig
from wardround.errors import ConfigError

COLOUR = {"channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}


def simclr(**views: Any) -> FederationConfig:
    return tiny(method={"name": "simclr"}, views=views)


def test_without_a_modality_geometry_is_mild_crops_and_a_horizontal_flip() -> None:
    views = tiny().views
    assert (views.modality, views.crop_scale) == ("generic", (0.6, 1.0))
    assert (views.horizontal_flip, views.vertical_flip, views.rotation) == (True, False, 0.0)
    assert FromFederation is ViewsConfig


@pytest.mark.parametrize("modality", PRESETS)
def test_a_modality_sets_what_is_not_given_within_the_ranges_of_the_keys(modality: str) -> None:
    views = parse({"modality": modality}, ViewsConfig, "x")
    for key, value in PRESETS[modality].items():  # type: ignore[index]
        assert getattr(views, key) == value
    assert parse(views.model_dump(mode="json"), ViewsConfig, "x") == views  # validates each value by itself
    untouched = set(ViewsConfig.model_fields) - {"modality", *PRESETS[modality]}  # type: ignore[index]
    assert all(getattr(views, key) == getattr(ViewsConfig(), key) for key in untouched)


@pytest.mark.parametrize("modality", PRESETS)
def test_any_key_given_wins_over_the_modality_even_where_it_is_the_generic_value(modality: str) -> None:
    given = ViewsConfig().model_dump(mode="json") | {"modality": modality}
    assert parse(given, ViewsConfig, "x").model_dump(mode="json") == given


def test_the_page_about_views_shows_the_table_that_the_code_has() -> None:
    lines = (ROOT / "docs" / "views.md").read_text().splitlines()
    table = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.count("|") == 8]
    assert table[0] == ["key", *PRESETS]
    rows = {key: cells for key, *cells in table[2:]}
    assert rows.keys() == ViewsConfig.model_fields.keys() - {"modality", "crop_scale"}
    for key, cells in rows.items():
        values = [getattr(ViewsConfig(modality=modality), key) for modality in PRESETS]
        assert cells == [("no", "yes")[value] if isinstance(value, bool) else f"{value:g}" for value in values], key


def test_a_chest_is_never_mirrored_or_upturned_unless_asked_for() -> None:
    chest = simclr(modality="chest").views
    assert not chest.horizontal_flip
    assert not chest.vertical_flip
    assert simclr(modality="chest", horizontal_flip=True).views.horizontal_flip


def test_only_dermoscopy_changes_colours() -> None:
    coloured = {name for name in PRESETS if (v := ViewsConfig(modality=name)).hue > 0 or v.saturation > 0}
    assert coloured == {"dermoscopy"}


@pytest.mark.parametrize(
    ("method", "expected"),
    [("mae", (0.6, 1.0)), ("ijepa", (0.6, 1.0)), ("simclr", (0.3, 1.0)), ("byol", (0.3, 1.0)), ("dino", (0.3, 1.0))],
)
def test_crops_are_smaller_where_views_are_compared(method: str, expected: tuple[float, float]) -> None:
    assert tiny(method={"name": method}).views.crop_scale == expected
    assert tiny(method={"name": method}, views={"modality": "cells"}).views.crop_scale == expected
    assert tiny(method={"name": method}, views={"crop_scale": [0.6, 0.9]}).views.crop_scale == (0.6, 0.9)


def test_a_federation_of_one_method_leaves_the_defaults_of_the_next_alone() -> None:
    assert simclr().views.crop_scale == (0.3, 1.0)
    assert tiny().views.crop_scale == (0.6, 1.0)
    assert ViewsConfig().crop_scale == (0.6, 1.0)


def test_the_protocol_carries_resolved_values() -> None:
    protocol = simclr(modality="ct").protocol("0" * 64)
    resolved = protocol.model_dump(mode="json")["views"]
    assert (resolved["window_jitter"], resolved["crop_scale"]) == (0.2, [0.3, 1.0])
    spelt_out = simclr(**resolved).protocol("0" * 64)
    assert spelt_out.digest() == protocol.digest()
    assert simclr(modality="mr").protocol("0" * 64).digest() != protocol.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": {"modality": "chests"}}, "[views] modality = \"chests\": input should be 'generic', 'chest', "),
        ({"views": {"hue": 0.1}}, "[data] channels = 1: grey images have no hue, but [views] has hue = 0.1"),
        (
            {"views": {"saturation": 0.1}, "data": {}},
            "[data] channels = 1: grey images have no saturation, but [views]",
        ),
        ({"views": {"modality": "dermoscopy"}}, "saturation = 0.2 (modality = 'dermoscopy'); set both to 0.0 there"),
        ({"views": {"rotation": 200.0}}, "[views] rotation = 200.0: input should be less than or equal to 180."),
        ({"views": {"crop_scale": [0.0, 1.0]}}, "[views] crop_scale = [0.0, 1.0]: expected 0 < smallest <= largest"),
        ({"views": {"hues": 0.1}}, "[views] unknown key 'hues'; did you mean 'hue'?"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_grey_images_are_refused_hue_even_where_the_file_has_no_data_section() -> None:
    raw = {"format": 1, "name": "x", "views": {"hue": 0.1}, "training": {"rounds": 1, "local_steps": 1}}
    with pytest.raises(ConfigError, match="grey images have no hue"):
        parse(raw, FederationConfig, "x")


def test_colour_images_may_change_hue_and_a_grey_dermoscopy_may_switch_it_off() -> None:
    assert tiny(data=COLOUR, views={"hue": 0.1}).views.hue == 0.1
    assert tiny(views={"modality": "dermoscopy", "hue": 0.0, "saturation": 0.0}).views.vertical_flip
