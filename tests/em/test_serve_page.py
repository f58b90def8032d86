"""The running page over plain HTTP: what its buttons do, what it serves, what it refuses."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from object_stand_in import exact_prior
from PIL import Image
from serve_stand_in import SLOW

from latentdem.io import to_pil
from latentdem.priors import load_prior


class Visitor:
    """A page without a browser."""

    def __init__(self, server):
        self.server, self.session = server, f"visitor{os.urandom(4).hex()}"
        self.config = json.loads(self.get("/config")[1])
        self.ids = {c["id"]: c["props"].get("elem_id") for c in self.config["components"]}

    def get(self, path, **headers):
        request = urllib.request.Request(self.server.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def post(self, path, body, kind="application/json"):
        request = urllib.request.Request(self.server.url + path, body, {"content-type": kind})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def upload(self, name, content):
        head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + b"\r\n--b--\r\n"
        status, answer = self.post("/gradio_api/upload", body, "multipart/form-data; boundary=b")
        return answer[0] if status == 200 else status

    def event(self, element, action):
        """The number of what happens when ``element`` is clicked, uploaded to ..."""
        for index, dependency in enumerate(self.config["dependencies"]):
            for identity, name in dependency["targets"]:
                if self.ids.get(identity) == element and name == action:
                    return dependency.get("id", index)
        raise KeyError(element)

    def send(self, event, data):
        body = {"data": data, "fn_index": event, "session_hash": self.session}
        status, answer = self.post("/gradio_api/queue/join", json.dumps(body).encode())
        assert status == 200, answer
        return answer["event_id"]

    def messages(self):
        """What the server tells until the events are over."""
        url = f"{self.server.url}/gradio_api/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(url, timeout=60) as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    message = json.loads(line[5:])
                    yield message
                    if message["msg"] == "close_stream":
                        return

    def press(self, element, data, action="click"):
        """All that comes back, as text."""
        self.send(self.event(element, action), data)
        found = list(self.messages())
        assert any(message["msg"] == "process_completed" for message in found)
        return json.dumps(found)


def picture(path, channels=3, height=48, width=40):
    to_pil(torch.rand(channels, height, width)).save(path)
    return path


def given(path):
    return {"path": path, "orig_name": Path(path).name, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def visitor(server):
    return Visitor(server)


# Deblur -------------------------------------------------------------------------------------


def deblur_data(path, size="5", steps=2):
    return [given(path) if path else None, size, 0, "0,02", steps, "1", False]


def test_deblur_from_upload_to_download(visitor, tmp_path):
    before = set(visitor.server.root.glob("results/*/*"))
    path = visitor.upload("holiday.png", picture(tmp_path / "x.png").read_bytes())
    assert Path(path).is_relative_to(visitor.server.root)
    told = visitor.press("deblur-start", deblur_data(path))
    assert "Done in" in told and "5 x 5 pixels" in told and "2.0 % of white, given" in told
    after = set(visitor.server.root.glob("results/*/*"))
    names = {file.name: file for file in after - before}
    status, content = visitor.get(f"/gradio_api/file={names['restored.png']}")
    assert status == 200
    (tmp_path / "got.png").write_bytes(content)
    with Image.open(tmp_path / "got.png") as got:
        assert got.size == (40, 48)
    report = json.loads(names["report.json"].read_text())
    assert report["input"] == "holiday.png" and report["seed"] == 1
    assert report["noise_std"] == [0.02]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"size": "6"}, "kernel_size must be odd and positive, found 6"),
        ({"size": "5.5"}, "the kernel size must be a whole number, found 5.5"),
        ({"size": "wide"}, "the kernel size must be a number, or empty, found 'wide'"),
        ({"size": "99"}, "kernel_size 99 is larger than the image (48 x 40 pixels)"),
    ],
)
def test_bad_options_are_one_line(visitor, tmp_path, data, line):
    path = visitor.upload("x.png", picture(tmp_path / "x.png").read_bytes())
    told = visitor.press("deblur-start", deblur_data(path, **data))
    assert line in told.replace("&#x27;", "'")


def test_nothing_chosen(visitor):
    assert "choose a photograph first" in visitor.press("deblur-start", deblur_data(None))
    start = [None, "", 2, "0", None]
    assert "two or more pictures" in visitor.press("objects-start", start)


def test_uploads_are_checked_at_once(visitor, tmp_path):
    path = visitor.upload("text.png", b"no picture at all")
    assert "text.png: not a picture" in visitor.press("photo", [given(path)], "upload")
    path = visitor.upload("large.png", picture(tmp_path / "l.png", 1, 200, 90).read_bytes())
    assert "90 x 200 = 0.0 megapixels" in visitor.press("photo", [given(path)], "upload")
    assert visitor.upload("heavy.png", b"x" * 110_000) == 413


def test_an_example_is_drawn(visitor):
    told = visitor.press("drawn-example", [])
    assert "cat.png" in told


# Cancel, queue, time ------------------------------------------------------------------------


def start(visitor, tmp_path):
    path = visitor.upload("x.png", picture(tmp_path / "x.png").read_bytes())
    visitor.send(visitor.event("deblur-start", "click"), deblur_data(path, steps=SLOW))


def test_cancel_stops_the_work(visitor, tmp_path):
    start(visitor, tmp_path)
    told, pressed = "", False
    for message in visitor.messages():
        told += json.dumps(message)
        if not pressed and "of 3000" in told:
            pressed = True
            body = {"data": [], "fn_index": visitor.event("deblur-cancel", "click"),
                    "session_hash": visitor.session}  # fmt: skip
            visitor.post("/gradio_api/queue/join", json.dumps(body).encode())
    assert "Cancelled; nothing is computed" in told
    assert visitor.server.idle()


def test_others_wait_and_too_many_are_sent_away(server, visitor, tmp_path):
    others = [Visitor(server) for _ in range(2)]
    stop = threading.Event()

    def follow(of, told):
        for message in of.messages():
            told.append(json.dumps(message))
            if stop.is_set():
                return

    told = [[], []]
    threads = []
    for k, of in enumerate((visitor, others[0])):
        start(of, tmp_path)
        threads.append(threading.Thread(target=follow, args=(of, told[k])))
        threads[-1].start()
        text = "of 3000" if k == 0 else "Waiting: one request before"
        while text not in "".join(told[k]):
            time.sleep(0.02)
    start(others[1], tmp_path)
    assert "queue is full (1 waiting)" in json.dumps(list(others[1].messages()))
    for of in (others[0], visitor):
        of.send(of.event("deblur-cancel", "click"), [])
    stop.set()
    for thread in threads:
        thread.join(20)
    assert server.idle()


def test_leaving_the_page_stops_the_work(server, tmp_path):
    visitor = Visitor(server)
    beat = urllib.request.urlopen(f"{server.url}/gradio_api/heartbeat/{visitor.session}")
    start(visitor, tmp_path)
    messages = visitor.messages()
    while "of 3000" not in json.dumps(next(messages)):
        pass
    messages.close()
    beat.close()
    assert server.idle()


# Objects ------------------------------------------------------------------------------------


def test_objects_from_upload_to_mesh(visitor, tmp_path):
    _, views = exact_prior()
    chosen = []
    for k, view in enumerate(views[:2]):
        to_pil(view).save(tmp_path / f"<b>{k}.png")
        path = visitor.upload(f"view {k}.png", (tmp_path / f"<b>{k}.png").read_bytes())
        chosen.append({"image": given(path), "caption": None})
    told = visitor.press("objects-start", [chosen, "20", 1, "0", None])
    assert "Done in" in told and "turntable.webp" in told and "Azimuth" in told


# What is served -----------------------------------------------------------------------------


def test_other_files_are_not_served(visitor, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody's business")
    inside = visitor.upload("x.png", picture(tmp_path / "x.png").read_bytes())
    assert visitor.get(f"/gradio_api/file={inside}")[0] == 200
    up = "../" * 20
    for path in (secret, "/etc/passwd", Path(__file__), Path.cwd() / "pyproject.toml",
                 "pyproject.toml", f"{inside}/{up}etc/passwd", f"{up}etc/passwd",
                 f"%2e%2e/{'%2e%2e/' * 20}etc/passwd", "http://127.0.0.1:1/x"):  # fmt: skip
        status, content = visitor.get(f"/gradio_api/file={path}")
        assert status == 403 and len(content) < 60, path
    for path in ("/assets/../../../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/config.json",
                 "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/vibe-code"):  # fmt: skip
        assert visitor.get(path)[0] in (403, 404), path


def test_a_file_of_another_folder_cannot_be_put_in(visitor, tmp_path):
    path = picture(tmp_path / "x.png")
    for event, data in (("deblur-start", "click"), ("photo", "upload")):
        body = {"data": [given(str(path))], "fn_index": visitor.event(event, data),
                "session_hash": visitor.session}  # fmt: skip
        answer = visitor.post("/gradio_api/queue/join", json.dumps(body).encode())
        assert answer == (403, "only uploaded files are taken; choose the picture again")


def test_the_page_names_no_other_server(visitor):
    status, content = visitor.get("/")
    assert status == 200
    text = content.decode()
    for tag in ("<script", "<link"):
        for part in text.split(tag)[1:]:
            assert "http" not in part.split(">")[0].replace(visitor.server.url, "")
    assert visitor.config["analytics_enabled"] is False
    (models,) = [c for c in visitor.config["components"] if c["props"].get("elem_id") == "models"]
    assert f"photographs: {load_prior().name}, on cpu in float32" in models["props"]["value"]
    assert "fonts.googleapis" not in visitor.get("/theme.css")[1].decode()
    assert visitor.get("/", Host="evil.example")[0] == 403
    assert visitor.get("/", Origin="http://evil.example")[0] == 403


def test_nothing_can_be_called_by_name(visitor):
    assert all(d["api_visibility"] == "private" for d in visitor.config["dependencies"]
               if d["targets"] and d["targets"][0][1] != "unload")  # fmt: skip
    assert visitor.get("/gradio_api/info")[1] in (b'{"named_endpoints":{},"unnamed_endpoints":{}}',)
