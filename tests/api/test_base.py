"""What all models share: errors in the manifest's words, numbers as exact strings, conditions."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dpmoe_operator.api.base import (
    ApiModel,
    DecimalString,
    DeltaString,
    EpsilonString,
    SpecError,
    StatusModel,
    decimal,
    parse,
)


class Inner(ApiModel):
    some_number: int = 0


class Outer(ApiModel):
    inner: Inner = Inner()
    names: list[str] = []


def test_errors_name_the_path_in_the_words_of_the_manifest() -> None:
    with pytest.raises(SpecError) as refused:
        parse(Outer, {"inner": {"someNumber": "x"}})
    assert refused.value.field == "spec.inner.someNumber"
    with pytest.raises(SpecError) as refused:
        parse(Outer, {"names": ["a", 3]}, at="status")
    assert (refused.value.field, refused.value.value) == ("status.names.1", 3)


def test_unknown_fields_are_errors_in_specs_and_dropped_in_statuses() -> None:
    with pytest.raises(SpecError, match=r"spec\.other: 1: Extra inputs .*; remove the field"):
        parse(Outer, {"other": 1})

    class Status(StatusModel):
        state: str = ""

    assert parse(Status, {"state": "Ready", "fromTheFuture": 1}).state == "Ready"


def test_infinity_and_nan_are_no_numbers() -> None:
    class Model(ApiModel):
        number: float

    for text in ("inf", "nan"):
        with pytest.raises(SpecError):
            parse(Model, {"number": float(text)})


def test_objects_leave_absent_fields_out_and_use_wire_names() -> None:
    assert Outer(inner=Inner(some_number=3)).to_object() == {
        "inner": {"someNumber": 3},
        "names": [],
    }


NUMBERS: dict[str, TypeAdapter[str]] = {
    "epsilon": TypeAdapter(EpsilonString),
    "delta": TypeAdapter(DeltaString),
    "decimal": TypeAdapter(DecimalString),
}


def accepts(kind: str, text: str) -> bool:
    try:
        NUMBERS[kind].validate_python(text)
    except ValidationError:
        return False
    return True


@given(st.decimals(min_value=0, max_value=Decimal("9999.999999999"), places=9))
def test_every_epsilon_of_nine_places_is_kept_exactly(number: Decimal) -> None:
    text = f"{number:f}"
    assert accepts("epsilon", text)
    assert decimal(text) == number


WRONG_NUMBERS = [
    "",
    " 1",
    "1 ",
    "+1",
    "-1",
    ".5",
    "1.",
    "01",
    "1,5",
    "0x10",
    "1_000",
    "NaN",
    "1e400",
]


@pytest.mark.parametrize("text", [*WRONG_NUMBERS, "1\n", "1e2"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_other_spellings_of_numbers_are_refused(kind: str, text: str) -> None:
    assert not accepts(kind, text)


@pytest.mark.parametrize("text", ["1e-5", "9.99E-30", "0.00001", "1e-999"])
def test_delta_may_have_a_negative_exponent(text: str) -> None:
    assert accepts("delta", text)
    assert 0 < decimal(text) < 1


@given(st.from_regex(r"\A[0-9eE.+-]{1,12}\Z"))
def test_whatever_is_accepted_is_a_finite_number_in_range(text: str) -> None:
    if accepts("delta", text):
        assert 0 <= decimal(text) < 1
    if accepts("decimal", text):
        assert 0 <= decimal(text) < 10**9
    if accepts("epsilon", text):
        assert 0 <= decimal(text) < 10**4
