"""From the records in bench/records to tables and charts: ``python -m bench.report``.

Writes README.md's parts between ``<!-- claim -->``, ``<!-- bench -->``, ``<!-- demo -->`` and their ends, the part
``<!-- measured -->`` of the pages about other libraries, a page of bench/ for the records of each processor, and the
charts. ``--check`` writes nothing and exits 1 if something there is not what the records say.
"""

from __future__ import annotations

import argparse
import re
import sys

from bench.report import adoption, claims
from bench.report.charts import charts
from bench.report.draw import draw, is_current
from bench.report.pages import FIRST, PAGES, excerpt, page
from bench.report.records import RECORDS, ROOT, load

README = ROOT / "README.md"


def filled(text: str, part: str, new: str) -> str:
    """``text`` with ``new`` between the marks of a part."""
    begin, end = f"<!-- {part} -->\n", f"<!-- /{part} -->"
    if begin not in text or end not in text:
        sys.exit(f"no part from {begin.strip()} to {end} in {text.splitlines()[0]!r}")
    return re.sub(f"{begin}.*{end}", lambda _: begin + new + end, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if something differs")
    arguments = parser.parse_args()
    records = {processor: load(RECORDS / processor) for processor in PAGES}
    pictures = charts(records[FIRST])
    demos = [demo for processor in PAGES if (demo := claims.load(RECORDS / processor))]
    end_to_end = [found["end_to_end"].races if "end_to_end" in found else [] for found in records.values()]
    readme = README.read_text()
    readme = filled(readme, "claim", claims.claim(demos, end_to_end))
    readme = filled(readme, "bench", excerpt(records[FIRST], pictures))
    readme = filled(readme, "demo", claims.section(demos, end_to_end))
    texts = {README: readme}
    for path, (name, text_of) in adoption.PAGES.items():
        if record := records[adoption.PROCESSOR].get(name):
            texts[path] = filled(path.read_text(), "measured", text_of(record))
    for processor, path in PAGES.items():
        texts[path] = page(processor, records[processor], pictures if processor == FIRST else {})
    shown = {RECORDS / FIRST / f"{name}.svg": chart for name, chart in pictures.items()}
    if arguments.check:
        stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
        stale += [path for path, (_, data) in shown.items() if not is_current(path, data)]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the records say")
        return int(bool(stale))
    for path, text in texts.items():
        path.write_text(text)
    for path, (kind, data) in shown.items():
        draw(kind, data, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
