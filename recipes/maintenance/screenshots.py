"""Draw the page of recipes/demo.py as Chromium shows it, for recipes/README.md.

    apt-get install chromium && pip install -e ".[demo]" playwright
    python recipes/maintenance/screenshots.py

Starts the page, uploads a photograph to each of its tabs, and writes demo.png and demo_search.png
to `--output`.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from timm_fisher.training.command_line import run

RECIPES = Path(__file__).resolve().parents[1]
COLOURS = 192  # so that a file stays below 200 KB
WAIT = 600_000  # milliseconds at most, for the gallery is read


@dataclass
class Settings:
    """Draw the page of demo.py.

    Args:
        classify: photograph of the first tab.
        search: photograph of the second tab.
        output: folder of the pictures.
        port: a free one of this computer.
    """

    classify: Path = RECIPES.parent / 'hub_cards/example.jpg'
    search: Path = RECIPES / 'photographs/train/metal/metal1.jpg'
    output: Path = RECIPES.parent / '.github/pictures'
    port: int = 7869


def main(settings: Settings) -> None:
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise ValueError('Playwright drives the browser: pip install playwright') from None
    chromium = shutil.which('chromium')
    if chromium is None:
        raise ValueError('There is no Chromium here: apt-get install chromium')
    command = [sys.executable, str(RECIPES / 'demo.py'), f'--port={settings.port}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline() if server.stdout else ''
            if 'Running on' not in line:
                raise ValueError('recipes/demo.py did not start; see its error above.')
            with sync_playwright() as driver:
                browser = driver.chromium.launch(
                    executable_path=chromium,
                    args=['--no-sandbox'],  # which root needs
                )
                draw(browser, settings)
                browser.close()
        finally:
            server.terminate()
            server.wait()


def draw(browser: Any, settings: Settings) -> None:
    page = browser.new_page(viewport={'width': 1280, 'height': 850})
    page.set_default_timeout(WAIT)
    page.goto(f'http://127.0.0.1:{settings.port}')
    inputs = page.locator('input[type=file]')
    inputs.first.set_input_files(settings.classify)
    page.get_by_role('heading', level=2).last.wait_for()
    save(page, settings.output / 'demo.png')
    page.get_by_role('tab', name='Search').click()
    inputs.nth(1).set_input_files(settings.search)
    page.locator('.thumbnail-item').last.wait_for()
    save(page, settings.output / 'demo_search.png')


def save(page: Any, path: Path) -> None:
    """A picture of the page, once its images are there."""
    page.wait_for_load_state('networkidle')
    page.wait_for_timeout(1000)  # until nothing fades
    image = Image.open(io.BytesIO(page.screenshot())).convert('RGB')
    image.quantize(COLOURS).save(path, optimize=True)
    print(f'-> {path}')


if __name__ == '__main__':
    run(main, Settings)
