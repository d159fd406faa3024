"""Python runs this before a script: list the files of the working directory that a rank opens to write."""

import os
import sys


def note(event: str, arguments: tuple) -> None:
    """Add a file that is opened to write to written.<rank>."""
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & os.O_ACCMODE:
        path = os.path.abspath(arguments[0])
        if path.startswith(os.getcwd() + os.sep) and not os.path.basename(path).startswith("written."):
            with open(f"written.{os.environ['RANK']}", "a") as file:
                file.write(f"{path}\n")


if "RANK" in os.environ:
    sys.addaudithook(note)
