"""`python -m bitsandbytes`, as `halfbyte run -m bitsandbytes` or where the layer is served."""

from __future__ import annotations

from .diagnostics.main import main

if __name__ == "__main__":
    main()
