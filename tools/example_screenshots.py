"""Take the screenshots of `examples/` again: the real commands, the real page.

    pip install -e ".[examples]" && python tools/example_screenshots.py

Needs chromium or chrome.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "examples" / "screenshots"
COMMANDS = {
    "summarize_folder": ["examples/data/texts"],
    "train_classifier": ["examples/data/packages.csv", "--text", "description"]
    + ["--label", "section"],
}
SEARCH = "make music from patterns of notes"


def run(name, arguments, folder):
    """The lines that a person sees: prompt and output."""
    end = ["--output", str(Path(folder) / "out")] if name == "train_classifier" else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments, *end],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [x for x in result.stdout.splitlines() if not x.startswith(("Epoch", "6/"))]
    lines = [x.replace(str(folder), "") for x in lines if "saved in" not in x]
    return [f"$ python examples/{name}.py {' '.join(arguments)}", *lines]


def draw(browser, lines, path, title):
    """A picture of a terminal with these lines."""
    width = max(map(len, lines)) + 2
    console = Console(record=True, width=width, file=open(os.devnull, "w"))
    for line in lines:
        console.print(line, markup=False, highlight=False, no_wrap=True)
    view = browser.new_page(viewport={"width": min(1100, 9 * width), "height": 700})
    view.set_content(console.export_svg(title=title))
    view.locator("svg").first.screenshot(path=path)
    view.close()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def take_page(browser, address):
    view = browser.new_page(viewport={"width": 1000, "height": 640})
    view.goto(address)
    view.get_by_role("button", name="Summarize", exact=True).click()
    answer = view.get_by_label("Summaries, the best first")
    while not answer.input_value():
        time.sleep(0.2)
    view.screenshot(path=SHOTS / "page_summarize.png")
    view.get_by_role("tab", name="Search").click()
    view.get_by_label("Query").fill(SEARCH)
    view.get_by_label("Query").press("Enter")
    view.get_by_text("sound").first.wait_for()
    view.screenshot(path=SHOTS / "page_search.png")


def main():
    SHOTS.mkdir(exist_ok=True)
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser_path = next(filter(None, map(shutil.which, names)))
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, arguments in COMMANDS.items():
            lines = run(name, arguments, folder)
            draw(browser, lines, SHOTS / f"{name}.png", name)
        command = [sys.executable, "examples/search_page.py", "--port", str(port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=ROOT, env=environment) as server:
            try:
                while True:
                    try:
                        socket.create_connection(("127.0.0.1", port), 1).close()
                        break
                    except OSError:
                        time.sleep(0.3)
                take_page(browser, f"http://127.0.0.1:{port}")
            finally:
                server.terminate()
    for path in sorted(SHOTS.glob("*.png")):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
