"""python -m gradmill"""
import sys

from gradmill.cli import main

if __name__ == "__main__":
    sys.exit(main())
