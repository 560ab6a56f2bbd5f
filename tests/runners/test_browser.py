"""The runner `browser` and the page bench.html, in a real Chromium."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import browsing
import handmade
import naming
import numpy as np
import pytest
from selenium.webdriver.support.ui import WebDriverWait

import edgepipe
from edgepipe.bundle import Bundle
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.golden import npz_bytes
from edgepipe.runners import _page, browser
from edgepipe.runners._base import Address

pytestmark = pytest.mark.needs_browser
Made = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return edgepipe.compile(
        "digits", target="wasm-relaxed", recipe="w8a8", calibration="digits-train",
        output=tmp_path_factory.mktemp("browser") / "digits",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.needs_wasmtime
def test_int8_outputs_equal_those_of_wasmtime_bit_for_bit(int8: Bundle) -> None:
    images = np.random.default_rng(0).uniform(0, 1, (20, 1, 8, 8)).astype(np.float32)
    ours = int8.run({"image": images}, "browser")["logits"]
    assert ours.tobytes() == int8.run({"image": images}, "wasmtime")["logits"].tobytes()
    exact = int8.golden_integers()["logits"]
    golden = int8.run(int8.golden()[0], "browser")["logits"]
    assert np.array_equal(golden, exact)
    # Positive control: other inputs give other outputs.
    assert not np.array_equal(ours, int8.run({"image": images[::-1]}, "browser")["logits"])


def fake_browser(folder: Path, script: str) -> str:
    program = folder / "browser"
    program.write_text(f"#!/bin/sh\necho $$ > {folder}/pid\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sleep 600", "no sign of life from the browser within 1 s"),
        ("exit 3", r"the browser ended \(3\)"),
    ],
)
def test_a_browser_that_does_not_answer(
    made: Made, tmp_path: Path, script: str, message: str
) -> None:
    program = fake_browser(tmp_path, script)
    with pytest.raises(EdgepipeError, match=message):
        made("wasm-simd").run(handmade.inputs(), f"browser:{program},timeout=1")
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_missing_browsers_and_bad_addresses_are_refused(made: Made) -> None:
    bundle = made("wasm-simd")
    with pytest.raises(UserError, match="apt-get install chromium"):
        bundle.run(handmade.inputs(), "browser:no-such-browser")
    with pytest.raises(UserError, match="did you mean 'timeout'"):
        bundle.run(handmade.inputs(), "browser,timeot=3")
    with pytest.raises(UserError, match="no positive number"):
        bundle.run(handmade.inputs(), "browser,timeout=soon")
    with pytest.raises(UserError, match="is no KEY=VALUE"):
        bundle.run(handmade.inputs(), "browser,fast")
    with pytest.raises(UserError, match="takes no address"):
        bundle.run(handmade.inputs(), "node:here")
    with pytest.raises(UserError, match="it runs wasm bundles"):
        made("host").run(handmade.inputs(), "browser")


def test_an_error_in_the_page_is_told(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(made("wasm-simd").path, folder)
    text = "export const load = async () => { throw new Error('no luck'); };"
    (folder / "model.mjs").write_text(text, encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.mjs"] |= {"bytes": len(text)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(folder)
    bundle._verified.add("model.mjs")
    with pytest.raises(EdgepipeError, match=r"the page failed.*no luck"):
        bundle.run(handmade.inputs(), "browser")


@pytest.mark.slow
def test_a_first_inference(made: Made, tmp_path: Path) -> None:
    runner = browser.at(Address())
    assert 0 < runner.first_ms(made("wasm-relaxed")) < 60_000
    folder = tmp_path / "broken"
    shutil.copytree(made("wasm-relaxed").path, folder)
    text = (folder / "model.mjs").read_text().replace('bytes("weights.bin"', 'bytes("wrights.bin"')
    (folder / "model.mjs").write_text(text, encoding="utf-8")
    bundle = Bundle.open(folder)
    bundle._verified.add("model.mjs")
    with pytest.raises(EdgepipeError, match=r"the page asked for .*wrights\.bin"):
        runner.first_ms(bundle)


def test_options_of_each_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    firefox = _page.command("/usr/bin/firefox-esr", tmp_path, "URL")
    assert firefox[1:] == ["--headless", "--no-remote", "--profile", str(tmp_path), "URL"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert "--no-sandbox" not in _page.command("/usr/bin/chromium", tmp_path, "URL")


@pytest.mark.slow
def test_the_page_measures_and_checks_itself(made: Made) -> None:
    """From a plain static server, without isolation headers, as on a phone."""
    with browsing.served(made("wasm-relaxed").path) as address, browsing.chromium() as driver:
        driver.get(f"{address}/bench.html?run")
        WebDriverWait(driver, 60).until(lambda d: driver.execute_script("return window.result"))
        result = driver.execute_script("return window.result")
        text = driver.execute_script("return document.body.innerText")
        wide = driver.execute_script(
            "return document.documentElement.scrollWidth - window.innerWidth"
        )
        assert not browsing.overlaps(driver, "#plot text") and wide <= 0
        errors = [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    assert not errors
    assert result["golden"]["snr_db"] is None or result["golden"]["snr_db"] > 100
    assert result["variant"] == "relaxed" and result["features"]["relaxed"]
    assert 0 < result["min_ms"] <= result["p50_ms"] <= result["p90_ms"] <= result["p99_ms"]
    assert result["inferences_per_timing"] > 1  # 0.1 ms clock, microseconds per inference
    assert "handmade, fp32" in text and "ok:" in text and "WRONG" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("x", "y"), naming.STRANGE)
def test_names_on_the_page_are_only_names(tmp_path: Path, x: str, y: str) -> None:
    made = naming.named(tmp_path / "b", x, y)
    with browsing.served(made.path) as address, browsing.chromium() as driver:
        driver.get(f"{address}/bench.html?run")
        WebDriverWait(driver, 60).until(lambda d: driver.execute_script("return window.result"))
        text = driver.execute_script("return document.body.innerText")
        errors = [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
        scripts = driver.execute_script("return document.scripts.length")
        driver.get(f"{address}/bench.html")
        assert scripts == driver.execute_script("return document.scripts.length")
    assert not errors
    assert "ok:" in text and "WRONG" not in text


@pytest.mark.slow
def test_the_page_notices_wrong_outputs(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(made("wasm-simd").path, folder)
    with np.load(folder / "golden.npz") as archive:
        golden = dict(archive)
    golden["output_0"] = golden["output_0"] * 1.01
    (folder / "golden.npz").write_bytes(npz_bytes(golden))
    with browsing.served(folder) as address, browsing.chromium() as driver:
        driver.get(f"{address}/bench.html?run")
        WebDriverWait(driver, 60).until(lambda d: driver.execute_script("return window.result"))
        assert "WRONG: 40.1 dB" in driver.execute_script("return document.body.innerText")
