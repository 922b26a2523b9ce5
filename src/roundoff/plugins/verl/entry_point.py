"""The module that the entry point `verl.plugins` names, for launch scripts that set no VERL_USE_EXTERNAL_MODULES.

verl swallows the errors of entry points and would run without hardware, so this module ends the process on an error.
"""

from __future__ import annotations

import sys
import traceback

try:
    from roundoff.plugins.verl import entry
except Exception as error:  # of any kind: verl would swallow it
    traceback.print_exc()
    print(f"roundoff: the plugin for verl could not be activated: {error}", file=sys.stderr)
    raise SystemExit(3) from error

__all__ = ["entry"]
