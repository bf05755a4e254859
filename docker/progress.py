"""The student's health check: exits with 0 when its run was written to within STALL_S seconds."""

import os
import sys
import time
from pathlib import Path

folder, stall_s = Path(os.environ["RUN_FOLDER"]), float(os.environ["STALL_S"])
newest = max((path.stat().st_mtime for path in folder.rglob("*.jsonl")), default=0.0)
if time.time() - newest > stall_s:
    sys.exit(f"nothing was written below {folder} for {stall_s:.0f} s")
