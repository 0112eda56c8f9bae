"""The rows of one table: find, list, create, change, delete, restore. Every front end, web or worker, goes through a store.

Written once, for an ordinary `Session`; the asynchronous front end calls `await session.run_sync(store.create, data)`. The caller owns the
transaction. Invariant: what is deleted is found by `restore` and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from examples.clinic.models import Row, now
from examples.clinic.problems import Conflict, Invalid, NotFound
from examples.clinic.schemas import Listing

RowT = TypeVar("RowT", bound=Row)


class Store(Generic[RowT]):
    """`order` sorts lists, `search` are the columns that `q` looks into, `references` say which columns must name a living row of what."""

    def __init__(
        self,
        model: type[RowT],
        *,
        order: Sequence[InstrumentedAttribute[Any]] = (),
        search: Sequence[InstrumentedAttribute[Any]] = (),
        references: Mapping[str, type[Row]] | None = None,
    ) -> None:
        self.model = model
        self.order = (*order, model.created_at, model.id)  # ends with the id, so that pages never overlap
        self.search = tuple(search)
        self.references = references or {}

    # -- reading -----------------------------------------------------------------------------------------------------------------------

    def living(self) -> Select[Any]:
        return select(self.model).where(self.model.deleted_at.is_(None))

    def find(self, session: Session, row_id: UUID, *, lock: bool = False) -> RowT:
        """One living row; `lock` keeps others from changing it until the transaction ends. Raises: `NotFound`."""
        return self._one(session, self.living(), row_id, lock=lock)

    def page(self, session: Session, listing: Listing) -> tuple[Sequence[RowT], int]:
        """One page of the living rows that pass the filters, and how many there are in all."""
        found = self.living().where(*self._conditions(listing))
        total = session.scalar(select(func.count()).select_from(found.subquery())) or 0
        rows = session.scalars(found.order_by(*self.order).limit(listing.limit).offset(listing.offset)).all()
        return rows, total

    def _conditions(self, listing: Listing) -> Iterable[ColumnElement[bool]]:
        """A filter's name says what it does: a column's own name, or with `_from` (inclusive) or `_before` (exclusive) after it."""
        for name, value in listing.filters().items():
            if name == "q":
                yield or_(*(column.icontains(value, autoescape=True) for column in self.search))
            elif name.endswith("_from"):
                yield getattr(self.model, name.removesuffix("_from")) >= value
            elif name.endswith("_before"):
                yield getattr(self.model, name.removesuffix("_before")) < value
            else:
                yield getattr(self.model, name) == value

    # -- writing -----------------------------------------------------------------------------------------------------------------------

    def create(self, session: Session, data: BaseModel) -> RowT:
        """Raises: `Invalid` where a reference leads nowhere, `Conflict` where a name is taken."""
        row = self.model()
        self.assign(session, row, data.model_dump())
        session.add(row)
        self.flush(session)
        return row

    def update(self, session: Session, row_id: UUID, data: BaseModel) -> RowT:
        """Change what was given and leave the rest. Raises: `NotFound`, and as `create`."""
        row = self.find(session, row_id, lock=True)
        self.assign(session, row, given(data))
        self.flush(session)
        return row

    def delete(self, session: Session, row_id: UUID) -> None:
        """Hide a row. Raises: `NotFound`."""
        self.find(session, row_id, lock=True).deleted_at = now()
        self.flush(session)

    def restore(self, session: Session, row_id: UUID) -> RowT:
        """Show a deleted row again; a living one stays as it is. Raises: `NotFound`; `Conflict` if its name was taken meanwhile."""
        row = self._one(session, select(self.model), row_id, lock=True)
        row.deleted_at = None
        self.flush(session)
        return row

    # -- for stores that do more -------------------------------------------------------------------------------------------------------

    def assign(self, session: Session, row: RowT, values: Mapping[str, Any]) -> None:
        """Write checked values into a row."""
        for name, model in self.references.items():
            if values.get(name) is not None:
                load(session, model, name, {values[name]})
        for name, value in values.items():
            setattr(row, name, value)

    def flush(self, session: Session) -> None:
        """Send the changes now, so that a broken rule is this request's refusal and not an error at commit."""
        try:
            session.flush()
        except IntegrityError as error:
            raise Conflict(f"this {self._noun} cannot be kept beside what is there already") from error

    def _one(self, session: Session, rows: Select[Any], row_id: UUID, *, lock: bool) -> RowT:
        found = rows.where(self.model.id == row_id)
        row: RowT | None = session.scalar(found.with_for_update(of=self.model) if lock else found)
        if row is None:
            raise NotFound(f"no such {self._noun}")
        return row

    @property
    def _noun(self) -> str:
        return str(self.model.__tablename__).replace("_", " ").replace("ies", "y").removesuffix("s")


def given(data: BaseModel) -> dict[str, Any]:
    """What the body of a PATCH names. Defaults inside what it names, e.g. of an item, still count."""
    return data.model_dump(include=data.model_fields_set)


def load(session: Session, model: type[RowT], field: str, ids: Iterable[UUID]) -> dict[UUID, RowT]:
    """The living rows that `field` names, by id. Raises: `Invalid` if one is missing: never written, deleted, or of another clinic."""
    wanted = set(ids)
    if not wanted:
        return {}
    found = {row.id: row for row in session.scalars(select(model).where(model.id.in_(wanted), model.deleted_at.is_(None)))}
    if missing := wanted - set(found):
        raise Invalid(f"{field} names nothing in this clinic", missing=sorted(str(row_id) for row_id in missing))
    return found
