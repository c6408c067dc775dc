"""Draw the pictures of docs/plots.md by running the page: python docs/pictures/draw_plots.py.

The picture of the report is a browser's, if Chromium is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import matplotlib
from PIL import Image

matplotlib.use("Agg")

HERE = Path(__file__).parent.resolve()
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Run every block of the page in an empty folder and take what it wrote."""
    code = "\n".join(BLOCK.findall((HERE.parent / "plots.md").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile(code, "plots.md", "exec"), {"__name__": "__main__"})
        if browser := shutil.which("chromium"):
            command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars"]
            command += ["--window-size=1050,1290", "--screenshot=report.png", "report.html"]
            subprocess.run(command, check=True, capture_output=True)
            Image.open("report.png").convert("RGB").quantize(256).save("report.png", optimize=True)
        for found in (*Path(folder).glob("*.png"), Path(folder) / "tokens.html"):
            shutil.copy(found, HERE)
        os.chdir(HERE)


if __name__ == "__main__":
    main()
