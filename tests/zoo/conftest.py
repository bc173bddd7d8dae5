"""After a run of the whole zoo: how many architectures of each family were converted or refused."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(report.user_properties)
            if "family" in properties:
                kind = properties["kind"] if outcome == "passed" else "failed"
                counts[properties["family"], kind] += 1
    if not counts:
        return
    kinds = ["converted", "refused", "failed"]
    terminalreporter.write_line(f"{'family':34}" + "".join(f"{kind:>11}" for kind in kinds))
    for family in sorted({family for family, _ in counts}):
        terminalreporter.write_line(f"{family:34}" + "".join(f"{counts[family, kind]:11}" for kind in kinds))
    total = (sum(n for (_, k), n in counts.items() if k == kind) for kind in kinds)
    terminalreporter.write_line(f"{'all':34}" + "".join(f"{n:11}" for n in total))
