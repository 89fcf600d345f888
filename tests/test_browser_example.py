"""The page of examples/browser in a real browser: its names are the model's. Needs `npm install` in that folder."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.loading import load_model
from tests.helpers.command_line import ok

pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install -e '.[onnx]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

PAGE = Path(__file__).parent.parent / "examples/browser"
CHROMIUM = shutil.which("chromium")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking".split()
PROMPT = "legendary creature goblin, red, 3:"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
    pytest.mark.skipif(not (PAGE / "node_modules").is_dir(), reason="npm install --prefix examples/browser"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(workplace: Path, tmp_path: Path) -> Iterator[str]:
    for name in ("index.html", "names.js"):
        shutil.copy(PAGE / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(PAGE / "node_modules")
    ok("export", "onnx", workplace / "models/moe", "--out", "model", cwd=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def greedy_name(folder: Path) -> str:
    """The likeliest token, one after another, by transformers."""
    model = load_model(folder, "cpu")
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(PROMPT, add_special_tokens=False)]])
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_its_names_are_those_of_the_model(address: str, workplace: Path) -> None:
    asked: list[str] = []
    errors: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        status = page.get_by_role("status")
        status.get_by_text("Ready").wait_for(timeout=60_000)
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("Names").fill("3")
        for temperature in ("0", "1"):
            page.get_by_label("Temperature").fill(temperature)
            page.get_by_role("button").click()
            page.wait_for_function("() => !document.querySelector('button').disabled", timeout=60_000)
            assert status.inner_text() == "3 names"
            names = page.get_by_role("listitem").all_inner_texts()
            assert len(names) == 3
            if temperature == "0":
                assert names == [" ".join(greedy_name(workplace / "models/moe").split())] * 3
        browser.close()
    assert not errors and all(url.startswith(address) for url in asked), "nothing comes from elsewhere"
