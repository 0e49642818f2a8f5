"""A headless Chromium that ChromeDriver steers, by the WebDriver protocol over plain HTTP."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

OPTIONS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
]


def missing():
  """Why there is no browser to test with; empty if there is one."""
  names = ("chromium", "chromium-browser", "google-chrome")
  if not any(map(shutil.which, names)):
    return "no Chromium on this machine (apt-get install chromium)"
  if not shutil.which("chromedriver"):
    return "no ChromeDriver on this machine (apt-get install chromium-driver)"
  return ""


class Browser:
  """One window: `open` a file, `run` JavaScript in it, take a `screenshot`."""

  def __init__(self, port):
    self._url = f"http://127.0.0.1:{port}"
    options = {"goog:chromeOptions": {"args": OPTIONS}}
    session = self._post("/session", {"capabilities": {"alwaysMatch": options}})
    self._url += f"/session/{session['sessionId']}"

  def _post(self, path, body, method="POST"):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(self._url + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.loads(answer.read())["value"]

  def open(self, path, width=1200, height=900):
    self._post("/window/rect", {"width": width, "height": height})
    self._post("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": {
      "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}})  # fmt: skip
    self._post("/url", {"url": path.absolute().as_uri()})

  def run(self, script):
    return self._post("/execute/sync", {"script": script, "args": []})

  def wait(self, script, seconds=120):
    """Until the script returns something true, and what it returned."""
    end = time.monotonic() + seconds
    while not (found := self.run(script)):
      assert time.monotonic() < end, f"still false: {script}"
      time.sleep(0.1)
    return found

  def screenshot(self, path):
    path.write_bytes(base64.b64decode(self._post("/screenshot", None, "GET")))

  def close(self):
    self._post("", None, "DELETE")


@contextlib.contextmanager
def browser():
  """A browser that ends with the block."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  driver = subprocess.Popen(
    ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  try:
    for attempt in range(100):
      with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        break
      assert attempt < 99, "ChromeDriver does not answer"
      time.sleep(0.1)
    window = Browser(port)
    try:
      yield window
    finally:
      window.close()
  finally:
    driver.terminate()
    driver.wait(10)
