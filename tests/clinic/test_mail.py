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


def test_mails_with_one_key_are_one_mail(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for text in ("first", "again"):
        outbox.send("maya@mail.example", "Hello", text, key="hello-1")
    outbox.send("maya@mail.example", "Hello", "another", key="hello-2")

    assert sorted(file.name for file in tmp_path.iterdir()) == ["hello-1.eml", "hello-2.eml"]
