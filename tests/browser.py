"""A real browser, headless Chromium, that opens a page at several widths and says what it sees."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """
const found = [];
function look() {
  for (const frame of document.querySelectorAll('iframe')) {
    const page = frame.contentDocument, root = page.documentElement, width = root.clientWidth;
    const wide = [...page.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + 0.5
      && getComputedStyle(e).position !== 'absolute' && !e.closest('thead'));
    found.push({width: frame.width * 1, scroll: root.scrollWidth, wide: wide.map(e => e.tagName),
      pictures: [...page.images].map(i => ({alt: i.alt, drawn: i.complete && i.naturalWidth > 0,
        width: i.getBoundingClientRect().width})),
      size: parseFloat(getComputedStyle(page.body).fontSize), errors: frame.contentWindow.__errors || []});
  }
  document.getElementById('seen').textContent = JSON.stringify(found);
}
window.addEventListener('load', () => setTimeout(look, 300));
"""


def find() -> str | None:
    """The browser: RNNCORE_BROWSER, or one on the path."""
    return os.environ.get("RNNCORE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


def open_page(path: Path, widths: tuple[int, ...], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """(what is seen at every width, what the browser writes on its console)."""
    listen = "<script>window.__errors = []; addEventListener('error', e => __errors.push(String(e.message)));</script>"
    source = path.read_text(encoding="utf-8").replace("<head>", f"<head>{listen}", 1)
    whole = html.escape(source, quote=True)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{whole}"></iframe>' for width in widths)
    outer = folder / "frames.html"
    seen_in = f'<meta charset="utf-8"><script>{PROBE}</script>{frames}<pre id="seen"></pre>'
    outer.write_text(seen_in, encoding="utf-8")
    browser = find()
    assert browser is not None
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", "--window-size=1800,1000", "--virtual-time-budget=20000",
         "--dump-dom", outer.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert seen, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(seen[1])), console
