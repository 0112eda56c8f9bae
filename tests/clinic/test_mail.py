"""What stands in for a mail server."""

from __future__ import annotations

from email import message_from_bytes
from email.policy import default
from pathlib import Path

from examples.clinic.mail import Outbox


def test_a_mail_is_a_file_until_somebody_sends_it(tmp_path: Path) -> None:
    Outbox(tmp_path / "outbox").send("maya@mail.example", "Hello", "Täglich")

    (file,) = (tmp_path / "outbox").iterdir()
    mail = message_from_bytes(file.read_bytes(), policy=default)
    assert (mail["To"], mail["Subject"], mail.get_content().strip()) == ("maya@mail.example", "Hello", "Täglich")
