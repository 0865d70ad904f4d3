"""What a check shows: a status, a sentence, and perhaps a few lines to compare. Readable on light and dark pages."""

import html
import re
from dataclasses import dataclass

NOT_ATTEMPTED, PASSED, FAILED = "not attempted", "passed", "failed"

# status: (label, border colour, the same colour as a thin wash that lets either page background through)
_LOOK = {
    NOT_ATTEMPTED: ("not attempted yet", "#8A8F98", "rgba(138,143,152,0.12)"),
    PASSED: ("passed", "#4E9F5B", "rgba(78,159,91,0.14)"),
    FAILED: ("not right yet", "#D0483E", "rgba(208,72,62,0.12)"),
}


@dataclass(frozen=True)
class Result:
    """The outcome of one check. `status` is "not attempted", "passed" or "failed"; `message` is a sentence or two."""

    exercise: str
    status: str
    message: str
    details: tuple[str, ...] = ()  # lines shown under the message, in a fixed-width font

    @property
    def passed(self) -> bool:
        return self.status == PASSED

    def __repr__(self) -> str:
        lines = [f"{self.exercise}: {_LOOK[self.status][0]}. {self.message}", *self.details]
        return "\n    ".join(lines)

    def _repr_html_(self) -> str:
        label, colour, wash = _LOOK[self.status]
        details = ""
        if self.details:
            body = html.escape("\n".join(self.details))
            details = (
                '<pre style="margin:6px 0 0 0;padding:0;background:transparent;color:inherit;white-space:pre-wrap">'
                f"{body}</pre>"
            )
        return (
            f'<div class="exercise-result {self.status.replace(" ", "-")}" style="border-left:4px solid {colour};'
            f'background:{wash};color:inherit;padding:8px 12px;margin:4px 0;max-width:52em">'
            f"<b>{html.escape(self.exercise)}: {label}.</b> {_inline(self.message)}{details}</div>"
        )


def _inline(text: str) -> str:
    """Escaped text in which `code` in backticks is set as code."""
    return re.sub(
        r"`([^`]+)`", r'<code style="background:transparent;color:inherit">\1</code>', html.escape(text, quote=False)
    )
