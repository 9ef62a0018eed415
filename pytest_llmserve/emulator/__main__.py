"""`python -m pytest_llmserve.emulator`: serve until told to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pytest_llmserve.emulator.server import Emulator
from pytest_llmserve.emulator.settings import parse
from pytest_llmserve.errors import ConfigError, ServerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; 0 after SIGTERM or SIGINT, 1 if the server cannot be, 2 for a wrong option."""
    try:
        settings = parse(sys.argv[1:] if arguments is None else arguments)
        Emulator(settings).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'the server'}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
