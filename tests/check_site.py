"""Looks at a built documentation site in a real browser: links, widths, console, pictures, search.

  mkdocs build --strict --site-dir site && python tests/check_site.py site

Exit status 1 where a link leads nowhere, something is loaded from elsewhere, a page is wider than its screen or writes
errors on the console, a picture has no words, or the search finds nothing.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import browser

WIDTHS = (420, 1024, 1600)
PROBE = """
const seen = [];
async function look() {
  for (const frame of document.querySelectorAll('iframe')) {
    const page = frame.contentDocument, root = page.documentElement;
    seen.push({page: frame.dataset.page, width: frame.width * 1, scroll: root.scrollWidth, here: root.clientWidth,
      silent: [...page.images].filter(i => !i.alt).length,
      missing: [...page.images].filter(i => i.loading != 'lazy' && i.complete && !i.naturalWidth).length});
  }
  document.getElementById('seen').textContent = JSON.stringify(seen);
}
window.addEventListener('load', () => setTimeout(look, 1500));
"""


def faults_of_files(site: Path) -> list[str]:
    """Links that lead nowhere, scripts and styles from elsewhere, a search index that knows too little."""
    faults = []
    for page in site.rglob("*.html"):
        text, name = page.read_text(encoding="utf-8"), page.relative_to(site)
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", text):
            target = re.search(r'(?:src|href)="?(https?://[^">\s]+)', tag)
            if target and 'rel="canonical"' not in tag:
                faults.append(f"{name}: loads {target[1]}")
        for target in re.findall(r'<a\b[^>]*?href="?([^">\s]+)', text):
            target, anchor = urldefrag(unquote(html.unescape(target)))
            if "://" in target or target.startswith("mailto:") or name == Path("404.html"):
                continue
            to = (page.parent / target).resolve() if target else page
            to = to / "index.html" if to.is_dir() else to
            if not to.exists():
                faults.append(f"{name}: {target} is not there")
            elif anchor and to.suffix == ".html" and f'id="{anchor}"' not in to.read_text(encoding="utf-8"):
                faults.append(f"{name}: {target}#{anchor} is not there")
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    for word in ("retention_curve", "seq_lengths", "RNNCORE_CPP"):
        if not any(word in entry["text"] or word in entry["title"] for entry in index["docs"]):
            faults.append(f"search: nothing on {word}")
    return faults


def faults_in_browser(site: Path) -> list[str]:
    """Pages that are too wide, pictures without words, errors on the console."""
    program = browser.find()
    if program is None:
        return ["no browser: install chromium, or name one in RNNCORE_BROWSER"]
    pages = sorted(str(p.parent.relative_to(site)) for p in site.rglob("index.html"))
    faults: list[str] = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with tempfile.TemporaryDirectory() as profile:
        probe = site / "probe.html"
        frames = "".join(
            f'<iframe width="{width}" height="900" data-page="{page}" src="/{page}/"></iframe>'
            for page in pages
            for width in WIDTHS
        )
        head = f'<meta charset="utf-8"><script>{PROBE}</script>'
        probe.write_text(f'{head}{frames}<pre id="seen"></pre>', encoding="utf-8")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            done = subprocess.run(
                [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--enable-logging=stderr", f"--user-data-dir={profile}", "--window-size=1800,1000",
                 "--virtual-time-budget=60000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/probe.html"],
                capture_output=True, text=True, timeout=600, check=True,
            )  # fmt: skip
        finally:
            server.shutdown()
            probe.unlink()
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    if not found or not found[1]:
        return [f"the browser said nothing: {done.stderr[-1000:]}"]
    seen = json.loads(html.unescape(found[1]))
    if len(seen) != len(pages) * len(WIDTHS):
        faults.append(f"{len(seen)} of {len(pages) * len(WIDTHS)} pages seen")
    for one in seen:
        where = f"{one['page']} at {one['width']} px"
        if one["scroll"] > one["here"] + 1:
            faults.append(f"{where}: {one['scroll']} px wide on a screen of {one['here']}")
        if one["silent"] or one["missing"]:
            faults.append(f"{where}: {one['silent']} pictures without words, {one['missing']} not there")
    return faults + [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def main() -> int:
    site = Path(sys.argv[1]).resolve()
    faults = faults_of_files(site) + faults_in_browser(site)
    print("\n".join(faults) or f"{len(list(site.rglob('index.html')))} pages, all well")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
