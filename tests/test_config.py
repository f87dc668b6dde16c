"""Configs: what is refused, in which words, and what the protocol digest covers."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, merged, tiny, to_toml
from pydantic.fields import FieldInfo

from wardround.config import FederationConfig, SiteConfig, Strict, parse, read_federation, read_site, read_toml
from wardround.config.strict import models_in
from wardround.errors import ConfigError

IMAGE = {"unit": "image", "epsilon": 8.0, "delta": 1e-5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"traning": {}}, "unknown key 'traning'; did you mean 'training'?"),
        ({"training": {"learnig_rate": 0.1}}, "[training] unknown key 'learnig_rate'; did you mean 'learning_rate'?"),
        (
            {"data": {"criteria": {"modalty": ["CR"]}}},
            "[data.criteria] unknown key 'modalty'; did you mean 'modality'?",
        ),
        ({"training": {"rounds": 0}}, "[training] rounds = 0: input should be greater than or equal to 1"),
        ({"method": {"mask_ratio": 1.0}}, "[method] mask_ratio = 1.0: input should be less than 1"),
        ({"seed": "3"}, 'seed = "3": input should be a valid integer'),
        ({"format": 2}, "is of format 2; this Wardround reads format 1. Use the release that wrote it"),
        ({"data": {"channels": 3}}, "[data] mean has 1 values for channels = 3; give one a channel"),
        ({"training": {"warmup_steps": 99}}, "[training] warmup_steps = 99: the federation has only 6 steps; lower it"),
        ({"evaluation_set": {"kind": "labelled"}}, "[evaluation_set] kind = 'labelled' needs the key 'folder'; add it"),
        ({"views": {"crop_scale": [0.9, 0.1]}}, "[views] crop_scale = [0.9, 0.1]: expected 0 < smallest <= largest"),
        (
            {"method": {"decoder_heads": 3}},
            "[method] decoder_dim = 16: expected a multiple of 4 and of decoder_heads, 3",
        ),
        ({"method": {"mask_ration": 0.5}}, "[method] unknown key 'mask_ration'; did you mean 'mask_ratio'?"),
        ({"method": {"name": "simcrl"}}, "[method] name = 'simcrl': did you mean 'simclr'?"),
        ({"method": {"name": "pirl"}}, "[method] name = 'pirl': expected one of mae, simclr, moco, byol"),
        (
            {"method": {"name": "simclr"}},
            "[method] unknown key 'decoder_dim'; known keys: name, temperature, hidden_dim",
        ),
        ({"privacy": {"unit": "patient"}}, "[privacy] the key 'epsilon' is missing; add it"),
        ({"privacy": {"unit": "patients"}}, "[privacy] unit = 'patients': did you mean 'patient'?"),
        ({"privacy": {**IMAGE, "cilp": 1.0}}, "[privacy] unknown key 'cilp'"),
        (
            {"privacy": IMAGE, "data": {"criteria": {"max_images_per_patient": 3}}},
            "[the file] [data] criteria.max_images_per_patient makes one image decide which others are taken",
        ),
        ({"privacy": IMAGE, "data": {"slice_stride": 2}}, "[the file] [data] slice_stride makes one image decide"),
        (
            {"membership": {"sites": {"../x": 1.0}}},
            '[membership.sites.../x] [key] = "../x": expected letters from A to Z, digits',
        ),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(merged(TINY, change), FederationConfig, "x.toml")
    assert str(caught.value).startswith(f"x.toml: {words}")
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_is_named_before_the_one_that_is_then_missing() -> None:
    raw = {**TINY, "training": {"rounds": 2, "local_step": 3}}
    with pytest.raises(ConfigError, match=r"did you mean 'local_steps'\? \(mistakes besides this one: 1"):
        parse(raw, FederationConfig, "x.toml")


def test_a_text_of_another_form_is_told_what_it_is_for() -> None:
    with pytest.raises(ConfigError, match=r'hours = "20-6": has not the form .* such as 20:00-06:00'):
        parse({"format": 1, "name": "a", "work": "w", "images": {"folder": "."}, "hours": "20-6"}, SiteConfig, "x.toml")


def test_a_method_without_its_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"x\.toml: \[method\] the key 'name' is missing; add it"):
        parse({**TINY, "method": {"decoder_dim": 16}}, FederationConfig, "x.toml")


def test_several_problems_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"besides this one: 1"):
        parse(merged(TINY, {"seed": -1, "training": {"rounds": 0}}), FederationConfig, "x.toml")


def test_a_file_that_is_missing_or_no_toml_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_toml(tmp_path / "absent.toml", FederationConfig)
    (tmp_path / "x.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_toml(tmp_path / "x.toml", FederationConfig)


def test_the_digest_covers_what_a_site_computes_and_nothing_else() -> None:
    base = tiny().protocol("0" * 64).digest()
    assert tiny(membership={"wait_seconds": 5.0}).protocol("0" * 64).digest() == base
    assert tiny(evaluation_set={"kind": "procedural"}).protocol("0" * 64).digest() == base
    for change in (
        {"seed": 4},
        {"training": {"local_steps": 4}},
        {"aggregation": {"momentum": 0.5}},
        {"name": "other"},
    ):
        assert tiny(**change).protocol("0" * 64).digest() != base
    assert tiny().protocol("1" * 64).digest() != base


def test_toml_and_python_values_give_one_digest(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(to_toml(TINY))
    assert (
        read_toml(tmp_path / "x.toml", FederationConfig).protocol("0" * 64).digest()
        == tiny().protocol("0" * 64).digest()
    )


CONFIGS = [ROOT / "wardround" / "demo.toml", *sorted((ROOT / "federation_configs").glob("*.toml"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    read_toml(path, FederationConfig)


def fields_below(model: type[Strict]) -> list[tuple[str, FieldInfo]]:
    found = []
    for name, field in model.model_fields.items():
        found.append((f"{model.__name__}.{name}", field))
        for inner in models_in(field.annotation):
            found += fields_below(inner)
    return found


@pytest.mark.parametrize("model", [FederationConfig, SiteConfig])
def test_every_key_has_a_sentence_of_help_and_every_number_a_range(model: type[Strict]) -> None:
    for name, field in fields_below(model):
        assert field.description, name
        assert field.description.endswith("."), name
        if field.annotation in (int, float, int | None, float | None):
            assert field.metadata, f"{name} has no range"


def test_a_sites_relative_paths_count_from_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'format = 1\nname = "lyon"\nwork = "work"\n[images]\nfolder = "/data"\nopt_out = "no.txt"\n'
    )
    site = read_site(tmp_path / "site.toml")
    assert (site.work, site.images.folder, site.images.opt_out) == (
        tmp_path / "work",
        Path("/data"),
        tmp_path / "no.txt",
    )


def test_a_federations_folder_of_images_counts_from_its_own_file_and_leaves_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    found = []
    for folder in ("images", "/data/labelled"):
        path.write_text(to_toml({**TINY, "evaluation_set": {"kind": "labelled", "folder": folder}}))
        found.append(read_federation(path))
    assert [one.evaluation_set and one.evaluation_set.folder for one in found] == [
        tmp_path / "images",
        Path("/data/labelled"),
    ]
    path.write_text(to_toml(TINY))
    assert read_federation(path) == read_toml(path, FederationConfig)
    assert {one.protocol("0" * 64).digest() for one in found} == {tiny().protocol("0" * 64).digest()}
