import pytest

from throttllem.core.types import Slo
from throttllem.gateway.http.slo_headers import read_slo
from throttllem.openai_api.errors import ApiError


def test_slos_by_class_and_by_header():
    classes = {"fast": Slo(ttft_s=0.1, e2e_s=2.0)}
    default = Slo(e2e_s=30.0)
    assert read_slo({}, default, classes) == default
    assert read_slo({"x-slo-class": "fast"}, default, classes) == classes["fast"]
    headers = {"x-slo-class": "fast", "x-slo-ttft-ms": "250", "x-slo-tpot-ms": " 1.5e1 "}
    assert read_slo(headers, default, classes) == Slo(ttft_s=0.25, tbt_s=0.015, e2e_s=2.0)
    assert read_slo({"x-slo-e2e-ms": "500"}, default, classes) == Slo(e2e_s=0.5)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e400", "1_0", "", "ten", "1e-323"])
@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-tbt-ms", "x-slo-e2e-ms"])
def test_targets_are_positive_numbers(header, text):
    with pytest.raises(ApiError, match=header) as caught:
        read_slo({header: text}, Slo(), {})
    assert (caught.value.status, caught.value.param) == (400, header)


def test_unknown_class_names_the_known_ones():
    with pytest.raises(ApiError, match="batch, fast"):
        read_slo({"x-slo-class": "slow"}, Slo(), {"fast": Slo(), "batch": Slo()})
    with pytest.raises(ApiError, match="none are configured"):
        read_slo({"x-slo-class": "slow"}, Slo(), {})


@pytest.mark.parametrize(("header", "near"), [("x-slo-tb-ms", "x-slo-tbt-ms"), ("x-slo-e2e", "x-slo-e2e-ms")])
def test_an_unknown_header_is_an_error_with_the_nearest_known(header, near):
    with pytest.raises(ApiError, match=near):
        read_slo({header: "5", "content-type": "application/json"}, Slo(), {})


def test_two_names_of_one_target():
    assert (
        read_slo({"x-slo-tbt-ms": "200"}, Slo(), {}) == read_slo({"x-slo-tpot-ms": "200"}, Slo(), {}) == Slo(tbt_s=0.2)
    )
    with pytest.raises(ApiError, match="the same target; send one of them"):
        read_slo({"x-slo-tbt-ms": "200", "x-slo-tpot-ms": "200"}, Slo(), {})
