"""Keeps the runtimes from telling their makers that they are used."""

from __future__ import annotations

import os
import sys
from typing import Any, cast


def turn_off_telemetry() -> None:
    """Turns off what the runtimes send, for this process. To be called before they are imported.

    OpenVINO and NNCF report to Google Analytics at their import and at each conversion, unless the
    user has declined before; ONNX Runtime reports to Microsoft, and writes an identifier into the
    user's folder. Who exports a model has not asked for that. What was imported before, or asked
    for by `ORT_DISABLE_TELEMETRY=0`, stays as it is.

    References:
        - The file Privacy.md in ONNX Runtime's package.
        - https://docs.openvino.ai, "OpenVINO Telemetry".
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # There is no such switch. Without the module that reports, both do without.
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
