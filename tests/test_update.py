"""What travels: the same bytes for the same update, and every way in which a block can be wrong."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from wardround.errors import UpdateError
from wardround.update import META, Declared, State, Update, check_tensors, layout, pack, state_hash, unpack, withholds

STATE: State = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros(4, np.float32)}
MONITOR = {"effective_rank": 9.0, "feature_spread": 0.8, "alignment": 0.2, "uniformity": 2.0}
MEASURED = {"images": 3, "patients": 2, "loss_first": 0.5, "loss": 0.25, "seconds": 1.5, "drift": "none", **MONITOR}
DECLARED = Declared(steps=1, version="0.1.0", **MEASURED)
UPDATE = Update("lyon", "d" * 64, 1, "e" * 64, DECLARED, STATE)


def test_an_update_comes_back_as_it_was_and_gives_the_same_bytes() -> None:
    block = UPDATE.to_bytes()
    back = Update.from_bytes(block)
    assert dataclasses.replace(back, delta={}) == dataclasses.replace(UPDATE, delta={})
    assert state_hash(back.delta) == state_hash(STATE)
    assert back.to_bytes() == block


def test_the_hash_of_a_state_sees_names_shapes_and_numbers_but_not_their_order() -> None:
    base = state_hash(STATE)
    assert state_hash(dict(reversed(STATE.items()))) == base
    assert state_hash({"b": STATE["b"].T.copy().reshape(2, 3), "a": STATE["a"]}) != base
    assert state_hash({"b": STATE["b"].reshape(3, 2), "a": STATE["a"]}) != base
    assert state_hash({"c": STATE["b"], "a": STATE["a"]}) != base


@given(st.integers(min_value=0, max_value=len(UPDATE.to_bytes()) - 1))
def test_a_block_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(UpdateError, match="cut or altered"):
        Update.from_bytes(UPDATE.to_bytes()[:length])


@given(st.binary(max_size=200))
def test_noise_is_refused(block: bytes) -> None:
    with pytest.raises(UpdateError):
        Update.from_bytes(block)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", -1),
        ("images", "3"),
        ("images", True),
        ("images", 10**13),
        pytest.param("images", 10**400, id="images-without-end"),
        pytest.param("loss", -(10**400), id="loss-without-end"),
        ("loss", 1e308),
        ("loss", float("inf")),
        ("loss", -float("inf")),
        ("seconds", -0.5),
        ("version", "x" * 101),
        ("steps", 1.5),
        ("epsilon", -1.0),
        ("ledger", "7:short"),
        ("ledger", "a path/of/a/patient"),
        ("audit", "a path/of/a/patient"),
        ("audit", f"7:{'0' * 96}"),
        ("drift", "of patient 7"),
    ],
)
def test_a_declared_value_that_no_site_sends_is_refused(field: str, value: Any) -> None:
    header = {"site": "lyon", "protocol": "d", "round": 1, "state": "e", "declared": vars(DECLARED) | {field: value}}
    with pytest.raises(UpdateError, match=f"declared field '{field}'"):
        Update.from_bytes(pack(STATE, header))


@pytest.mark.parametrize("number", [0.0, -0.9, 3e38, -3e38])
def test_a_loss_may_be_any_number_that_training_can_give(number: float) -> None:
    declared = dataclasses.replace(DECLARED, loss=number)
    assert Update.from_bytes(dataclasses.replace(UPDATE, declared=declared).to_bytes()).declared.loss == number


@pytest.mark.parametrize(
    "header",
    ["[" * 4000 + "]" * 4000, '{"a":' * 4000 + "1" + "}" * 4000, "[" * 200 + "]" * 200, "9" * 5000, " " * 10**7 + "{}"],
    ids=["lists", "objects", "lists that a parser may just take", "a number of 5,000 digits", "ten megabytes"],
)
def test_a_header_that_is_nested_or_written_without_end_is_refused(header: str) -> None:
    with pytest.raises(UpdateError, match="cut or altered"):
        Update.from_bytes(save(STATE, metadata={META: header}))


@pytest.mark.parametrize(
    ("field", "value"), [("site", ["lyon"]), ("site", None), ("round", True), ("round", "1"), ("encoding", 8)]
)
def test_a_field_of_another_kind_is_refused(field: str, value: Any) -> None:
    header = {"site": "lyon", "protocol": "d", "round": 1, "state": "e", "declared": vars(DECLARED)}
    with pytest.raises(UpdateError, match=f"its header's '{field}' is no"):
        Update.from_bytes(pack(STATE, header | {field: value}))


def test_a_loss_may_be_below_zero_as_minus_a_cosine_is() -> None:
    declared = vars(DECLARED) | {"loss_first": -0.1, "loss": -0.9}
    header = {"site": "lyon", "protocol": "d", "round": 1, "state": "e", "declared": declared}
    assert Update.from_bytes(pack(STATE, header)).declared.loss == -0.9


def test_a_field_that_is_not_on_the_list_cannot_cross() -> None:
    header = {"site": "lyon", "protocol": "d", "round": 1, "state": "e", "declared": vars(DECLARED) | {"path": "/x"}}
    with pytest.raises(UpdateError, match="lacks or adds fields"):
        Update.from_bytes(pack(STATE, header))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": STATE["a"]}, r"site 'lyon': lacks 1 of 2 tensors \(first: 'b'\)"),
        ({**STATE, "c": STATE["a"]}, r"site 'lyon': has 1 tensors too many \(first: 'c'\)"),
        ({**STATE, "a": np.zeros(5, np.float32)}, r"tensor 'a' is float32\[5\], expected float32\[4\]"),
        ({**STATE, "a": np.zeros(4, np.float64)}, r"tensor 'a' is float64\[4\], expected float32\[4\]"),
        ({**STATE, "a": np.array([0, np.nan, 0, 0], np.float32)}, "tensor 'a' holds NaN or infinity"),
        ({**STATE, "a": np.array([0, np.inf, 0, 0], np.float32)}, "tensor 'a' holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tensors: State, words: str) -> None:
    check_tensors("site 'lyon'", STATE, layout(STATE))
    with pytest.raises(UpdateError, match=words):
        check_tensors("site 'lyon'", tensors, layout(STATE))


def test_a_block_holds_scalars_and_empty_headers() -> None:
    tensors, header = unpack(pack({"step": np.array(3.0, np.float32)}, {}))
    assert tensors["step"].shape == ()
    assert header == {}


PRIVATE = Declared(steps=3, version="0.1.0", units=40, epsilon=1.5, ledger="7:" + "a" * 64, audit="9:" + "b" * 64)


def test_what_follows_from_constants_and_the_ledger_is_private_and_comes_back() -> None:
    update = dataclasses.replace(UPDATE, declared=PRIVATE)
    assert Update.from_bytes(update.to_bytes()).declared == PRIVATE
    assert PRIVATE.private
    assert set(PRIVATE.lacking) == MEASURED.keys()


@pytest.mark.parametrize("field", PRIVATE.lacking)
def test_one_measured_figure_is_enough_to_be_no_longer_private(field: str) -> None:
    assert not dataclasses.replace(PRIVATE, **{field: MEASURED[field]}).private
    assert dataclasses.replace(DECLARED, **{field: None}).lacking == [field]


@pytest.mark.parametrize(
    ("privacy", "withheld"),
    [
        ({"unit": "none"}, False),
        ({"unit": "patient", "epsilon": 1.0, "delta": 1e-5}, True),
        ({"unit": "image", "epsilon": 1.0, "delta": 1e-5}, True),
        ({"unit": "site", "epsilon": 1.0, "delta": 1e-5, "clip": 1.0, "cohort": 3, "noise": "site"}, True),
        ({"unit": "site", "epsilon": 1.0, "delta": 1e-5, "clip": 1.0, "cohort": 3, "noise": "server"}, False),
    ],
)
def test_measured_figures_are_withheld_from_whom_the_noise_protects_against(
    privacy: dict[str, Any], withheld: bool
) -> None:
    assert withholds(tiny(privacy=privacy, aggregation={"weights": "uniform"}).privacy) is withheld
