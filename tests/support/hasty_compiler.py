"""A C++ compiler for builds whose speed is not looked at: `python hasty_compiler.py COMPILER FOLDER ARGUMENTS`.

It never optimises. What it makes of a source file in `csrc/` it keeps in FOLDER, by what the preprocessor makes of the
file and by the options. So several builds compile the same text once. All else goes to the compiler as it is.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HASTY = ["-O0", "-fno-lto"]
WITH_A_VALUE = ("-o", "-MT", "-MF", "-I", "-isystem")
WITHOUT_EFFECT = ("-I", "-D", "-MD", "-O", "-flto", "-fno-fat-lto-objects")  # on the text, or because of HASTY


def taken_apart(arguments: list[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """The options with a value of their own, the source files, and the options that change what is compiled."""
    values, sources, others = {}, [], []
    rest = iter(arguments)
    for argument in rest:
        if argument in WITH_A_VALUE:
            values[argument] = next(rest)
        elif not argument.startswith("-"):
            sources.append(argument)
        elif not argument.startswith(WITHOUT_EFFECT):
            others.append(argument)
    return values, sources, others


def main(compiler: str, folder: str, *arguments: str) -> None:
    command = [compiler, *arguments, *HASTY]
    values, sources, others = taken_apart([*arguments, *HASTY])
    if "-c" not in arguments or "-o" not in values or [Path(source).parent.name for source in sources] != ["csrc"]:
        os.execv(compiler, command)
    # It writes the file of dependencies, too. With -o, that file would hold the text.
    at = command.index("-o")
    preprocess = [each for each in command[:at] + command[at + 2 :] if each != "-c"] + ["-E", "-P"]
    text = subprocess.run(preprocess, stdout=subprocess.PIPE, check=True).stdout
    kept = Path(folder, hashlib.sha256(text + "\0".join(others).encode()).hexdigest() + ".o")
    if not kept.exists():
        subprocess.run(command, check=True)
        shutil.copy(values["-o"], kept.with_suffix(f".{os.getpid()}"))
        kept.with_suffix(f".{os.getpid()}").replace(kept)
    shutil.copy(kept, values["-o"])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:  # the compiler has said why
        sys.exit(error.returncode)
