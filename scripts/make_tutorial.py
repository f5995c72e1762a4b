"""Makes the tutorial's notebook and figure from its page, so that the three never drift. `just tutorial`.

Text becomes Markdown cells and every python block a code cell; the notebook is executed in an empty folder, and its last
picture is the one the page shows. Needs nbclient, nbformat and ipykernel (`pip install nbclient ipykernel`).
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, NOTEBOOK, FIGURE = (ROOT / p for p in ("docs/tutorial.md", "examples/tutorial.ipynb", "docs/tutorial.png"))


def cells(page: str) -> list[tuple[str, str]]:
    """(kind, source) of every cell: "markdown" or "code". The page's picture is left out: the notebook draws it."""
    found = []
    for i, text in enumerate(re.split(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)):
        text = text if i % 2 else re.sub(r"^!\[.*?\)\n", "", text, flags=re.M)
        text = text if i % 2 else re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"*\1*", text)  # pages are not beside it
        if text.strip():
            found.append(("code" if i % 2 else "markdown", text.strip()))
    return found


def main() -> None:
    """Executes the page and writes notebook and figure."""
    import nbformat
    from nbclient import NotebookClient

    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    for i, (kind, source) in enumerate(cells(PAGE.read_text(encoding="utf-8"))):
        cell = made[kind](source)
        cell["id"] = f"cell-{i}"
        book.cells.append(cell)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=1800, resources={"metadata": {"path": folder}}).execute()
        FIGURE.write_bytes((Path(folder) / "tutorial.png").read_bytes())
    for cell in book.cells:
        cell.get("metadata", {}).pop("execution", None)  # times of day
        kept = [o for o in cell.get("outputs", []) if not (o.get("output_type") == "stream" and o["name"] == "stderr")]
        if cell["cell_type"] == "code":
            cell["outputs"] = kept
    book.metadata.pop("language_info", None)
    NOTEBOOK.parent.mkdir(exist_ok=True)
    nbformat.write(book, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)}: {NOTEBOOK.stat().st_size / 1000:.0f} kB, {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
