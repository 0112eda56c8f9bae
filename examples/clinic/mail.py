"""How the clinic sends mail. For development each mail becomes a file; a real clinic passes its own `Mailer` to `create_app`."""

from __future__ import annotations

from email.message import EmailMessage
from pathlib import Path
from typing import Protocol
from uuid import uuid4


class Mailer(Protocol):
    """Sends one mail. Called in a worker thread after the response was sent, or in a task.

    Mails with the same ``key`` are one and the same, which must not arrive twice: the idempotency key of a mail service.
    """

    def send(self, to: str, subject: str, text: str, *, key: str | None = None) -> None: ...


class Outbox:
    """A folder of .eml files. A mail that is sent again replaces itself."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def send(self, to: str, subject: str, text: str, *, key: str | None = None) -> None:
        message = EmailMessage()
        message["To"], message["Subject"] = to, subject
        message.set_content(text)
        self.folder.mkdir(parents=True, exist_ok=True)
        half = self.folder / f"{uuid4().hex}.part"
        half.write_bytes(bytes(message))
        half.rename(self.folder / f"{key or uuid4().hex}.eml")
