"""The applications in `examples/` run, the page in a real browser too."""

import contextlib
import csv
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_backend
ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_folder_is_summarized(tmp_path, capsys):
    import summarize_folder

    texts = shutil.copytree(EXAMPLES / "data" / "texts", tmp_path / "texts")
    (texts / "deeper").mkdir()
    (texts / "deeper" / "links.md").write_text(
        "# Title\n\nThis [library](https://example.org) reads and `writes` files.\n"
    )
    (texts / "empty.txt").write_text("")
    (texts / "data.bin").write_bytes(b"\x00")
    read = summarize_folder.read_text(texts / "deeper" / "links.md")
    assert read == "This library reads and writes files."
    output = tmp_path / "summaries.tsv"
    summarize_folder.main([str(texts), "--beams", "1", "--output", str(output)])
    with open(output, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, dialect="excel-tab")
    assert header == ["file", "summary"]
    names = [name for name, _ in rows]
    assert names == sorted(names) and len(names) == 6 and "deeper/links.md" in names
    by_name = dict(rows)
    assert "JSON" in by_name["json-library.txt"]
    assert all(0 < len(summary) < 100 for summary in by_name.values())
    summarize_folder.main([str(texts / "deeper"), "--beams", "1"])
    assert capsys.readouterr().out.startswith("links.md  ")
    with pytest.raises(SystemExit, match="has no texts"):
        summarize_folder.main([str(tmp_path / "nothing")])


def test_classifier_is_trained_saved_and_used(tmp_path, capsys):
    import train_classifier

    file, folder = EXAMPLES / "data" / "packages.csv", tmp_path / "classifier"
    rows = train_classifier.read_rows(file, "description", "section")
    seen, unseen = train_classifier.split(rows, share=0.2)
    assert len(rows) == len(set(seen) | set(unseen)) == 60
    assert [sum(label == "games" for _, label in part) for part in (seen, unseen)] == [
        12,
        3,
    ]
    columns = ["--text", "description", "--label", "section"]
    train_classifier.main([str(file), *columns, "--epochs=5", f"--output={folder}"])
    output = capsys.readouterr().out
    accuracy = re.search(r"accuracy on 12 rows .*: (\d+)%", output)
    assert int(accuracy[1]) > 35  # Guessing gives 25.
    text = seen[0][0]
    train_classifier.main(["--classify", text, "--output", str(folder)])
    assert capsys.readouterr().out.strip() == seen[0][1]
    with pytest.raises(SystemExit, match="no column 'body'"):
        train_classifier.read_rows(file, "body", "section")


@pytest.fixture(scope="module")
def functions():
    sys.path.insert(0, str(EXAMPLES))
    import search_page

    sys.path.remove(str(EXAMPLES))
    return search_page, search_page.Summarizer(), search_page.Search()


def test_search_and_summaries(functions):
    _, summarize, search = functions
    found = search("software to tune a guitar with the microphone", 3)
    assert [row[1] for row in found].count("tunetap") == 1
    similarities = [row[0] for row in found]
    assert similarities == sorted(similarities, reverse=True) and len(found) == 3
    assert search("  ") == [] and summarize(" ") == ""
    answers = summarize("This library reads and writes JSON files.", 2).splitlines()
    assert len(answers) == 2 and any("JSON" in answer for answer in answers)


def find_browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def address():
    """The page, served by a process as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "search_page.py"), "--port", str(port)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(command, env=environment) as server:
        try:
            for _ in range(600):
                assert server.poll() is None
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def test_page_in_a_browser(request, tmp_path):
    """Both tabs by mouse and keyboard, at the widths of a desk and of a phone."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if find_browser() is None:
        pytest.skip("No chromium or chrome on the PATH.")
    address = request.getfixturevalue("address")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox"]
        )
        for width, height in ((1000, 640), (390, 840)):
            drive(browser, address, width, height, tmp_path, playwright.expect)
        browser.close()


def drive(browser, address, width, height, folder, expect):
    """Summarize and search on the page; screenshots go into a folder."""
    view = browser.new_page(viewport={"width": width, "height": height})
    problems = []
    view.on("pageerror", lambda error: problems.append(str(error)))
    view.goto(address)
    view.get_by_role("button", name="Summarize", exact=True).click()
    answer = view.get_by_label("Summaries, the best first")
    expect(answer).to_have_value(re.compile("JSON"), timeout=60_000)
    view.screenshot(path=folder / f"summarize_{width}.png")
    view.get_by_role("tab", name="Search").click()
    query = view.get_by_label("Query")
    query.fill("tune a guitar with the microphone")
    query.press("Enter")
    expect(view.get_by_text("tunetap").first).to_be_visible(timeout=60_000)
    view.screenshot(path=folder / f"search_{width}.png")
    # Nothing is wider than the screen.
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    view.close()
