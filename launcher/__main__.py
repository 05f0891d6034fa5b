"""`python -m launcher`: the same as the console script `launch`."""

from .cli import main

main()
