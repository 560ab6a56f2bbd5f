"""Bundles beside each other: tables, plots, and the page in a real Chromium."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import browsing
import dense
import pytest

from edgepipe.benchmark import Benchmark, Latency, in_turn
from edgepipe.bundle import Bundle
from edgepipe.cli import main
from edgepipe.layer_report import LayerReport, LayersReport
from edgepipe.op_profile import OpProfile, Profile
from edgepipe.report import operators, page, plots
from edgepipe.report.compare import changed_kernels, compare
from edgepipe.report.facts import Facts, gather, slower
from edgepipe.runners import Timing, local
from edgepipe.validation_report import Report

KERNEL = {"op": "conv_1", "op_type": "Conv+relu", "kernel": "conv_0", "arithmetic": "float32",
          "accumulator": "float32", "macs": 100}  # fmt: skip


def facts(name: str, ms: float, accuracy: float, kernel: str = "conv_0", **more: object) -> Facts:
    timing = Timing("local", "cpu <x>", bool(more.pop("emulated", False)), 9, 1, ms, ms, ms, ms, ms)
    report = Report(name, "local", "data", False, 9, (), None, accuracy, 0.99)
    other = {"op": "gemm_2", "op_type": "Gemm", "kernel": kernel}
    return Facts(name, "net", "host", "fp32", 2048, 4096, 1024, 200, (KERNEL, {**KERNEL, **other}),
                 report, timing, **more)  # fmt: skip


def test_the_front_holds_what_nothing_else_beats() -> None:
    assert plots.pareto([(2, 5), (1, 4), (3, 4.5), (4, 6), (1, 3)]) == [(1, 4), (2, 5), (4, 6)]


def test_changes_are_found_by_operator() -> None:
    first, other = facts("a", 2.0, 0.9), facts("b", 1.0, 0.8, "dense_7")
    assert changed_kernels(first, first) == []
    assert changed_kernels(first, other) == [("gemm_2 (Gemm)", "conv float32", "dense float32")]
    text = compare([first, other, first])
    assert "1.000 ms (0.50 ×)" in text and "80.00 %" in text
    assert "1 operators are executed otherwise in b" in text
    assert "every operator is executed as in a" in text


def test_what_is_slower_than_float_is_said() -> None:
    plain = facts("a", 2.0, 0.9)
    quantized = replace(facts("b", 2.2, 0.9), recipe="w8a8")
    (line,) = slower([plain, quantized])
    assert line == "b (w8a8) is slower than a (fp32), as measured: 1.10 times its median latency"
    assert line in compare([quantized, plain]) and line in page.render([plain, quantized])
    for other in (
        replace(quantized, timing=replace(plain.timing, p50_ms=2.05)),
        replace(quantized, target="raspberry-pi-4"),
        replace(quantized, network="another"),
        replace(quantized, timing=None),
        replace(quantized, recipe="fp32"),
    ):
        assert slower([plain, other]) == []
    sparse = replace(quantized, recipe="fp32+2:4")
    assert len(slower([plain, sparse, quantized])) == 2


def test_operators_are_told_apart_by_their_whole_names() -> None:
    def named(*names: str) -> Facts:
        return replace(facts("f", 1.0, 0.9), kernels=tuple(
            {**KERNEL, "op": name, "kernel": f"{name.count('codes')}_conv"} for name in names
        ))  # fmt: skip

    first = named("/conv1/Conv; /Relu", "/layer1/conv2/Conv")
    other = named("/conv1/Conv; /Relu/codes/QuantizeLinear", "/layer1/conv2/Conv")
    ((name, *_),) = changed_kernels(first, other)
    assert name == "/conv1/Conv (Conv)"
    assert changed_kernels(named("x/codes/QuantizeLinear"), named("x"))[0][0] == "x (Conv)"


def test_emulated_times_are_in_no_table_and_no_plot() -> None:
    shown = facts("a", 2.5, 0.9), facts("b", 1.25, 0.8, emulated=True)
    assert shown[1].latency_ms is None
    assert "1.250" not in compare(shown)
    text = page.render(shown)
    assert "2.500" in text and "1.250" not in text
    assert "says nothing" not in text and "say nothing of the device" in text
    assert plots.trade_off(shown) == ""
    assert plots.trade_off((facts("a", 2.5, 0.9), facts("b", 1.25, 0.8)))


def op(name: str, macs: int, us: float, kernel: str = "conv_0") -> OpProfile:
    return OpProfile(name, "Conv", kernel, "float32", macs, 4096, us, us, 100e9, 10e9)


def detailed(name: str, index: int) -> Facts:
    """Facts with everything that a report can show."""
    ops = (op("a", 2_000_000, 60.0), op("b", 50_000, 9.0, "depthwise_0"), op("c", 0, 4.0))
    profile = Profile(name, "local", "cpu", 9, 80.0 + index, ops, {"float32": 100e9},
                      ((16384, 10e9),), {}, {})  # fmt: skip
    layers = tuple(
        LayerReport(f"t{i}", f"layer_{i}", "Conv", 8, 40.0 - i, 1.5, 0.01, 0.9,
                    (-1.0 - i, 2.0), (-1.0, 2.0))
        for i in range(12)
    )  # fmt: skip
    sparse = {**KERNEL, "op": "c", "sparsity": {"zeros": 0.8, "form": "rows"}}
    dense_form = {**KERNEL, "op": "d", "sparsity": {"zeros": 0.3, "form": "dense"}}
    latency = Latency("edgepipe", 0.5 + index / 3, 0.4, 0.9, 0.3)
    peer = Latency("ONNX <Runtime> 1", 1.0, 0.9, 1.1, 0.8, snr_db=99.0)
    base = facts(name, 0.5 + index / 3, 0.9 + index / 100)
    return replace(
        base, kernels=(KERNEL, sparse, dense_form), profile=profile,
        layers=LayersReport("data", False, 9, layers),
        arena=((0, 512, 0, 1), (512, 512, 1, 2), (0, 256, 2, 2)),
        benchmark=Benchmark(name, "local", latency, (peer,), 9, 3, {}, {}, base.timing),
    )  # fmt: skip


@pytest.mark.slow
def test_every_part_is_there() -> None:
    text = page.render([detailed("one", 0), facts("two", 2.0, 0.8)])
    plain = html.unescape(text)
    assert "ONNX <Runtime> 1" not in text and "ONNX <Runtime> 1" in plain
    assert "0.50 ×" in text and "99.0" in text
    for name in ("trade-off", "efficiency-gap", "sizes", "waterline-0", "noise-0", "ranges-0",
                 "zeros-0", "arena-0"):  # fmt: skip
        assert text.count(f'aria-label="{name}"') == 1, name
    assert "waterline-1" not in text  # nothing was profiled
    # 2 * 2.05 million operations at 100 G/s take 41 of 80 µs
    assert "one: 51 %" in text
    assert "5.5 % of the time goes to operators that do not multiply" in text
    assert "layer_11" in text and "depthwise_0" not in text


def test_tall_bars_of_small_operators_are_cut() -> None:
    ops = (op("a", 1_000_000, 30.0), op("b", 1_000, 9.0))
    shown = Profile("p", "local", "cpu", 9, 40.0, ops, {}, (), {}, {})
    assert operators._cut(ops) == pytest.approx(1.1 * 1.5)
    assert ": 1 of 2" in operators.beside_the_waterline(shown)
    assert operators._cut(ops[:1]) == pytest.approx(1.1 * 1.5)
    assert operators.waterline(replace(shown, ops=(op("c", 0, 1.0),)), "w") == ""


@pytest.mark.slow
@pytest.mark.needs_browser
@pytest.mark.parametrize(
    ("width", "dark", "media"),
    [(390, False, "screen"), (390, True, "screen"), (1280, False, "screen"), (703, True, "print")],
)
def test_the_page_is_readable(tmp_path: Path, width: int, dark: bool, media: str) -> None:
    shown = [detailed(f"digits-{i}-a-long-target-name", i) for i in range(7)]
    text = page.render(shown)
    assert len(text.encode()) < 2_000_000 and "http" not in text.replace("http://www.w3.org/", "")
    assert text == page.render(shown)
    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    with (
        browsing.served(tmp_path) as address,
        browsing.chromium(width=width, dark=dark, media=media) as driver,
    ):
        driver.get(address)
        count = driver.execute_script(
            "const all = [...document.querySelectorAll('svg')];"
            "all.forEach((e, i) => (e.id = `plot${i}`)); return all.length"
        )
        assert count == 3 + 5 * len(shown)
        # Figures of one kind differ by their numbers alone: all of the page's, one bundle's.
        for k in range(8):
            assert not browsing.overlaps(driver, f"#plot{k} text"), k
        assert not browsing.overlaps(driver, "h1, h2, figure, section > .wide, summary, .soft")
        assert driver.execute_script(EMPTY) == []
        # Ink on paper: text in plots has the page's colour, in both schemes.
        ink, plot = driver.execute_script(
            "return [document.body, document.querySelector('svg text')]"
            ".map((e, i) => getComputedStyle(e)[i ? 'fill' : 'color'])"
        )
        beside = driver.execute_script(
            "return document.documentElement.scrollWidth - window.innerWidth"
        )
        points = driver.execute_script("return document.querySelectorAll('#plot0 use').length")
        cut = driver.execute_script(
            "return [...document.querySelectorAll('.wide')]"
            ".some((e) => e.scrollWidth > e.clientWidth)"
        )  # a screen scrolls, paper does not
        errors = [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
        # A control: an empty plot, and a text on another, are found.
        driver.execute_script(
            "document.querySelectorAll('#plot1 path, #plot1 use').forEach((e) => e.remove());"
            "const [a, b] = document.querySelectorAll('#plot0 text');"
            "b.replaceWith(a.cloneNode(true))"
        )
        assert driver.execute_script(EMPTY) == ["efficiency-gap"]
        assert browsing.overlaps(driver, "#plot0 text")
    assert ink == plot and beside <= 0 and points >= 7 and not errors
    if media == "print":
        assert ink == "rgb(0, 0, 0)" and not cut


#: Labels of the figures without anything in a colour of its own, which only data have.
EMPTY = """
return [...document.querySelectorAll('svg')].filter((svg) =>
  ![...svg.querySelectorAll('path, use')].some((e) =>
    /(fill|stroke): #/.test(e.getAttribute('style'))
    && e.getBoundingClientRect().width + e.getBoundingClientRect().height > 0)
).map((svg) => svg.getAttribute('aria-label'));
"""


@pytest.fixture
def built(tmp_path: Path) -> Bundle:
    return dense.build(tmp_path, dense.save_model(tmp_path / "dense.onnx", *dense.weights()),
                       *dense.weights())  # fmt: skip


@pytest.mark.slow
def test_commands(built: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = str(built.path), tmp_path / "report.html"
    assert main(["report", path, "-o", str(output), "--runs", "5", "--quiet"]) == 0
    first = output.read_text(encoding="utf-8")
    assert built.path.name in first
    assert main(["report", path, "-o", str(output), "--runs", "5", "--quiet"]) == 0  # its own
    assert main(["compare", path, path, "--runs", "5", "--json"]) == 0
    ours, same = json.loads(capsys.readouterr().out)
    assert ours["latency_ms"] > 0 and same["changed_kernels"] == []
    assert main(["compare", path]) == 2
    output.write_text("mine")
    assert main(["report", path, "-o", str(output)]) == 2
    assert output.read_text() == "mine"
    assert "is not replaced" in capsys.readouterr().err


def test_bundles_are_timed_in_turn(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    times = iter([5.0, 9.0, 3.0, 8.0, 4.0, 7.0])

    def bench(bundle: Bundle, runs: int, warmup: int) -> Timing:
        order.append(bundle.path.name)
        ms = next(times)
        return Timing("local", "cpu", False, runs, warmup, ms, ms, ms, ms, ms)

    monkeypatch.setattr(local, "bench", bench)
    other = Bundle(built.path.parent / "other", built.manifest)
    shown = in_turn([built, other], runs=3)
    assert order == [built.path.name, "other"] * 3
    assert [t.p50_ms for t in shown] == [4.0, 8.0]


def test_what_cannot_run_here_keeps_its_manifest(built: Bundle) -> None:
    result = gather(built, runner="node")
    assert result.latency_ms is None and "it runs wasm bundles" in result.why_not
    assert gather(built, measure=False).quality is None
