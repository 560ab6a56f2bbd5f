"""The demo page, drawn on with a real pointer in a real Chromium."""

from __future__ import annotations

import math
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import browsing
import pytest
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from edgepipe import demo
from edgepipe.cli import main
from edgepipe.errors import UserError

STROKES = {
    0: [(128 + 60 * math.sin(t / 3), 128 - 95 * math.cos(t / 3)) for t in range(20)],
    1: [(100, 75), (140, 30), (140, 220)],
    7: [(70, 40), (190, 40), (120, 220)],
}


def draw(driver: Any, points: list[tuple[float, float]]) -> None:
    pad = driver.find_element(By.ID, "pad").rect
    actions = ActionBuilder(driver, duration=20)
    for i, (x, y) in enumerate(points):
        actions.pointer_action.move_to_location(int(pad["x"] + x), int(pad["y"] + y))
        if i == 0:
            actions.pointer_action.pointer_down()
    actions.pointer_action.pointer_up()
    actions.perform()


@pytest.mark.slow
@pytest.mark.needs_browser
@pytest.mark.needs_node
def test_drawn_digits_are_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    demo.build(folder)
    with demo.server(folder, 0) as server, browsing.chromium() as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        driver.get(f"http://127.0.0.1:{server.server_port}/")
        wait = WebDriverWait(driver, 60)
        wait.until(lambda d: d.execute_script("return document.body.dataset.state") == "ready")
        for digit, points in STROKES.items():
            driver.find_element(By.ID, "clear").click()
            draw(driver, points)
            wait.until(lambda d: len(d.execute_script("return window.answers ?? []")) == 3)
            answers = driver.execute_script("return window.answers")
            assert [a["digit"] for a in answers] == [digit] * 3
            assert [a["recipe"] for a in answers] == ["fp32", "w8a8", "fp32+60%"]
            assert all(a["p50_ms"] > 0 for a in answers)
        text = driver.execute_script("return document.body.innerText")
        assert "99.33 % right" in text and "per inference" in text
        assert "60 % of its weights zero" in text and len(set(re.findall(r"[\d.]+ KB", text))) == 3
        assert not browsing.overlaps(driver, "h1, h2, canvas, button, .answer, .facts, .latency")
        wide = "return document.documentElement.scrollWidth - window.innerWidth"
        assert driver.execute_script(wide) <= 0
        assert not [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
        server.shutdown()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"mine\.txt"):
        demo.build(folder)
    shutil.rmtree(folder)


def test_folders_and_ports_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(UserError, match="not replaced"):
        demo.build(tmp_path)
    with demo.server(tmp_path, 0) as server, pytest.raises(UserError, match="cannot be served"):
        demo.server(tmp_path, server.server_port)


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(demo, "build", lambda folder, progress: built.append(folder))
    assert main(["demo", "-o", str(tmp_path / "site"), "--quiet"]) == 0
    assert built == [tmp_path / "site"]
