import re

import numpy as np
import pytest
from PIL import Image

from helpers.browser import chromium
from sfd.data.grid import image_grid
from sfd.evaluation import figures
from sfd.evaluation.evaluate import Metrics, Protocol
from sfd.evaluation.report import Gallery, ReportContent, write_report
from sfd.generation.curves import ScheduleCurves

RNG = np.random.default_rng(0)
CLASSES = ("disk", "ring")
PROTOCOL = Protocol(
    reference="held-out real images",
    reference_identity="abc",
    reference_count=100,
    extractor="classifier",
    extractor_identity="classifier-def",
    extractor_task="2 classes",
    extractor_accuracy=0.98,
)


def images(count, size=16):
    return RNG.integers(256, size=(count, size, size, 3), dtype=np.uint8)


def row(name="guided", **changes):
    fields = {
        "name": name,
        "real": False,
        "n_samples": 100,
        "balanced": True,
        "frechet_distance": 12.345,
        "precision": 0.8,
        "recall": 0.7,
        "inception_score": 1.9,
        "class_accuracy": 0.71,
        "sfid": None,
        "protocol": PROTOCOL,
        "sampling": {"solver": "heun", "interval": None, "guidance_from": "null_class"},
    }
    fields |= changes
    shown = [name for name in ("frechet_distance", "precision", "recall", "class_accuracy") if fields[name] is not None]
    return Metrics(**{"intervals": dict.fromkeys(shown, (0.5, 0.6)), "caveats": {}, **fields})


def schedule():
    base = np.linspace(0, 1, 101)
    times = np.stack([np.clip(1.3 * base - 0.3, 0, 1), np.clip(1.3 * base, 0, 1)], axis=1)
    rates = np.stack([np.where(base >= 3 / 13, 1.3, 0), np.where(base < 10 / 13, 1.3, 0)], axis=1)
    return ScheduleCurves(("texture", "semantic"), base, times, rates, (3 / 13, 10 / 13))


def cost(stage, seconds, memory, device_memory=0):
    sizes = {"peak_memory_bytes": memory, "peak_device_memory_bytes": device_memory}
    return {"stage": stage, "seconds": seconds, **sizes}


def full_content():
    log = [{"step": 20 * i, "loss": 1 / i, "images_per_second": 100.0, "skipped": 0} for i in range(1, 30)]
    return ReportContent(
        title="A <run>",
        summary="What was run.",
        facts={"Data": "two shapes"},
        recipe="name: demo\n",
        galleries=[Gallery("Guided", "with care", [(name, images(4)) for name in CLASSES])],
        schedule=schedule(),
        player="<script>alert('own page')</script>",
        logs={"transformer": log},
        previews=[("step 500", Image.fromarray(images(1, 64)[0]))],
        metrics=[row(), row("real training images", real=True, class_accuracy=0.98)],
        stages=[cost("transformer", 200, 1_200_000_000)],
        skipped=[("cat/<a>.png", "the file is empty")],
        next_steps=[("Sample", "sfd sample runs/a")],
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, full_content())
    return path.read_text(encoding="utf-8")


def test_a_report_is_self_contained_and_escaped(page):
    assert "A &lt;run&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:image/|#)""", page)
    assert "url(http" not in page and "@import" not in page


def test_device_memory_is_shown_if_a_device_was_used(page, tmp_path):
    assert "device memory" not in page and ">1.2 GB<" in page
    costs = [cost("latents", 20, 1_200_000_000), cost("transformer", 200, 1_300_000_000, 7_700_000_000)]
    write_report(tmp_path / "report.html", ReportContent("T", "", {}, "", stages=costs))
    shown = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Peak device memory" in shown and shown.count(">7.7 GB<") == 2 and shown.count(">0 MB<") == 1


def test_a_report_shows_metrics_with_their_protocol(page):
    assert "12.35" in page and "71.0 %" in page
    assert "100 held-out real images" in page and "98.0 % right on images it never saw" in page
    assert "solver heun" in page and "null_class" not in page


def test_a_report_of_stored_moments_has_no_precision(tmp_path):
    protocol = PROTOCOL.model_copy(update={"extractor": "inception", "stored_moments": True, "reference_count": 0})
    changes = {"sfid": 6.14, "precision": None, "recall": None, "class_accuracy": None}
    metrics = [row(**changes, protocol=protocol, not_comparable=("few samples",))]
    write_report(tmp_path / "report.html", ReportContent("T", "", {}, "", metrics=metrics))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<th>sFID</th>" in page and "<td>6.14</td>" in page and ">Precision" not in page
    assert "Not comparable with published numbers: few samples" in page and "not those of Inception" not in page


def test_an_unreliable_metric_is_marked(tmp_path):
    doubts = {"precision": ("48 samples, fewer than 1,000",)}
    rows = [row(caveats=doubts), row("real training images", real=True, precision=0.7)]
    write_report(tmp_path / "report.html", ReportContent("T", "", {}, "", metrics=rows))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cards = page.split('<div class="card tile')[1:5]
    assert [card.startswith(" doubtful") for card in cards] == [False, False, True, False]
    assert page.count("48 samples, fewer than 1,000") == page.count('<td class="doubtful">') == 1


def test_a_report_of_an_unconditional_run_without_training(tmp_path):
    metrics = [row(class_accuracy=None, inception_score=None, balanced=False)]
    gallery = Gallery("Samples", "", [("", images(10)), ("", images(10)), ("", images(3))])
    write_report(tmp_path / "report.html", ReportContent("Title", "", {}, "", [gallery], metrics=metrics))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('class="zoom"') == 23
    assert "Training</h2>" not in page and "Class accuracy" not in page


def test_a_report_of_large_images_stays_small(tmp_path):
    smooth = np.linspace(0, 255, 512 * 512 * 3).reshape(1, 512, 512, 3).astype(np.uint8).repeat(10, axis=0)
    rows = [(str(label), smooth) for label in range(20)]
    content = ReportContent("T", "", {}, "", [Gallery("G", "", rows)])
    write_report(tmp_path / "report.html", content)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page) < 5e6 and 40 <= page.count('class="zoom"') < 200


def test_images_can_be_enlarged_one_by_one(page):
    assert page.count('class="zoom"') == 2 * 4 + 1
    assert all(f'alt="Guided: ring, {number}"' in page for number in (1, 2, 3, 4)) and "<dialog>" in page


def test_a_click_enlarges_and_arrow_keys_go_on(tmp_path):
    write_report(tmp_path / "report.html", full_content())
    with chromium() as browser:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto((tmp_path / "report.html").as_uri())
        page.locator(".zoom").nth(1).click()
        large, caption = page.locator("dialog img"), page.locator("dialog p")
        assert large.bounding_box()["height"] > 400 and caption.inner_text() == "Guided: disk, 2"
        page.keyboard.press("ArrowRight")
        assert caption.inner_text() == "Guided: disk, 3"
        assert large.get_attribute("src") == page.locator(".zoom img").nth(2).get_attribute("src")
        page.keyboard.press("Escape")
        assert not large.is_visible() and not errors


def test_a_report_names_what_was_left_out_and_what_can_be_done(page):
    assert "1 file could not be used" in page and "cat/&lt;a&gt;.png" in page and "the file is empty" in page
    assert "<pre>sfd sample runs/a</pre>" in page


def test_a_grid_shows_every_image_in_its_place():
    shown = images(5, 4)
    grid = np.asarray(image_grid(shown, columns=3, scale=2))
    assert grid.shape == (18, 28, 4)
    np.testing.assert_array_equal(grid[10:18:2, 10:18:2, :3], shown[4])
    assert not grid[10:, 20:, 3].any()


def test_rows_of_a_grid_have_labels_of_bounded_width():
    shown = images(3, 32)
    bare = np.asarray(image_grid(shown, columns=2, places=[0, 2, 3]))
    labelled = np.asarray(image_grid(shown, columns=2, places=[0, 2, 3], labels=["disk", "a long name of a class" * 9]))
    margin = labelled.shape[1] - bare.shape[1]
    np.testing.assert_array_equal(labelled[:, margin:], bare)
    assert 96 < margin < 230 and not bare[:96, 100:, 3].any()
    assert labelled[:96, :margin, 3].any() and labelled[100:, :margin, 3].any()


def test_equal_latents_have_equal_colours():
    latents = RNG.normal(size=(3, 6, 4, 4))
    latents[2] = latents[0]
    colours = figures.semantic_colours(latents)
    assert colours.shape == (3, 4, 4, 3) and colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[0], colours[2])
    assert len(np.unique(colours[0].reshape(-1, 3), axis=0)) > 8
    for few in (latents[:, :1], latents[:, :2], np.ones((2, 4, 3, 3))):  # too few channels, or no variance
        assert figures.semantic_colours(few).shape == (len(few), *few.shape[2:], 3)
