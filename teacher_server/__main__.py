"""`python -m teacher_server`."""

from teacher_server.cli import main

if __name__ == "__main__":
    main()
