"""The page's files, words, gate, visitors and command, without the page itself."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from serve_stand_in import counting, last
from typer.testing import CliRunner

from latentdem.cli import app
from latentdem.io import InputError
from latentdem.serve import html
from latentdem.serve.files import Store, check_picture, open_picture
from latentdem.serve.gate import HEADERS, LARGEST_MESSAGE, Gate, is_local
from latentdem.serve.jobs import Limits, Snapshot
from latentdem.serve.server import listen


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "root", minutes=60)
    made.root.mkdir()
    yield made
    made.close()


# Files --------------------------------------------------------------------------------------


def test_pictures_are_refused_in_one_line(tmp_path, photo):
    assert check_picture(photo, Limits()) == (40, 48)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(InputError, match=r"^text.png: not a picture; choose a PNG, .* PPM file$"):
        check_picture(text, Limits())
    postscript = tmp_path / "drawing.png"  # by content, not by name
    postscript.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(InputError, match="not a picture"):
        check_picture(postscript, Limits())
    with pytest.raises(InputError, match=r"40 x 48 = 0.0 megapixels, more than the 0.001"):
        check_picture(photo, Limits(megapixels=0.001))
    with pytest.raises(InputError, match=r"MB, more than the 0.001 MB"):
        check_picture(photo, Limits(megabytes=0.001))
    with pytest.raises(InputError, match="no longer there"):
        check_picture(tmp_path / "gone.png", Limits())
    with pytest.raises(InputError) as refused:
        check_picture(text, Limits())
    assert str(tmp_path) not in str(refused.value)
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:-400])
    with pytest.raises(InputError, match=r"cut.png: damaged or truncated"):
        open_picture(cut, Limits())


@pytest.mark.parametrize("side", [12_000, 20_000])  # Pillow warns of the first, refuses the second
def test_decompression_bombs(tmp_path, side):
    bomb = tmp_path / "bomb.pgm"
    bomb.write_bytes(b"P5 %d %d 255\n" % (side, side))
    with pytest.raises(InputError, match="megapixels"):
        check_picture(bomb, Limits(megapixels=24))


def test_only_files_within_the_folder_are_held(store, photo):
    inside = store.borrow(photo)
    assert store.holds(inside) and inside.name == "photo.png"
    link = inside.with_name("link.png")
    link.symlink_to(photo)
    for path in (photo, link, store.root, inside.parent, store.root / "nothing", "", "a\0b",
                 f"{inside.parent}/../../../photo.png", "/etc/passwd", "x" * 9000):  # fmt: skip
        assert not store.holds(path), path
    assert store.new_folder() != store.new_folder()


def test_old_files_are_pruned(store, photo):
    old, new = store.borrow(photo), store.borrow(photo)
    os.utime(old, (time.time() - 7200,) * 2)
    assert store.prune() == 1
    assert new.exists() and not old.exists()
    assert store.prune(now=time.time() + 7200) == 1
    store.prune(now=time.time() + 7200)
    assert list(store.root.iterdir()) == []


def test_pruning_happens_by_itself(tmp_path, photo):
    store = Store(tmp_path / "root", minutes=0.002)
    try:
        file = store.borrow(photo)
        for _ in range(200):
            if not file.exists():
                break
            time.sleep(0.02)
        assert not file.exists()
    finally:
        store.close()


# Words --------------------------------------------------------------------------------------


def test_names_of_files_are_escaped():
    assert "<script" not in html.facts([("<script>alert(1)</script>", "x")], ["<b>"])
    assert "<img" not in html.note("<img src=x onerror=alert(1)>", "error")
    assert "<i>" not in html.progress("<i>", 1, None, "").replace("<i></i>", "")


def test_pace():
    pace = html.Pace()
    assert pace.left(5) == ""
    pace.add(0.1, 30.0)
    assert pace.left(35) == ""  # what was before the first report tells nothing
    pace.add(0.2, 40.0)
    assert pace.left(40) == "about 1:20 left"
    assert pace.left(50) == "about 1:10 left"
    assert pace.left(500) == "about 0:00 left"


def test_lines():
    assert "one request before" in html.waiting(Snapshot("waiting", ahead=1))
    assert "3 requests before" in html.waiting(Snapshot("waiting", ahead=3))
    assert 'role="alert"' in html.ending(Snapshot("failed", message="why"), 1)
    assert "width:50%" in html.progress("x", 61, 0.5, "soon")
    assert "1:01 so far, soon" in html.progress("x", 61, 0.5, "soon")


# Gate ---------------------------------------------------------------------------------------


def ask(gate, path, method="GET", body=b"", **headers):
    """Status, headers, and the body that the application behind the gate saw (None: none did)."""
    sent = []
    named = {"host": "127.0.0.1:7860"} | headers
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in named.items()],
    }
    messages = [
        {"type": "http.request", "body": body[k : k + 65536], "more_body": k + 65536 < len(body)}
        for k in range(0, max(1, len(body)), 65536)
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), gate.app.seen


class Behind:
    seen = None

    async def __call__(self, scope, receive, send):
        self.seen = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def gate(store):
    return Gate(Behind(), store, local=True)


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/theme.css", "/assets/index-1.js", "/static/js/x.js", "/gradio_api/upload",
     "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/heartbeat/ab12"],
)  # fmt: skip
def test_the_page_passes(gate, path):
    status, headers, _ = ask(gate, path)
    assert status == 200
    assert headers[b"content-security-policy"] == HEADERS["content-security-policy"].encode()


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/proxy=http://example.com", "/gradio_api/vibe-edit", "/monitoring", "/docs",
     "/gradio_api/file/etc/passwd", "/gradio_api/run/predict", "/gradio_api/deep_link",
     "/gradio_api/call/x", "/gradio_api/stream/a/b/1/playlist.m3u8", "/gradio_api/runs", "/login",
     "/gradio_api/openapi.json", "/gradio_api/mcp/", "/gradio_api/heartbeat/a/../../monitoring"],
)  # fmt: skip
def test_other_routes_do_not_exist(gate, path):
    assert ask(gate, path)[::2] == (404, None)


def test_files_of_others_are_refused(gate, store, photo):
    inside = store.borrow(photo)
    assert ask(gate, f"/gradio_api/file={inside}")[0] == 200
    gate.app.seen = None
    for path in (photo, "/etc/passwd", f"{inside}/../../../../photo.png", "http://example.com/a",
                 "file:///etc/passwd", "", "a\nb"):  # fmt: skip
        assert ask(gate, f"/gradio_api/file={path}")[::2] == (403, None), path


def test_other_names_and_sites_are_refused(gate, store):
    assert ask(gate, "/", host="evil.example:7860")[0] == 403
    for host in ("localhost:7860", "[::1]:7860", "127.0.0.1"):
        assert ask(gate, "/", host=host)[0] == 200
    open_to_all = Gate(Behind(), store, local=False)
    assert ask(open_to_all, "/", host="studio.lan:7860")[0] == 200
    assert ask(open_to_all, "/", origin="http://evil.example")[0] == 403
    assert ask(open_to_all, "/", origin="null")[0] == 403
    assert ask(gate, "/", origin="http://127.0.0.1:7860")[0] == 200
    assert ask(gate, "/", host="[::1")[0] == ask(gate, "/", origin="http://[")[0] == 400


def test_messages_may_name_uploaded_files_only(gate, store, photo):
    join = "/gradio_api/queue/join"

    def message(path):
        return json.dumps({"data": [[{"image": {"path": path, "url": "x"}}]]}).encode()

    good = message(str(store.borrow(photo)))
    assert ask(gate, join, "POST", good)[::2] == (200, good)
    gate.app.seen = None
    for path in ("http://example.com/x.png", " HTTPS://e.org", str(photo), "/etc/passwd", "", 7,
                 ["/etc/passwd"]):  # fmt: skip
        assert ask(gate, join, "POST", message(path))[::2] == (403, None), path
    assert ask(gate, join, "POST", b" " * (LARGEST_MESSAGE + 1))[::2] == (413, None)
    assert ask(gate, join, "POST", b"{")[::2] == (400, None)
    assert ask(gate, join, "POST", b"[" * 100_000)[::2] == (400, None)
    assert ask(gate, "/gradio_api/upload", "POST", b"x" * 70_000)[0] == 200  # Gradio's own limit


# Command ------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_a_port_that_is_taken():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        found = run("--port", port)
        early = run("--port", port, "--prior", "no/such/prior.safetensors")
    assert early.output == found.output  # before weights are read
    assert found.exit_code == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in found.output and "--port" in found.output
    assert len(found.output.strip().splitlines()) == 1


def test_bad_options():
    assert "host 'no such host' is not known" in run("--host", "no such host").output
    assert "megapixels must be positive" in run("--max-megapixels", 0, "--port", 0).output
    assert run("--port", 70000).exit_code == 2
    missing = run("--port", 0, "--prior", "no/such/prior.safetensors")
    assert missing.exit_code == 1 and "no/such/prior.safetensors" in missing.output
    assert "dtype must be" in run("--port", 0, "--dtype", "fp8").output
    assert "device 'meta' cannot be used" in run("--port", 0, "--device", "meta").output


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("latentdem.serve.app")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("page", "deblur_tab", "objects_tab"):
        monkeypatch.delitem(sys.modules, f"latentdem.serve.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    found = run("--port", 0)
    assert found.exit_code == 1
    assert 'pip install "latentdem[serve]"' in found.output
    assert len(found.output.strip().splitlines()) == 1


def test_local_hosts():
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "127.1.2.3")))
    assert not any(
        map(is_local, ("0.0.0.0", "::", "192.168.1.5", "studio.lan", "127.evil.example", "", None))
    )


def test_it_ends_quietly_and_leaves_nothing(tmp_path):
    pytest.importorskip("gradio", reason='needs Gradio: pip install "latentdem[serve]"')
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "latentdem", "serve", "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "open http" in line:
                break
        port = int(line.split(":")[2].split()[0])
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            assert len(list(tmp_path.glob("latentdem-serve-*"))) == 1
            process.send_signal(signal.SIGINT)
            lines += process.stderr.readlines()
    assert process.returncode == 0
    output = "".join(lines)
    assert output.count("without a password") == 1
    assert "uploads and results are removed" in output and "Traceback" not in output
    assert list(tmp_path.glob("latentdem-serve-*")) == []


EARLY_SIGNAL = """
import signal, sys
import uvicorn
from latentdem.cli import app

number = int(sys.argv.pop(1))
whole = uvicorn.Config.get_loop_factory

def interrupted(config):
    signal.raise_signal(number)
    return whole(config)

uvicorn.Config.get_loop_factory = interrupted
app(["serve", "--port", "0"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_an_event_loop(number, tmp_path):
    """It comes right after the page's address is shown: the server ends in order, all the same."""
    pytest.importorskip("gradio", reason='needs Gradio: pip install "latentdem[serve]"')
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EARLY_SIGNAL, str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0
    assert len(ended.stderr.splitlines()) == 1 + (number == signal.SIGINT), ended.stderr
    assert list(tmp_path.glob("latentdem-serve-*")) == []


# Visitors -----------------------------------------------------------------------------------


@pytest.fixture
def page_module():
    pytest.importorskip("gradio", reason='needs Gradio: pip install "latentdem[serve]"')
    from latentdem.serve import page

    return page


def test_a_visitor_runs_one_job_a_tab(page_module, worker, store):
    page = page_module.Page(worker, store, Limits(seconds=60))
    log = []
    first = page.run(("a", "deblur"), lambda folder: counting(4000, log))
    next(first)
    second = page.run(("a", "deblur"), lambda folder: lambda job: folder.is_dir())
    assert list(second)[-1].result is True
    assert list(first)[-1].state == "cancelled" and len(log) < 4000
    third = page.run(("a", "objects"), lambda folder: counting(4000))
    next(third)
    page.leave("b")
    page.leave("a")
    assert list(third)[-1].state == "cancelled"


def test_a_visitor_who_does_not_look_any_more_is_not_computed_for(page_module, worker, store):
    page = page_module.Page(worker, store, Limits(seconds=60))
    log = []
    run = page.run(("a", "deblur"), lambda folder: counting(4000, log))
    next(run)
    run.close()
    assert last(worker.submit(lambda job: 1, 60)).result == 1 and len(log) < 4000


def test_what_cannot_begin_is_one_line(page_module, worker, store):
    page = page_module.Page(worker, store, Limits(seconds=0.05))

    def refuse(folder):
        raise InputError("no photograph")

    assert list(page.run(("a", "deblur"), refuse)) == [Snapshot("failed", message="no photograph")]
    late = list(page.run(("a", "deblur"), lambda folder: counting(4000)))
    assert late[-1].state == "late"


def test_uploads_are_checked(page_module, worker, store, photo):
    page = page_module.Page(worker, store, Limits(megapixels=0.001))
    assert page.check_upload(None) == ""
    assert "no longer there" in page.check_upload({"path": str(photo)})
    assert "more than the 0.001" in page.check_upload({"path": str(store.borrow(photo))})


def test_numbers_of_fields(page_module):
    number, whole = page_module.number, page_module.whole
    assert number(" ", "x") is None and whole(None, "x") is None
    assert number("0,5", "x") == 0.5 and whole("25", "x") == 25 and whole(3.0, "x") == 3
    with pytest.raises(InputError, match=r"x must be a whole number, found 5.5"):
        whole("5.5", "x")
    for text in ("nan", "inf", "1e999", "__import__('os')", "1;2"):
        with pytest.raises(InputError, match="x must be a number"):
            number(text, "x")
