"""How the clinic sends mail. For development each mail becomes a file; a real clinic passes its own `Mailer` to `create_app`."""

from __future__ import annotations

from email.message import EmailMessage
from pathlib import Path
from typing import Protocol
from uuid import uuid4


class Mailer(Protocol):
    """Sends one mail. Called in a worker thread, after the response was sent."""

    def send(self, to: str, subject: str, text: str) -> None: ...


class Outbox:
    """A folder of .eml files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def send(self, to: str, subject: str, text: str) -> None:
        message = EmailMessage()
        message["To"], message["Subject"] = to, subject
        message.set_content(text)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{uuid4().hex}.eml").write_bytes(bytes(message))
