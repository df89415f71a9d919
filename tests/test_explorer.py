"""The explorer shows what the library computes, one request at a time, to its own page alone."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.browser import chromium, matches, open_page, settled, shown, slide
from helpers.cli import done, refused, sfd
from helpers.random_model import TEXTURE, random_model
from sfd.editing import change_plan, edit, interpolate_plans, keep_plan, paint, sdedit, swap_plans
from sfd.evaluation.report import ReportContent, write_report
from sfd.explorer import Request, Superseded, compute, facts, static_page
from sfd.explorer.compute import OF_TWO
from sfd.explorer.frames import COLUMNS
from sfd.explorer.server import Worker
from sfd.latents import CompositeLatent
from sfd.sampling import initial_noise
from sfd.utils.config import parse
from sfd.utils.errors import SFDError

STEPS = 6


@pytest.fixture(scope="module")
def model():
    return random_model(0)


def sampled(model, label=0, seeds=(0,), **settings):
    return model.sample(label, seeds=list(seeds), output="latent", **{"steps": STEPS} | settings)


def frames(panel, row):
    """A panel's frames, uint8 (F, S, S, 3)."""
    data = base64.b64decode(panel[row].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    side = pixels.shape[1] // COLUMNS
    cells = pixels.reshape(-1, side, COLUMNS, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return cells[: len(panel["u"])]


def last(result):
    return np.stack([frames(panel, "texture")[-1] for panel in result["panels"]])


def test_frames_are_the_states_of_the_trajectory(model):
    guidance = {"texture": 1.5, "semantic": 2.0}
    (panel,) = compute(model, Request(label=2, seed=3, steps=STEPS, guidance=guidance))["panels"]
    states = model.trajectory(2, seeds=3, steps=STEPS, guidance=guidance)
    assert panel["u"] == [round(state.u, 5) for state in states]
    assert np.array_equal(frames(panel, "texture"), model.decode(torch.cat([state.x for state in states])))
    field = model.velocity_field(torch.tensor([2]), model.config(guidance=guidance))
    middle = states[3]
    v = field(middle.x, middle.t)
    clean = middle.x + model.composite.per_entry(1 - middle.t) * v
    assert np.array_equal(frames(panel, "estimate")[3], model.decode(clean)[0])
    norms = [part.square().mean().sqrt().item() for part in model.composite.unpack(v).values()]
    assert panel["velocity"][3] == pytest.approx(norms, abs=1e-3)
    assert np.array_equal(frames(panel, "estimate")[-1], frames(panel, "texture")[-1])


def test_settings_without_a_control_are_kept(model):
    request = Request(label=1, steps=STEPS, guidance={"texture": 5.0, "semantic": 5.0})
    limited = sampled(model, 1, guidance=5.0, interval=(0.3, 0.6))
    assert np.array_equal(last(compute(model, request, interval=(0.3, 0.6))), model.decode(limited))
    assert not np.array_equal(last(compute(model, request)), model.decode(limited))


OTHER, BRUSH, KEPT = {"other_label": 1, "other_seed": 5}, (1, 0, 0, 0), {"texture": 0.4, "semantic": 1.0}
SOURCES = {mode: ([0, 1], [0, 5]) for mode in OF_TWO}  # classes and seeds; the others edit one sample
EDITS = {
    "keep-plan": lambda m, x: keep_plan(m, twice(x), [5, 6], plan_seeds=[0, 0], classes=1, steps=STEPS),
    "change-plan": lambda m, x: change_plan(m, [0, 0], [5, 6], classes=1, steps=STEPS),
    "swap-plans": lambda m, x: swap_plans(m, x, [0, 5], classes=[1, 0], steps=STEPS),
    "interpolate": lambda m, x: interpolate_plans(m, x, 0, count=2, plan_seeds=[0, 5], steps=STEPS),
    "sdedit": lambda m, x: sdedit(m, twice(x[1]), KEPT, [6, 7], plans=twice(x[0]), classes=0, steps=STEPS),
    "paint": lambda m, x: paint(m, twice(x), torch.tensor(BRUSH).view(2, 2), [5, 6], classes=1, steps=STEPS),
}


def twice(x):
    return x.view(1, -1).expand(2, -1)


def edited(model, mode):
    """Images of the sources and of the results."""
    sources = sampled(model, *SOURCES.get(mode, (0, [0])))
    return model.decode(torch.cat([sources, EDITS[mode](model, sources)]))


@pytest.mark.parametrize("mode", EDITS)
def test_edits_are_those_of_the_library(model, mode):
    request = Request(mode=mode, label=0, steps=STEPS, brush=BRUSH, start=KEPT, **OTHER)
    assert np.array_equal(last(compute(model, request)), edited(model, mode))


@pytest.mark.parametrize(("delta", "warned"), [(0.3, False), (0.0, True), (1.0, True)])
def test_another_offset_is_shown_beside_the_own_with_a_warning(model, delta, warned):
    result = compute(model, Request(label=1, steps=STEPS, delta=delta))
    noise = initial_noise([0], model.composite)
    other = edit(model, noise, {}, 1, schedule={"name": "offset", "delta": delta}, steps=STEPS)
    assert np.array_equal(last(result), model.decode(torch.cat([sampled(model, 1), other])))
    assert bool(result["warning"]) == warned
    assert len(result["schedules"]) == 2


def test_a_request_stops_between_steps(model):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(Superseded):
        compute(model, Request(label=0, steps=50), stop)
    assert len(asked) == 3


def test_the_newest_request_wins():
    async def both():
        worker, started = Worker(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def endless(stop):
            loop.call_soon_threadsafe(started.set)
            while not stop():
                pass
            raise Superseded

        first = asyncio.create_task(worker.run(endless))
        await started.wait()
        second = await worker.run(lambda stop: "second")
        worker.close()
        return second, (await asyncio.gather(first, return_exceptions=True))[0]

    second, first = asyncio.run(both())
    assert second == "second" and isinstance(first, Superseded)


OUT_OF_BOUNDS = {
    "steps": {"steps": 101}, "count": {"count": 7}, "seed": {"seed": -1}, "delta": {"delta": 9.0},
    "solver": {"solver": "sde"}, "path": {"path": "/etc"},
    "guidance": {"guidance": {"texture": 99.0}}, "stream": {"guidance": {"sound": 2.0}}, "class": {"label": 3},
    "time": {"mode": "sdedit", "start": {"texture": 1.5}}, "ends": {"mode": "interpolate", "count": 1},
    "brush": {"mode": "paint", "brush": [1]}, "empty": {"mode": "paint", "brush": [0, 0, 0, 0]},
}  # fmt: skip


@pytest.mark.parametrize("values", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_what_is_out_of_bounds_is_refused(model, values):
    with pytest.raises(SFDError):
        compute(model, parse(Request, values, "request"))


def test_a_model_without_classes_can_be_explored():
    model = random_model(1, classes=())
    result = compute(model, Request(mode="keep-plan", steps=STEPS))
    assert np.array_equal(last(result)[0], model.sample(seeds=[0], steps=STEPS, output="array")[0])


def test_a_model_of_one_stream_is_refused():
    model = random_model(1, composite=CompositeLatent(streams=(TEXTURE,)), name="synchronous")
    with pytest.raises(SFDError, match="single stream"):
        facts(model, "one")


def test_no_class_name_ends_the_script():
    model = random_model(1, classes=("</script><b>", "ring", "star"))
    assert static_page(model, [(0, 0)], "names", steps=STEPS).count("</script>") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("explore") / "model"
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """A server as a user starts it; Ctrl-C ends it."""
    for needed in ("starlette", "uvicorn"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (the extra `explore`)")
    command = [sys.executable, "-m", "sfd", "explore", str(folder), "--port", "0", "--steps", str(STEPS)]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()


def ask(address, method="POST", path="/compute", body="{}", **headers):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_server_answers_its_own_page(address, model):
    own = address.rstrip("/")
    status, text = ask(address, body=json.dumps({"label": 1, "steps": STEPS}), Origin=own, Sec_Fetch_Site="same-origin")
    assert status == 200 and np.array_equal(last(json.loads(text)), model.decode(sampled(model, 1)))
    assert ask(address, "GET", "/")[0] == 200


FOREIGN = {
    "host": ({"Host": "example.org"}, 403), "rebound": ({"Host": "example.org:80"}, 403),
    "port": ({"Host": "127.0.0.1:1"}, 403), "null": ({"Origin": "null"}, 403),
    "origin": ({"Origin": "http://example.org"}, 403),
    "site": ({"Sec_Fetch_Site": "cross-site"}, 403), "form": ({"Content_Type": "text/plain"}, 415),
    "path": ({"path": "/../../etc/passwd", "method": "GET"}, 404), "method": ({"method": "GET"}, 405),
    "size": ({"body": " " * 70000}, 413), "json": ({"body": "[" * 60000}, 400), "list": ({"body": "[]"}, 400),
}  # fmt: skip


@pytest.mark.parametrize(("given", "status"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_foreign_or_malformed_is_refused(address, given, status):
    assert ask(address, **given)[0] == status


def test_a_port_that_is_taken_is_named(address, folder):
    port = str(urlsplit(address).port)
    refused(sfd("explore", folder, "--port", port, "--device", "cpu"), port, "--port")


def test_only_own_pages_are_replaced(folder, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("<p>mine</p>")
    refused(sfd("explore", folder, "--static", out, "--device", "cpu"), "page.html")
    assert out.read_text() == "<p>mine</p>"
    refused(sfd("explore", folder, "--static", tmp_path / "page", "--device", "cpu"), ".html")


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, address):
    opened = settled(open_page(browser, address))
    yield opened
    opened.close()


CONTROLS = {
    "class": (lambda p: p.select_option("#label", label="star"), lambda m: sampled(m, 2)),
    "no class": (lambda p: p.select_option("#label", ""), lambda m: change_plan(m, [0], [0], steps=STEPS)),
    "seed": (lambda p: p.fill("#seed", "7"), lambda m: sampled(m, seeds=[7])),
    "steps": (lambda p: p.fill("#steps", "9"), lambda m: sampled(m, steps=9)),
    "solver": (lambda p: p.select_option("#solver", "heun"), lambda m: sampled(m, solver="heun")),
    "texture": (lambda p: p.fill("#guidance-texture", "2"), lambda m: sampled(m, guidance={"texture": 2.0})),
    "semantic": (lambda p: p.fill("#guidance-semantic", "3"), lambda m: sampled(m, guidance={"semantic": 3.0})),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), CONTROLS.values(), ids=CONTROLS)
def test_each_control_draws_what_the_library_samples(page, model, change, expected):
    assert matches(page, model.decode(sampled(model)))
    change(page)
    assert matches(settled(page), model.decode(expected(model)))


def test_the_offset_is_a_slider_with_both_ends(page, model):
    noise = initial_noise([0], model.composite)
    for change, delta in (
        (lambda: slide(page, "delta", 0.6), 0.6),
        (lambda: page.click("text=synchronous"), 0.0),
        (lambda: page.click("text=sequential"), 1.0),
    ):
        change()
        settled(page)
        other = edit(model, noise, {}, 0, schedule={"name": "offset", "delta": delta}, steps=STEPS)
        assert matches(page, model.decode(torch.cat([sampled(model), other])))
        assert "Δ = 0.3" in page.inner_text("#warning")
    page.uncheck("#offset")
    assert len(shown(settled(page))) == 1 and not page.is_visible("#warning")


@pytest.mark.parametrize("mode", EDITS)
def test_each_edit_draws_what_the_library_edits(page, model, mode):
    page.click(f"[data-mode={mode}]")
    page.fill("#other_seed", "5")
    page.select_option("#other_label", "1")
    if mode == "paint":
        settled(page, "error")
        page.locator(".brush button").first.click()
    if mode != "swap-plans":
        page.fill("#count", "2")
    assert matches(settled(page), edited(model, mode))


def test_each_stream_is_kept_until_a_time(page, model):
    page.click("[data-mode=sdedit]")
    slide(page, "start-texture", 0.8)
    slide(page, "start-semantic", 0)
    sources = sampled(model, [0, 0], [0, 1])
    kept = sdedit(model, twice(sources[1]), {"texture": 0.8}, [2, 3], classes=0, steps=STEPS)
    assert matches(settled(page), model.decode(torch.cat([sources, kept])))


def test_the_brush_works_by_keyboard_and_is_cleared(page, model):
    page.click("[data-mode=paint]")
    settled(page, "error")
    page.locator(".brush button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    settled(page)
    page.uncheck("#keep_texture")
    brush, source = torch.tensor([[0, 0], [1, 0]]), sampled(model)
    painted = paint(model, source.expand(2, -1), brush, [1, 2], keep_texture=False, classes=0, steps=STEPS)
    assert matches(settled(page), model.decode(torch.cat([source, painted])))
    page.click("#clear")
    assert len(shown(settled(page, "error"))) == 1


def test_frames_scrub_by_slider_keyboard_and_curves(page, model):
    states = model.trajectory(0, seeds=0, steps=STEPS)
    slide(page, "u", 0)
    assert matches(page, model.decode(states[0].x))
    page.keyboard.press("ArrowRight")
    assert matches(page, model.decode(states[1].x))
    page.keyboard.press("End")
    assert matches(page, model.decode(states[-1].x))
    width = page.locator("#times").bounding_box()["width"]
    page.locator("#times").click(position={"x": width * 28 / 600 + 1, "y": 20})
    assert matches(page, model.decode(states[0].x))
    page.click("#play")
    page.wait_for_selector("#play[aria-label=Play]")
    assert matches(page, model.decode(states[-1].x))
    page.evaluate("begun = performance.now(); for (let i = 0; i < 90; i++) move(i / 90)")
    assert page.evaluate("performance.now() - begun") < 3000  # 30 pictures a second


def test_of_many_changes_the_last_one_is_shown(page, model):
    for seed in range(1, 9):
        page.fill("#seed", str(seed))
    assert matches(settled(page), model.decode(sampled(model, seeds=[8])))


def test_what_is_out_of_bounds_is_said_on_the_page(page, model):
    page.fill("#steps", "1000")
    assert "Steps" in settled(page, "error").inner_text("#status")
    page.fill("#steps", "1")
    assert "steps" in settled(page, "error").inner_text("#status")  # by the server: fewer than intervals
    page.fill("#steps", "9")
    assert matches(settled(page), model.decode(sampled(model, steps=9)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(browser, address, scheme):
    page = settled(open_page(browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128")
    assert light == (scheme == "light")
    page.close()


def test_a_static_page_opens_from_disk(browser, folder, model, tmp_path):
    out = tmp_path / "page.html"
    options = ("--classes", "disk,star", "--seeds", "0,4", "--steps", STEPS, "--device", "cpu")
    done("explore", folder, "--static", out, *options)
    done("explore", folder, "--static", out, *options)  # an earlier page is replaced
    page = settled(open_page(browser, out.as_uri()))
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    assert matches(page, model.decode(sampled(model)))
    page.select_option("#sample", label="star, seed 4")
    assert matches(page, model.decode(sampled(model, 2, [4])))
    page.keyboard.press("Home")
    assert page.is_hidden("#controls") and not [url for url in requests if not url.startswith("data:")]
    page.close()


def test_a_report_contains_the_player_at_its_whole_height(browser, model, tmp_path):
    player = static_page(model, [(0, 0), (2, 4)], "run", side=4, pixels=10_000, steps=STEPS)
    write_report(tmp_path / "report.html", ReportContent("T", "", {}, "", player=player))
    page = open_page(browser, (tmp_path / "report.html").as_uri())
    frame = page.frame_locator("iframe").locator("body")
    frame.locator("#panels canvas").first.wait_for()
    assert frame.evaluate("body => innerHeight >= body.scrollHeight") and frame.locator("header").is_hidden()
    assert frame.locator("canvas[data-row=texture]").evaluate("canvas => canvas.width") == 4
    page.close()
