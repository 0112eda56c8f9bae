"""What the fixtures promise one by one, on each backend: inner runs of pytest, in which users' tests do what users' tests do."""

from __future__ import annotations

import pytest

from tests.integration.project import Borrowed, borrowed, make, run

__all__ = ["borrowed"]

pytest_plugins = ["pytester"]


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "--tenantdb=sqlite"
    server: Borrowed = request.getfixturevalue("borrowed")
    return f"--tenantdb={server.url}"


# -- what users' tests rely on, module by module ---------------------------------------------------------------------------------------

TENANTS = """
import pytest
from application import Patient
from tenantdb.errors import TenantExists

def databases(tenant_db):
    # what tenants have on the server, without the golden database
    server, = tenant_db.servers.list()
    with tenant_db._runner.shop.workshop(server) as workshop:
        databases, roles = workshop.ours()
    template, = tenant_db._registry.templates.list(server)
    return (databases | roles) - {template.database, template.owner_role}

def test_further_tenants_are_as_they_are_asked_for(tenant_db, tenant, tenant_factory):
    acme, other = tenant_factory("acme", plan="gold", metadata={"beds": 12}), tenant_factory()
    assert (acme.slug, acme.plan, acme.metadata) == ("acme", "gold", {"beds": 12})
    assert len({tenant.id, acme.id, other.id}) == len({tenant.database, acme.database, other.database}) == 3
    assert databases(tenant_db) >= {tenant.database, acme.database, other.database}

def test_they_are_gone_afterwards_and_their_slugs_are_free(tenant_db, tenant_factory):
    assert tenant_db.tenants.list() == []
    assert databases(tenant_db) == set()
    assert tenant_factory("acme").plan is None

def leave_suspended(db, tenant): db.suspend(tenant)
def leave_deleted(db, tenant): db.delete(tenant)
def leave_held(db, tenant): db.hold(db.delete(tenant).id, reason="a court asks for it")
def leave_purged(db, tenant): db.purge(db.delete(tenant).id, confirm=str(tenant.id), immediately=True)
def leave_a_member(db, tenant): db.memberships.add(db.users.create("cem@example.com", "correct horse"), tenant)

def leave_a_connection(db, tenant):
    leave_a_connection.session = session = db.session(tenant)
    session.add(Patient(id=7, name="Ann"))
    session.flush()

def leave_no_database(db, tenant):
    server, = db.servers.list()
    db._engines.forget(tenant.id)
    with db._runner.shop.workshop(server) as workshop:
        workshop.drop_database(tenant)

@pytest.mark.parametrize("leave", [
    leave_suspended, leave_deleted, leave_held, leave_purged, leave_a_member, leave_a_connection, leave_no_database,
])
def test_a_tenant_goes_whatever_was_done_to_it(tenant_db, tenant, leave):
    assert [each.id for each in tenant_db.tenants.list()] == [tenant.id]
    assert len(databases(tenant_db)) in (1, 3)
    leave(tenant_db, tenant)

def test_so_does_one_whose_hooks_forbid_it(tenant_db, tenant_factory):
    def refuse(tenant):
        raise RuntimeError("nobody leaves")

    for verb in ("delete", "purge"):
        tenant_db.on(f"before_{verb}")(refuse)
    tenant_factory("acme")

def test_somebody_elses_is_left_alone(tenant_db, tenant_factory):
    acme = tenant_factory("acme")
    with pytest.raises(TenantExists):
        tenant_factory("acme", plan="gold")
    assert tenant_db.resolve("acme") == acme

def test_one_that_was_never_complete_goes_too(tenant_db, tenant_factory):
    @tenant_db.seed
    def broken(session, tenant):
        raise RuntimeError("no rows today")

    try:
        with pytest.raises(Exception, match="no rows today"):
            tenant_factory("acme")
        assert [each.state for each in tenant_db.tenants.list()] == ["failed"]
    finally:
        tenant_db._hooks.seeds.remove(broken)

def test_nothing_is_left_of_any(tenant_db):
    leave_a_connection.session.invalidate()
    assert tenant_db.tenants.list() == []
    assert databases(tenant_db) == set()
"""
TOKENS = """
import pytest
from uuid import UUID
from tenantdb import MemberRole
from tenantdb.auth import RegistryAuth
from tenantdb.errors import InvalidCredentials, NotAMember
from tenantdb.model import Facts

def test_a_token_is_that_of_a_member(tenant_db, tenant, tenant_tokens, tenant_token):
    claims = tenant_tokens.verify(tenant_token(tenant, role="admin", locale="tr"))
    assert (claims["tenant_id"], claims["role"], claims["locale"]) == (str(tenant.id), "admin", "tr")
    assert tenant_db.memberships.get(UUID(claims["sub"]), tenant).role is MemberRole.ADMIN

def test_registry_auth_lets_members_in_and_nobody_else(tenant_db, tenant, tenant_tokens, tenant_token):
    authenticate, ann = RegistryAuth(tenant_tokens, tenant_db), tenant_db.users.create("dan@example.com", "correct horse")

    def identity(token):
        return authenticate(Facts("https", "clinic", "/", "GET", {"authorization": f"Bearer {token}"}))

    for role in ("user", "admin"):
        found = identity(tenant_token(tenant, user=ann, role=role))
        assert (found.user, found.tenant, found.role) == (str(ann.id), tenant.id, role)
    token = tenant_token(tenant)
    assert identity(token).role == "user"
    tenant_db.memberships.remove(ann, tenant)
    with pytest.raises(NotAMember):
        identity(tenant_tokens.issue(ann.id, tenant.id, role="owner"))

def test_no_password_lets_that_user_in(tenant_db, tenant, tenant_tokens, tenant_token):
    user = tenant_db.users.get(UUID(tenant_tokens.verify(tenant_token(tenant))["sub"]))
    for password in ("!", "", "password"):
        with pytest.raises(InvalidCredentials):
            tenant_db.users.authenticate(user.email, password)

def test_a_given_user_gets_the_role(tenant_db, tenant, tenant_tokens, tenant_token):
    ann = tenant_db.users.create("ann@example.com", "correct horse")
    for user, role in ((ann, "user"), (ann.id, "owner"), ("ann@example.com", "readonly")):
        assert tenant_tokens.verify(tenant_token(tenant, user=user, role=role))["sub"] == str(ann.id)
        assert tenant_db.memberships.get(ann, tenant).role == role

def test_users_are_gone_but_those_that_were_given(tenant_db):
    assert "ann@example.com" in [user.email for user in tenant_db.users.list()]
    assert not [user for user in tenant_db.users.list() if user.email.endswith("@test.example")]

def test_a_role_that_there_is_not_is_refused(tenant, tenant_token):
    with pytest.raises(ValueError, match="emperor"):
        tenant_token(tenant, role="emperor")

def test_a_claim_that_has_a_meaning_of_its_own_is_refused(tenant, tenant_token):
    with pytest.raises(ValueError, match="claims cannot hold tenant_id"):
        tenant_token(tenant, tenant_id="another")
"""
MODELS = """
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from application import Base
from tenantdb.testing import assert_migrations_match_models

def test_they_match(tenant_db):
    assert_migrations_match_models(tenant_db, Base.metadata)

def changed(*columns, tables=()):
    metadata = sa.MetaData()
    sa.Table("patients", metadata, sa.Column("id", sa.Integer, primary_key=True), *columns)
    for name in tables:
        sa.Table(name, metadata, sa.Column("id", sa.Integer, primary_key=True))
    return metadata

NAME = ("name", sa.String)

@pytest.mark.parametrize(("metadata", "missing"), [
    (changed(sa.Column(*NAME, nullable=False), tables=["visits"]), "op.create_table('visits'"),
    (changed(sa.Column(*NAME, nullable=False), sa.Column("born", sa.Date)), "sa.Column('born', sa.Date(), nullable=True)"),
    (changed(), "drop_column('name')"),
    (changed(sa.Column(*NAME, nullable=True)), "nullable=True"),
    (changed(sa.Column("name", sa.Integer, nullable=False)), "type_=sa.Integer()"),
])
def test_what_is_missing_is_shown_as_it_would_be_written(tenant_db, metadata, missing):
    with pytest.raises(AssertionError) as raised:
        assert_migrations_match_models(tenant_db, metadata)
    shown = str(raised.value).replace("op.drop_column('patients', 'name')", "drop_column('name')")
    assert "`alembic revision --autogenerate` would write" in shown
    assert missing in shown

def test_what_env_leaves_out_is_left_out(tenant_db):
    assert_migrations_match_models(tenant_db, changed(sa.Column(*NAME, nullable=False), tables=["somebody_elses"]))

def test_what_env_edits_is_as_it_was_edited(tenant_db):
    assert_migrations_match_models(tenant_db, changed(sa.Column(*NAME, nullable=False), tables=["edited_out"]))
"""
ENV = """
from application import Base, db
from tenantdb.migrations import run_env

def include_object(item, name, kind, reflected, compare_to):
    return not (kind == "table" and name == "somebody_elses")

def edit(context, revision, directives):
    ops = directives[0].upgrade_ops.ops
    ops[:] = [op for op in ops if getattr(op, "table_name", "") != "edited_out"]

run_env(db, target_metadata=Base.metadata, include_object=include_object, process_revision_directives=edit)
"""
ASYNCIO = """
import asyncio
import pytest
from sqlalchemy import select
from application import Ours, Patient

@pytest.fixture(scope="module")
def tenant(tenant_db):
    return tenant_db.provision("shared")

async def use(adb, tenant, session):
    names = select(Patient.name).order_by(Patient.id)
    assert (await session.scalars(names)).all() == ["shared"]
    session.add(Patient(id=2, name="Ann"))
    await session.commit()
    session.add(Patient(id=3, name="Bob"))
    await session.flush()
    await session.rollback()
    assert (await session.scalars(names)).all() == ["shared", "Ann"]
    async with adb.session(tenant) as other:
        assert (await other.scalars(names)).all() == ["shared"]
    session.add(Patient(id=4, name="Cem"))
    await session.flush()  # left open: the end of the test takes it back

@pytest.mark.asyncio
@pytest.mark.parametrize("run", [1, 2])
async def test_what_is_committed_is_rolled_back(async_tenant_db, tenant, async_tenant_session, run):
    await use(async_tenant_db, tenant, async_tenant_session)

@pytest.mark.anyio
async def test_under_the_plugin_of_anyio_too(async_tenant_db, tenant, async_tenant_session, anyio_backend):
    await use(async_tenant_db, tenant, async_tenant_session)

@pytest.fixture
def anyio_backend():
    return "asyncio"

def test_and_under_none(async_tenant_db, tenant, async_tenant_session):
    asyncio.run(use(async_tenant_db, tenant, async_tenant_session))

def test_the_session_is_the_applications(async_tenant_session):
    assert isinstance(async_tenant_session.sync_session, Ours)
    assert async_tenant_session.sync_session.autoflush is False

def test_two_loops_cannot_share_a_connection(async_tenant_session):
    async def begin():
        await async_tenant_session.execute(select(Patient))

    asyncio.run(begin())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(begin())

def test_nothing_is_left(tenant_db, tenant):
    with tenant_db.session(tenant) as session:
        assert session.scalars(select(Patient.name)).all() == ["shared"]
    assert [stats.in_use for stats in tenant_db.stats()] == [0]
"""


def test_what_users_rely_on_holds(pytester: pytest.Pytester, where: str) -> None:
    """In one run, for starting takes longer than the tests: the modules in alphabetical order, the one that keeps a tenant last."""
    project = make(pytester, test_models=MODELS, test_tenants=TENANTS, test_tokens=TOKENS, test_using_asyncio=ASYNCIO)
    (project.path / "schema" / "env.py").write_text(ENV)
    run(project, where, asyncio=True).assert_outcomes(passed=35)


# -- what they replace, and what they get wrong ----------------------------------------------------------------------------------------


def test_tokens_can_be_signed_with_the_applications_key(pytester: pytest.Pytester) -> None:
    project = make(
        pytester,
        test_tokens="""
            import jwt, pytest
            from tenantdb.tokens import Tokens

            KEY = "of the application, and long enough for HS256"

            @pytest.fixture(scope="session")
            def tenant_tokens():
                return Tokens(KEY, issuer="clinic", audience="clinic-api", claim="clinic")

            def test_it(tenant, tenant_token):
                claims = jwt.decode(tenant_token(tenant), KEY, algorithms=["HS256"], issuer="clinic", audience="clinic-api")
                assert claims["clinic"] == str(tenant.id)
        """,
    )
    run(project).assert_outcomes(passed=1)


MISUSE = """
import pytest
from application import Base
from tenantdb import TenantDB
from tenantdb.errors import LeftBehind, MigrationError
from tenantdb.testing import assert_migrations_match_models

def test_a_tenant_stays_bound(tenant_db, tenant_factory):
    tenant_db.tenant_context(tenant_factory("acme")).__enter__()

def test_a_connection_is_left_behind(tenant_db, tenant):
    with pytest.raises(LeftBehind, match="test_misuse"), tenant_db.tenant_context(tenant):
        left = tenant_db.session()
        left.connection()
    left.close()

def test_the_next_is_not_blamed_for_it(tenant_db, tenant):
    with tenant_db.tenant_context(tenant), tenant_db.begin():
        pass

async def test_no_plugin_runs_coroutines(async_tenant_session): ...

def test_without_migrations_nothing_is_compared(tmp_path):
    with TenantDB(f"sqlite:///{tmp_path}/central.sqlite3") as db, pytest.raises(MigrationError, match="no migrations"):
        assert_migrations_match_models(db, Base.metadata)

def test_nor_without_run_env(tenant_db):
    with open("schema/env.py", "w") as env:
        env.write("from application import db")
    with pytest.raises(MigrationError, match="does not call tenantdb's run_env"):
        assert_migrations_match_models(tenant_db, Base.metadata)
"""


def test_whoever_gets_it_wrong_is_told(pytester: pytest.Pytester) -> None:
    result = run(make(pytester, test_misuse=MISUSE), "-p", "no:anyio")
    result.assert_outcomes(passed=5, failed=1, errors=1)
    shown = result.stdout.str()
    assert "tenant 'acme' is still bound at the end of the test" in shown
    assert "async def functions are not natively supported" in shown
