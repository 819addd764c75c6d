"""A headless Chromium, driven over a pipe by its DevTools protocol.

The protocol stands at https://chromedevtools.github.io/devtools-protocol.
"""
import base64
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
         "--hide-scrollbars", "--disable-background-networking", "--autoplay-policy=no-user-gesture-required")


class Browser:
    """One page. `events`: what the browser has told of its own accord."""

    def __init__(self, folder):
        here, there = os.pipe(), os.pipe()                                  # to the browser's descriptor 3, from its 4
        words = ['exec "$0" "$@" 3<&$TO 4>&$FROM', PROGRAM, *FLAGS, f"--user-data-dir={folder}"]
        ends = dict(TO=str(here[0]), FROM=str(there[1]))
        self.process = subprocess.Popen(["bash", "-c", *words], pass_fds=(here[0], there[1]), env=os.environ | ends,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(here[0])
        os.close(there[1])
        self.to, self.source, self.left, self.number = here[1], there[0], b"", 0
        self.events, self.session = [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """One command -> its result."""
        self.number += 1
        message = dict(id=self.number, method=method, params=parameters)
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self, seconds=60):
        """The next message of the browser."""
        while b"\0" not in self.left:
            ready, _, _ = select.select([self.source], [], [], seconds)
            assert ready, "the browser says nothing"
            data = os.read(self.source, 2 ** 20)
            assert data, "the browser has ended"
            self.left += data
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1280, height=900, scheme="light", motion="no-preference"):
        """Shows a file at this size of the window."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        features = [dict(name="prefers-color-scheme", value=scheme), dict(name="prefers-reduced-motion", value=motion)]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def value(self, expression):
        """What a line of JavaScript gives."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        """Until a line of JavaScript gives true."""
        end = time.time() + seconds
        while not self.value(expression):
            assert time.time() < end, f"{expression} does not become true"
            time.sleep(0.05)

    def click(self, selector):
        """A click of the mouse on the middle of an element."""
        x, y = self.value(f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
                          "e.scrollIntoView({block: 'center'});"
                          "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path, whole=True):
        """The page as a PNG file."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.session = None
        os.write(self.to, json.dumps(dict(id=0, method="Browser.close", params={})).encode() + b"\0")
        self.process.wait(30)
