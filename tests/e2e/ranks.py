"""What `torchrun` starts in test_distributed: runs the configs named on the command line, one after another, in the
same processes, because a start costs seconds and a tiny run does not."""

import sys
from pathlib import Path

from student_trainer.config.recipe import load_plan
from student_trainer.distributed import joined
from student_trainer.recipe import run_plan

with joined():
    for config in sys.argv[1:]:
        for _ in run_plan(load_plan(Path(config)), quiet=True):
            pass
