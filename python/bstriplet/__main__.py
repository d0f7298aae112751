"""``python -m bstriplet`` is the ``bstriplet`` command."""

from bstriplet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
