"""A hook of mkdocs: pages link to files of the repository, as they must where the repository is read, and the site has
some of these as pages of its own. A link to any other file becomes its name; one that leads nowhere fails."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
#: Pages outside docs/, at the same paths in the site.
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "bench/RESULTS.md", "bench/RESULTS-AVX2.md", "bench/gpu/gpu_kernels.md"]
IMAGES = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("bench/records/*/*.svg"))]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.plugins.repository_links")


def on_files(files, config):
    for path in [*PAGES, *IMAGES]:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def site_path(path: str) -> str | None:
    """Where the site has this file of the repository, if it has it."""
    if path in PAGES or path in IMAGES:
        return path
    return path.removeprefix(DOCS) if path.startswith(DOCS) else None


def on_page_markdown(markdown, page, config, files):
    source = page.file.src_uri
    folder = os.path.dirname(source if source in PAGES else DOCS + source)

    def rewritten(match: re.Match) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"\w+:", path):
            return match[0]
        path = os.path.normpath(os.path.join(folder, path))
        if not (ROOT / path).exists():
            log.warning("%s: the link to %s leads nowhere", source, target)
            return match[0]
        there = site_path(path)
        if there is None:
            return text
        relative = os.path.relpath(there, os.path.dirname(source) or ".")
        return f"{image}[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
