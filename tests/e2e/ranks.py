"""What `torchrun` starts in test_distributed: trains the configs named on the command line, one after another, in the
same processes, because a start costs seconds and a tiny run does not."""

import sys
from pathlib import Path

from student_trainer.config import load_config
from student_trainer.loop import train

for config in sys.argv[1:]:
    train(load_config(Path(config)), quiet=True)
