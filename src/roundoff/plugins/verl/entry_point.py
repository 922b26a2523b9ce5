"""What the entry point `verl.plugins` names: the plugin for launch scripts that set no VERL_USE_EXTERNAL_MODULES.

verl swallows the errors of entry points and would go on without hardware, so here they end the process.
"""

from __future__ import annotations

import sys
import traceback

try:
    from roundoff.plugins.verl import entry
except Exception as error:  # verl would swallow whatever it is
    traceback.print_exc()
    print(f"roundoff: the plugin for verl could not be activated: {error}", file=sys.stderr)
    raise SystemExit(3) from error

__all__ = ["entry"]
