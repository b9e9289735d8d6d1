"""A real browser for tests of the pages: headless Chromium, and a script that acts as the reader would."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
DARK = "--force-dark-mode"

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no browser: none of chromium, chromium-browser, google-chrome is on PATH"
)

READER = """
  const byId = (id) => document.getElementById(id);
  const set = (id, value) => {
    byId(id).value = value;
    byId(id).dispatchEvent(new Event("input", { bubbles: true }));
  };
  const press = (key, target = document.activeElement) =>
    target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const seen = {};
"""
"""What every driver begins with: setting a control, pressing a key, and `seen` for what is found."""


def browse(folder: Path, page: Path, *flags: str) -> str:
    """Open a page with further flags, with a profile below `folder`; returns what the browser prints."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def with_driver(page: Path, target: Path, script: str) -> Path:
    """A copy of the page that also runs `script` after its own; the policy against foreign scripts is taken out."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    end = text.rindex("</body>")
    target.write_text(f"{text[:end]}<script>{{{READER}{script}}}</script>{text[end:]}", encoding="utf-8")
    return target


def drive(folder: Path, page: Path, script: str, *flags: str) -> Any:
    """Run a driver on a page, with files below `folder`; returns what it left in `seen`."""
    script += "; document.body.dataset.seen = JSON.stringify(seen);"
    dom = browse(folder, with_driver(page, folder / "driven.html", script), *flags, "--dump-dom")
    assert 'data-js="ready"' in dom, re.findall(r'data-js-error="[^"]*"', dom)
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found is not None, "the driver did not come to its end"
    return json.loads(html.unescape(found[1]))
