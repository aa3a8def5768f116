import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from throttllem.engines.prometheus import samples, total

PAGE = b"""# HELP vllm:num_requests_running Number of requests, vllm:num_requests_running 7
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a,b}\\"\\\\ {"} 3.0
vllm:num_requests_running{engine="1",model_name="x"} 2.0 1712345678000
vllm:num_requests_running_by{engine="0"} 9.0
up 1
bare\t+Inf
odd{a="1" 4.0
odd{} x
odd{ a = "1" , } 5 # {trace="z"} 1.0
"""


def test_only_samples_of_exactly_this_name():
    found = list(samples(PAGE, "vllm:num_requests_running"))
    assert [(sample.labels["engine"], sample.value) for sample in found] == [("0", 3.0), ("1", 2.0)]
    assert found[0].labels["model_name"] == 'a,b}"\\ {'
    assert total(PAGE, "vllm:num_requests_running") == 5.0


def test_lines_that_are_no_samples_are_passed_over():
    assert [(sample.labels, sample.value) for sample in samples(PAGE, "odd")] == [({"a": "1"}, 5.0)]
    assert total(PAGE, "up") == 1.0
    assert total(PAGE, "bare") == math.inf


@pytest.mark.parametrize("name", ["running", "vllm", "down", "nothing"])
def test_absent_is_none(name):
    assert total(PAGE, name) is None
    assert total(b"", name) is None


@given(value=st.text(), other=st.text(), number=st.floats(allow_nan=False))
def test_reads_what_the_client_library_writes(value, other, number):
    registry = CollectorRegistry()
    gauge = Gauge("things", "x", ["one", "two"], registry=registry)
    gauge.labels(value, other).set(number)
    page = generate_latest(registry)
    labels, read = next((sample.labels, sample.value) for sample in samples(page, "things"))
    assert (labels, read) == ({"one": value, "two": other}, number)


@given(st.binary(max_size=200))
def test_no_bytes_raise(noise):
    list(samples(b"x" + noise + b'\nx{a="' + noise, "x"))
