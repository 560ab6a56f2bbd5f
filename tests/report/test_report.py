"""Bundles beside each other: tables, plots, and the page in a real Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import browsing
import dense
import pytest

from edgepipe.bundle import Bundle
from edgepipe.cli import main
from edgepipe.report import page, plots
from edgepipe.report.compare import changed_kernels, compare
from edgepipe.report.facts import Facts, gather
from edgepipe.runners import Timing
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


def test_emulated_times_are_in_no_table_and_no_plot() -> None:
    shown = facts("a", 2.5, 0.9), facts("b", 1.25, 0.8, emulated=True)
    assert shown[1].latency_ms is None
    assert "1.250" not in compare(shown)
    text = page.render(shown)
    assert "2.500" in text and "1.250" not in text
    assert "says nothing" not in text and "say nothing of the device" in text
    assert plots.trade_off(shown) == ""
    assert plots.trade_off((facts("a", 2.5, 0.9), facts("b", 1.25, 0.8)))


@pytest.mark.slow
@pytest.mark.needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False)])
def test_the_page_is_readable(tmp_path: Path, width: int, dark: bool) -> None:
    shown = [facts(f"digits-{i}-a-long-target-name", 0.5 + i / 3, 0.9 + i / 100) for i in range(7)]
    text = page.render(shown)
    assert len(text.encode()) < 2_000_000 and "http" not in text.replace("http://www.w3.org/", "")
    assert text == page.render(shown)
    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    with (
        browsing.served(tmp_path) as address,
        browsing.chromium(width=width, dark=dark) as driver,
    ):
        driver.get(address)
        for k in range(2):
            driver.execute_script(f"document.querySelectorAll('svg')[{k}].id = 'plot{k}'")
            assert not browsing.overlaps(driver, f"#plot{k} text")
        # Ink on paper: text in plots has the page's colour, in both schemes.
        ink, plot = driver.execute_script(
            "return [document.body, document.querySelector('svg text')]"
            ".map((e, i) => getComputedStyle(e)[i ? 'fill' : 'color'])"
        )
        beside = driver.execute_script(
            "return document.documentElement.scrollWidth - window.innerWidth"
        )
        points = driver.execute_script("return document.querySelectorAll('#plot0 use').length")
        load_ms = driver.execute_script(
            "const [t] = performance.getEntriesByType('navigation'); return t.loadEventEnd"
        )
        errors = [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    assert ink == plot and beside <= 0 and points >= 7 and load_ms > 0 and not errors


@pytest.fixture
def built(tmp_path: Path) -> Bundle:
    return dense.build(tmp_path, dense.save_model(tmp_path / "dense.onnx", *dense.weights()),
                       *dense.weights())  # fmt: skip


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


def test_what_cannot_run_here_keeps_its_manifest(built: Bundle) -> None:
    result = gather(built, runner="node")
    assert result.latency_ms is None and "it runs wasm bundles" in result.why_not
    assert gather(built, measure=False).quality is None
