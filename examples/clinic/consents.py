"""What patients agree to. The words of the template are copied, because it may change and the consent must not."""

from __future__ import annotations

from pydantic import BaseModel
from sqlalchemy.orm import Session

from examples.clinic.models import Consent, ConsentTemplate, Patient
from examples.clinic.schemas import ConsentCreate
from examples.clinic.store import Store, load


class ConsentStore(Store[Consent]):
    def create(self, session: Session, data: BaseModel) -> Consent:
        assert isinstance(data, ConsentCreate)
        if data.template_id is not None:
            template = load(session, ConsentTemplate, "template_id", {data.template_id})[data.template_id]
            data = data.model_copy(update={"title": data.title or template.title, "body": data.body or template.body})
        return super().create(session, data)


consents = ConsentStore(Consent, search=(Consent.title,), references={"patient_id": Patient})
