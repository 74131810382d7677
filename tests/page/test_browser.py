"""The page in a real browser: no error, no request, hostile texts shown as texts, keys, widths, --watch."""

import json
import threading
from collections import Counter

import pytest
from page.browser import Browser, find_chromium
from page.made_runs import make_run, sample_record
from page.test_document import HOSTILE

from minidpost.page.document import read_runs, write_page
from minidpost.page.runs import Files, find_runs
from minidpost.page.watch import Watched, new_server
from minidpost.storage import read_jsonl, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, of which the first holds hostile samples."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [make_run(folder / "dpo", n_questions=130), make_run(folder / "st", method="st")]
    file = paths[0] / "iteration-2" / "samples-sft.jsonl"
    hostile = [
        sample_record(1000 + index, 0, "none", question=f"hostile {text}", completion=text, answer=text)
        for index, text in enumerate(HOSTILE)
    ]
    write_jsonl(file, [*(record for _, record in read_jsonl(file)), *hostile])
    return paths


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory):
    """The page of both runs, as a file."""
    page = tmp_path_factory.mktemp("page") / "report.html"
    files = Files()
    write_page(page, read_runs(runs, files), benchmark=None, data_dir=page.parent, has_samples=True, files=files)
    return page.as_uri()


@pytest.fixture(scope="module")
def browser():
    if find_chromium() is None:
        pytest.fail("no Chromium is installed (Debian: apt-get install chromium), so that the page cannot be tried")
    with Browser() as started:
        yield started


def open_reading(browser, address):
    """Open a page and go to its questions."""
    browser.events.clear()
    browser.open(address)
    browser.js("document.getElementById('reading').scrollIntoView()")
    browser.wait("document.querySelectorAll('.detail h3').length > 0")


def set_value(browser, element_id, value, event="change"):
    """Do what a user's choice does."""
    browser.js(
        f"(() => {{ const e = document.getElementById({json.dumps(element_id)}); e.value = {json.dumps(value)}; "
        f"e.dispatchEvent(new Event('{event}')); }})()"
    )


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("is_dark", [False, True])
def test_every_section_is_drawn_without_error_or_request(browser, address, width, is_dark):
    browser.size(width)
    browser.dark(is_dark)
    open_reading(browser, address)
    browser.wait("[...document.querySelectorAll('figure .plot')].every((plot) => plot.querySelector('svg'))")
    assert browser.js("document.documentElement.dataset.theme") == ("dark" if is_dark else "light")
    assert browser.js("document.querySelectorAll('#runs table').length") == 3
    assert browser.js("document.querySelectorAll('#exhibits .panel').length") == 8
    assert browser.js("document.querySelectorAll('#training svg[role=img]').length") >= 8
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("[...document.querySelectorAll('svg[role=img]')].every((e) => e.getAttribute('aria-label'))")
    assert browser.problems() == []
    assert set(browser.requests()) == {address}


def test_hostile_texts_are_shown_as_texts(browser, address):
    browser.size(1280)
    open_reading(browser, address)
    set_value(browser, "search", "hostile", "input")
    assert browser.js("document.getElementById('count').textContent") == f"{len(HOSTILE)} of 138 questions"
    for place, text in enumerate(HOSTILE):
        browser.js(f"pick({place})")
        named = json.dumps(browser.js(f"visible({json.dumps(text)})"))
        browser.wait(f"[...document.querySelectorAll('.sample .text')].some((e) => e.textContent === {named})")
    assert browser.js("document.querySelectorAll('main script, main img, main iframe, main a').length") == 0
    assert browser.problems() == []


def test_filters_and_search_count_what_the_files_hold(browser, address, runs):
    open_reading(browser, address)
    correct: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for file in sorted(runs[0].glob("*/samples-*.jsonl")):
        for _, record in read_jsonl(file):
            correct[record["example_index"]] += record["is_correct"]
            total[record["example_index"]] += 1
    for name, rule in {
        "wrong": lambda question: correct[question] == 0,
        "mixed": lambda question: 0 < correct[question] < total[question],
        "right": lambda question: correct[question] == total[question],
    }.items():
        set_value(browser, "choose-show", name)
        n = sum(map(rule, total))
        assert browser.js("document.getElementById('count').textContent") == f"{n} of {len(total)} questions"
    set_value(browser, "choose-show", "all")
    set_value(browser, "search", "Mia has 12 ", "input")
    assert browser.js("document.getElementById('count').textContent").startswith("1 of ")


def test_keys_move_through_the_list_and_the_charts(browser, address):
    open_reading(browser, address)
    browser.js("document.getElementById('list').focus()")
    for key in ("ArrowDown", "ArrowDown", "End"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    assert browser.js("document.querySelector('.row.chosen').getAttribute('aria-posinset')") == "138"
    assert browser.js("document.querySelectorAll('.row').length") < 30  # of 138
    browser.js("document.querySelector('#figure-5 svg[role=img]').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="End")
    assert "iteration 2" in browser.js("document.getElementById('tip').textContent")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert browser.js("document.getElementById('tip').hidden")


def test_a_pair_is_shown_with_its_differences(browser, address):
    open_reading(browser, address)
    set_value(browser, "choose-show", "pairs")
    browser.wait("document.querySelectorAll('.pair').length > 0")
    assert browser.js("document.querySelector('.pair ins').textContent")
    assert browser.js("document.querySelector('.pair del').textContent")
    assert browser.js("document.querySelectorAll('.detail .forced').length") > 0


def test_a_page_of_seven_thousand_questions_keeps_few_rows(browser, tmp_path):
    files = Files()
    path = make_run(tmp_path / "large", n_questions=7000, n_dpo=10, n_sft=5)  # 30 samples a question
    page = tmp_path / "large.html"
    write_page(page, read_runs([path], files), benchmark=None, data_dir=tmp_path, has_samples=True, files=files)
    open_reading(browser, page.as_uri())
    assert browser.js("document.getElementById('count').textContent") == "7,000 of 7,000 questions"
    browser.js("document.getElementById('list').scrollTop = 54 * 6500")
    browser.wait("document.querySelector('.row:nth-child(5)').dataset.place > 6480")
    assert browser.js("document.querySelectorAll('.row').length") < 40
    browser.js("pick(6999)")
    browser.wait("document.querySelector('.detail h3').textContent === 'Question 7000'")
    assert browser.problems() == []
    times = browser.js(
        "['mixed', 'changed', 'all'].map((name) => { const start = performance.now(); choose({ filter: name }); "
        "return performance.now() - start; })"
    )
    paint = browser.js("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"first paint {paint:.0f} ms, filters {', '.join(f'{time:.0f}' for time in times)} ms")  # shown with -s


def test_watch_shows_a_run_as_it_grows(browser, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    watched = Watched(
        lambda: [path for path in find_runs([folder]) if path != folder], benchmark=None, data_dir=tmp_path
    )
    with new_server(watched, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        browser.events.clear()
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        assert "No run here yet" in browser.js("document.getElementById('runs').textContent")
        path = make_run(folder / "growing", n_iterations=1)
        browser.wait("document.querySelectorAll('#runs .panel').length === 1")
        browser.js("document.getElementById('reading').scrollIntoView()")
        browser.wait("document.querySelectorAll('.detail h3').length > 0")
        chunk = path / "iteration-2" / "samples-dpo.jsonl.progress" / "a-000000.jsonl"
        write_jsonl(chunk, [sample_record(0, 0, "right")])
        browser.wait("document.getElementById('choose-over').textContent.includes('being sampled')")
        # A run that begins meanwhile, and stands before it, does not take its place.
        make_run(folder / "another", method="st", n_questions=3, n_iterations=1)
        browser.wait("document.getElementById('choose-run').textContent === 'anothergrowing'")
        browser.wait("document.getElementById('count').textContent === '12 of 12 questions'")
        assert browser.js("document.getElementById('choose-run').selectedOptions[0].textContent") == "growing"
        browser.js("document.getElementById('choose-run').value = 0")
        browser.js("document.getElementById('choose-run').dispatchEvent(new Event('change'))")
        browser.wait("document.getElementById('count').textContent === '3 of 3 questions'")
        assert browser.problems() == []
        server.shutdown()
        thread.join()
