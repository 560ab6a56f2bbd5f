"""Size of a report of six bundles, and how long Chromium takes to open it.

The digits network in three recipes for this machine and for WebAssembly, with everything that a
report shows. Or any report that is there:

  report_page.py [REPORT.html] [--times 7]

Needs Chromium with its driver, and selenium (the `dev` extra).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from edgepipe.cli import main as edgepipe
from edgepipe.machine import machine, one_line, versions

RECIPES = ("fp32", "w8a8", "fp32+60%")
TARGETS = ("host", "wasm-relaxed")


def build(folder: Path) -> Path:
    """Six bundles and their report in ``folder``."""
    bundles = []
    for target in TARGETS:
        for recipe in RECIPES:
            bundles.append(str(folder / f"digits-{target}-{recipe.replace('%', '')}"))
            words = ["compile", "digits", "--target", target, "--recipe", recipe, "--quiet"]
            calibrated = [] if recipe == "fp32" else ["--calibration", "digits-train"]
            emitted = ["--emit", "onnx"] if recipe == "w8a8" else []
            _call([*words, *calibrated, *emitted, "-o", bundles[-1]])
    report = folder / "report.html"
    _call(["report", *bundles, "--data", "digits", "-o", str(report), "--quiet"])
    return report


def _call(words: list[str]) -> None:
    if code := edgepipe(words):
        sys.exit(code)


def load_ms(report: Path, times: int) -> list[float]:
    """From the request to the end of the load event, ``times`` times in one browser."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    found = []
    try:
        for _ in range(times):
            driver.get("about:blank")
            driver.get(report.resolve().as_uri())
            # Two frames behind the load event everything has been laid out and painted.
            found.append(driver.execute_async_script(
                "const done = arguments[0];"
                "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))"
            ))  # fmt: skip
    finally:
        driver.quit()
    return found


def main() -> None:
    """Build where nothing is given, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", nargs="?", type=Path)
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgepipe-bench-") as folder:
        report = options.report or build(Path(folder))
        ms = load_ms(report, options.times)
        took = f"{statistics.median(ms):.0f} ms (median of {len(ms)}), {min(ms):.0f} ms at best"
        print(f"{report.stat().st_size / 1024:.0f} KB, opened and painted in {took}")
    print(one_line(machine()))
    print(one_line(versions("edgepipe", "matplotlib")))


if __name__ == "__main__":
    main()
