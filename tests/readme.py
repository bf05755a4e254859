"""The README's Python, to be run as it stands."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from tests.harness import ROOT

_BLOCK = re.compile(r"(?:^ {4}.*\n|^\n)+", re.MULTILINE)


def python_blocks() -> list[str]:
    """The README's indented blocks that import something of ours, in their order."""
    blocks = _BLOCK.findall((ROOT / "README.md").read_text())
    return [textwrap.dedent(block) for block in blocks if "from protos." in block]


async def run_block(block: str, **names: Any) -> dict[str, Any]:
    """Runs a block that awaits, with `names` known to it; the names it leaves behind."""
    body = textwrap.indent(block, "    ")
    exec(f"async def snippet():\n{body}\n    return locals()\n", names)
    return await names["snippet"]()
