"""`python -m student_trainer`."""

from student_trainer.cli import main

main()
