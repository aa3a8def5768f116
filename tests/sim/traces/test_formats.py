"""Every format of trace files: what was written is read, failed requests are left out, the rest is an error."""

import bz2
import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import DOCS, table_rows
from sim.traces import written

from throttllem.sim.traces import trace as trace_module
from throttllem.sim.traces.documents import DOCUMENTS
from throttllem.sim.traces.formats import FORMATS
from throttllem.sim.traces.trace import TraceError, load_trace

SIMPLE = [(0.0, 374, 44), (0.84, 1215, 309), (1.31, 86, 412)]
FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = st.lists(
    st.tuples(st.integers(0, 10**9).map(lambda us: us / 1e6), st.integers(1, 10**6), st.integers(1, 10**5)),
    min_size=2,
    max_size=6,
    unique_by=lambda row: row[0],
)


def own(trace):
    """Rows left out, but for spans that are no requests."""
    return {why: rows for why, rows in trace.reading.skipped.items() if "operation" not in why}


def load(path, content, columns=None):
    path.write_bytes(content)
    return load_trace(str(path), columns=columns, rescaled=True)


@pytest.mark.parametrize("writer", written.WRITERS, ids=lambda writer: writer.__name__)
def test_every_format_reads_the_same_requests(tmp_path, writer):
    found = load(tmp_path / "t.x", writer(SIMPLE), written.WRITERS[writer])
    assert found.arrays.arrival_s.tolist() == pytest.approx([0.0, 0.84, 1.31], abs=1e-6)
    assert found.arrays.prompt_tokens.tolist() == [374, 1215, 86]
    assert found.arrays.output_tokens.tolist() == [44, 309, 412]
    assert own(found) == {} and not found.reading.unordered


@given(
    rows=ROWS,
    writer=st.sampled_from(sorted(written.WRITERS, key=lambda each: each.__name__)),
    how=st.sampled_from(["", "gz"]),
)
@FAST
def test_what_is_written_is_read(tmp_path, rows, writer, how):
    found = load(tmp_path / "t", written.compressed(writer(rows), how), written.WRITERS[writer])
    right = sorted(rows)
    assert found.arrays.arrival_s.tolist() == pytest.approx([at_s - right[0][0] for at_s, _, _ in right], abs=2e-6)
    assert list(zip(found.arrays.prompt_tokens, found.arrays.output_tokens, strict=True)) == [r[1:] for r in right]
    assert found.reading.unordered == (right != rows)


@given(
    writer=st.sampled_from(sorted(written.WRITERS, key=lambda each: each.__name__)),
    place=st.integers(0, 2000),
    new=st.one_of(st.binary(max_size=6), st.sampled_from([b"null", b"-1", b"[", b'"', b"\n", b"NaN", b"1e300"])),
    cut=st.integers(0, 8),
)
@FAST
def test_a_damaged_file_is_read_or_refused(tmp_path, writer, place, new, cut):
    content = writer(SIMPLE)
    place %= len(content)
    try:
        found = load(tmp_path / "t", content[:place] + new + content[place + cut :], written.WRITERS[writer])
    except TraceError as error:
        assert str(tmp_path / "t") in str(error) or "--columns" in str(error)
        return
    assert 1 <= found.requests + sum(own(found).values()) <= 4
    assert (found.arrays.prompt_tokens > 0).all() and (found.arrays.arrival_s >= 0).all()


def changed(writer, old, new, rows=SIMPLE):
    text = writer(rows).decode()
    assert old in text
    return text.replace(old, new, 1).encode()


FAILED = [
    (written.burstgpt(SIMPLE).replace(b"44.0", b"0"), "no output tokens"),
    (written.azure(SIMPLE).replace(b",44", b","), "no output tokens"),
    (written.azure(SIMPLE).replace(b"374,", b"0,"), "no prompt tokens"),
    (changed(written.mooncake, '"output_length": 44', '"output_length": null'), "no output tokens"),
    (changed(written.mooncake, '"hash_ids": [1]', '"error": "timeout"'), "failed"),
    (changed(written.mooncake, '"hash_ids"', '"status": 500, "hash_ids"'), "failed"),
    (changed(written.vllm, '"errors": [""', '"errors": ["boom"'), "failed"),
    (changed(written.vllm, '"output_lens": [44', '"output_lens": [0'), "no output tokens"),
    (changed(written.aiperf, '"error": null', '"error": {"code": 499}'), "failed"),
    (changed(written.aiperf, '"was_cancelled": false', '"was_cancelled": true'), "failed"),
    (changed(written.opentelemetry, '"status": {}', '"status": {"code": 2}'), "failed"),
    (changed(written.genai_perf, "usage", "usag"), "failed"),
]


@pytest.mark.parametrize(("content", "why"), FAILED)
def test_failed_requests_are_left_out_and_counted(tmp_path, content, why):
    if b'"status": 500' in content:  # the other rows say that they succeeded
        content = content.replace(b'"hash_ids"', b'"status": 200, "hash_ids"').replace(b'500, "status": 200', b"500")
    found = load(tmp_path / "t", content)
    assert own(found) == {why: 1}
    assert found.arrays.output_tokens.tolist() == [309, 412]
    assert f"1 {why}" in found.described()


@pytest.mark.parametrize("none", ["0.0", "0", "", "None", "200", "n/a", "OK"])
def test_an_error_column_that_names_no_error_leaves_no_row_out(tmp_path, none):
    content = written.own_csv(SIMPLE).replace(b"code", b"error", 1).replace(b";200", f";{none}".encode())
    columns = written.OWN.replace("status=code", "status=error")
    assert load(tmp_path / "t", content, columns).reading.skipped == {}
    with pytest.raises(TraceError, match=r"rows left out: 3 failed \(by error\)"):
        load(tmp_path / "t", content.replace(f";{none}\r\n".encode(), b";boom\r\n"), columns)


@pytest.mark.parametrize("gone", [b'"was_cancelled": false', b'"input_sequence_length"', b'"output_sequence_length"'])
def test_an_export_of_aiperf_that_lacks_a_field_is_read_or_refused(tmp_path, gone):
    content = written.aiperf(SIMPLE)
    assert load(tmp_path / "t", content.replace(gone, b'"x": 0' if b":" in gone else b'"x"', 1)).requests in (2, 3)
    try:
        found = load(tmp_path / "t", content.replace(gone, b'"x": 0' if b":" in gone else b'"x"'))
    except TraceError as error:
        assert b"cancelled" not in gone and "rows left out: 3 no" in str(error)
        return
    assert found.requests == 3


@pytest.mark.parametrize(("operation", "requests"), [("responses", 3), ("execute_tool", 2)])
def test_spans_that_generate_are_requests_and_others_are_counted(tmp_path, operation, requests):
    found = load(tmp_path / "t", changed(written.opentelemetry, '"chat"', f'"{operation}"'))
    assert found.requests == requests
    assert f"{3 - requests} of operation {operation}" in found.described() or requests == 3
    assert found.reading.skipped["of operation invoke_agent"] == 3


@pytest.mark.parametrize("writer", [written.vllm, written.genai_perf, written.opentelemetry])
def test_a_document_of_other_values_is_refused_in_words_of_its_format(tmp_path, writer):
    def places(found, path=()):
        if isinstance(found, dict | list):
            for key in found if isinstance(found, dict) else range(len(found)):
                yield (*path, key)
                yield from places(found[key], (*path, key))

    text = writer(SIMPLE[:1]).decode()
    for path in list(places(json.loads(text))):
        for junk in (None, 5, "x", [], {}, [5], {"a": 1}):
            changing = json.loads(text)
            inside = changing
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = junk
            try:
                load(tmp_path / "t", json.dumps(changing).encode())
            except TraceError as error:
                assert "Error(" not in str(error)


def test_a_status_column_of_the_users(tmp_path):
    content = written.own_csv(SIMPLE).replace(b";200", b";503", 1)
    assert load(tmp_path / "t", content, written.OWN).reading.skipped == {"failed": 1}


def test_the_guide_names_every_format_as_it_is_read():
    rows = table_rows((DOCS / "simulation.md").read_text(), "format")
    told = {(row[0].split(" (")[0].split(" `")[0], *(cell.replace("`", "") for cell in row[3:])) for row in rows}
    known = [each.layout for each in FORMATS] + [layout for _, layout in DOCUMENTS.values()]
    assert told == {(each.format, f"{each.arrival}, {each.unit}", each.prompt, each.generated) for each in known}


# ---- units ----------------------------------------------------------------------------------------------------


def seconds_jsonl(rows, **more):
    lines = [json.dumps({"timestamp": at, "input_length": p, "output_length": g} | more) for at, p, g in rows]
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize(
    "content",
    [
        seconds_jsonl(SIMPLE),  # fractions of a millisecond
        seconds_jsonl([(n, 10, 10) for n in range(0, 90, 2)]),  # 500 requests/s
        seconds_jsonl(SIMPLE, hash_ids=[1]),  # 2,000 requests/s
    ],
)
def test_seconds_are_not_read_as_milliseconds(tmp_path, content):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceError, match="unit=s"):
        load_trace(str(path))
    assert load_trace(str(path), columns="unit=s").duration_s > 1
    assert load_trace(str(path), columns="unit=ms").duration_s < 0.1


def test_a_unit_by_custom_is_shown_with_the_way_to_overrule_it(tmp_path):
    bare = load(tmp_path / "t", seconds_jsonl([(0, 5, 5), (840, 5, 5), (1310, 5, 5)]))
    assert "3 requests over 1.31 s, 2.29 requests/s" in bare.described()
    assert "timestamp in ms" in bare.described() and "--columns unit=s" in bare.described()
    assert "unit=s" not in load(tmp_path / "t", written.mooncake(SIMPLE)).described()


@pytest.mark.parametrize("writer", [written.burstgpt, written.servegen])
def test_milliseconds_are_not_read_as_seconds(tmp_path, writer):
    path = tmp_path / "t"
    path.write_bytes(writer([(700 * n, 10, 10) for n in range(200)]).replace(b".0,", b","))
    with pytest.raises(TraceError, match=r"0\.001\d+ requests/s over .*; below 0\.01 .*unit=ms: 1\.4\d requests/s"):
        load_trace(str(path))
    assert load_trace(str(path), columns="unit=ms").duration_s == pytest.approx(139.3)
    path.write_bytes(writer([(2 * n, 10, 10) for n in range(200)]).replace(b".0,", b","))
    assert "custom says s; if it is ms: --columns unit=ms" in load_trace(str(path)).described()
    path.write_bytes(writer([(0.7 * n, 10, 10) for n in range(200)]))
    assert "unit=ms" not in load_trace(str(path)).described()


def test_a_wrong_unit_is_refused_with_what_others_make_of_it(tmp_path):
    (tmp_path / "b.csv").write_bytes(written.own_csv(SIMPLE))
    with pytest.raises(TraceError, match=r"at = '0.0' is a number of unknown unit; add unit=s, ms, us or ns"):
        load_trace(str(tmp_path / "b.csv"), columns="arrival=at,prompt=in,generated=out")
    (tmp_path / "a").write_bytes(seconds_jsonl([(n, 10, 10) for n in range(90)], hash_ids=[]))
    with pytest.raises(TraceError, match=r"1,011 requests/s over 0\.089 s.*unit=s: 1\.01 requests/s; unit=ms if"):
        load_trace(str(tmp_path / "a"))
    assert load_trace(str(tmp_path / "a"), rescaled=True).requests == 90


def test_a_span_of_years_is_another_unit(tmp_path):
    (tmp_path / "b").write_bytes(written.burstgpt([(1000.0 * at, 9, 9) for at in range(0, 40_000, 2000)]))
    with pytest.raises(TraceError, match=r"over 440 days; above 366 days the column or its unit .*unit=ms: 0\.000526"):
        load_trace(str(tmp_path / "b"))
    assert load_trace(str(tmp_path / "b"), columns="unit=ms").duration_s == 38_000


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("arrival", "must be key=column"),
        ("arrival=a,arrival=b", "must be key=column, each key once"),
        ("arival=a", "unknown key 'arival'; did you mean arrival"),
        ("unit=min", "unit = 'min': must be one of s, ms, us, ns"),
        ("prompt=ContxtTokens", "prompt=ContxtTokens: no such column; did you mean ContextTokens"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, message):
    with pytest.raises(TraceError, match=message):
        load(tmp_path / "t", written.azure(SIMPLE), columns)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"line,in_tokens,out_tokens\n1,2,3\n", r"--columns 'arrival=COLUMN,prompt=COLUMN,generated=out_tokens"),
        (b'{"input_lens": [1], "output_lens": [2]}', "without start_times: save it with --save-detailed"),
        (b'{"input_lens": [1], "output_lens": [2, 3], "start_times": [0]}', "differ in length"),
        (written.genai_perf(SIMPLE).replace(b"usage", b"usag"), "holds texts, no token counts"),
        (b'{\n"a": 1,\n}', ":3: is not JSON"),
        (gzip.compress(written.azure_parquet(SIMPLE)), "is Parquet inside another compression; unpack it"),
        (bz2.compress(written.azure(SIMPLE)), "is bzip2; give it as UTF-8 text, plain or compressed with gzip or zstd"),
        (written.azure(SIMPLE).decode().encode("utf-16"), "is UTF-16; give it as UTF-8 text"),
        (b"PAR1 no parquet", "cannot be read"),
        (b"\x1f\x8b\x08 no gzip", "cannot be read"),
        (b"0,0.04,1.2,Gamma\n".replace(b"Gamma", b"7"), "is no header"),
    ],
)
def test_other_files_are_refused_with_the_way_out(tmp_path, content, message):
    with pytest.raises(TraceError, match=message):
        load(tmp_path / "t", content)


def test_the_line_of_a_bad_value_is_right_after_texts_of_several_lines(tmp_path):
    content = b'at,in,text,out\n1,2,"a\nb, ""c""\n",3\n\n2,2,x,3\n3,2,x,y\n'
    with pytest.raises(TraceError, match=r"t:7: out = 'y': must be a whole number of tokens"):
        load(tmp_path / "t", content, "arrival=at,prompt=in,generated=out,unit=s")


def test_aiperfs_statistics_are_no_trace(tmp_path):
    with pytest.raises(TraceError, match=r"give profile_export\.jsonl"):
        load(tmp_path / "profile_export_aiperf.json", b'{"input_config": {}, "request_count": {"avg": 1}}')


# ---- long files -----------------------------------------------------------------------------------------------


def test_a_long_file_is_streamed_with_the_same_requests(tmp_path, monkeypatch):
    rows = [(n * 0.5, 10 + n % 7, 1 + n % 5) for n in range(300)]
    held = load(tmp_path / "held.csv", written.azure(rows))
    monkeypatch.setattr(trace_module, "MOST_HELD", 100)
    streamed = load(tmp_path / "long.csv", written.azure(rows))
    assert isinstance(held.rows, trace_module.Held) and isinstance(streamed.rows, trace_module.Streamed)
    assert streamed.summary == held.summary
    for one, other in ((streamed, held), (streamed.scaled(peak_rps=0.7).cut(90), held.scaled(peak_rps=0.7).cut(90))):
        assert [column.tolist() for column in one.arrays] == [column.tolist() for column in other.arrays]
    (tmp_path / "long.csv").write_bytes(written.azure(rows[:200]))
    with pytest.raises(TraceError, match="changed while"):
        list(streamed.blocks())
    with pytest.raises(TraceError, match=r"long\.csv:3: arrives before the row above.*sort it by TIMESTAMP"):
        load(tmp_path / "long.csv", written.azure([rows[5], *rows]))
