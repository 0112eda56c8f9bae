"""What the pages say of the library in lists, tables and drawings is what the library has."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import click
from _pytest.fixtures import FixtureFunctionDefinition

import tenantdb
from tenantdb import events
from tenantdb.backends.postgresql.inspect import MANAGED_GAPS
from tenantdb.backends.postgresql.wire import reset_message
from tenantdb.cli.group import cli
from tenantdb.connections.ledger import UnitState, Work
from tenantdb.errors import TenantDBError, all_errors
from tenantdb.fleet.plan import Options, Runner
from tenantdb.model import TRANSITIONS, TenantState
from tenantdb.provisioning.ending import _LEVELS
from tenantdb.provisioning.hooks import EVENTS
from tenantdb.provisioning.procedures import PROCEDURES
from tenantdb.registry.operations import PROVISION
from tenantdb.registry.rollouts import RolloutState
from tenantdb.registry.tables import VERSION_TABLE, metadata
from tenantdb.settings import Budget, Settings
from tenantdb.testing import plugin
from tests.docs.reader import DOCS, ROOT, blocks, pages
from tests.unit.test_layering import LINE


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its line breaks."""
    return " ".join(text(page).split())


def rows(page: str, *, columns: int) -> list[list[str]]:
    """The rows of the tables with so many columns whose first cell is code."""
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text(page).splitlines() if line.startswith("| `")]
    return [row for row in found if len(row) == columns]


# -- settings --------------------------------------------------------------------------------------------------------------------------


def documented_default(name: str) -> str:
    field = Settings.model_fields[name]
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return shown(default)


def shown(default: object) -> str:
    if default in (None, (), {}):
        return "none"
    return "`Budget()`" if default == Budget() else f"`{default}`"


def test_every_setting_has_its_row_with_its_variable_and_its_default() -> None:
    documented = {row[0].strip("`"): (row[1], row[2]) for row in rows("reference/settings.md", columns=4)}

    assert documented == {name: (f"`TENANTDB_{name.upper()}`", documented_default(name)) for name in Settings.model_fields}


def test_every_field_of_the_budget_has_its_row_with_its_default() -> None:
    documented = {row[0].strip("`"): row[1] for row in rows("reference/settings.md", columns=3)}

    assert documented == {field.name: shown(field.default) for field in dataclasses.fields(Budget)}


# -- errors ----------------------------------------------------------------------------------------------------------------------------


def library_errors() -> list[type[TenantDBError]]:
    """Without those that an application, the command line or another test derives."""
    return [error for error in all_errors() if error.__module__ == TenantDBError.__module__]


def facts(error: type[TenantDBError]) -> str:
    again = "no"
    if error.retryable:
        again = "yes" if error.retry_after is None else f"yes, after {error.retry_after} s"
    return f"HTTP {error.http_status} · try again: {again}"


def test_every_error_has_its_anchor_its_status_and_its_advice() -> None:
    section = re.compile(
        r"^### (?P<name>\w+) \{ #(?P<code>[\w-]+) \}\n\n(?P<facts>HTTP [^\n]+)\n\n(?P<advice>(?:(?!^#).)+)", re.MULTILINE | re.DOTALL
    )
    documented = {match["name"]: (match["code"], match["facts"]) for match in section.finditer(text("reference/errors.md"))}

    assert documented == {error.__name__: (error.code, facts(error)) for error in library_errors()}


def test_error_codes_are_unique_so_that_an_anchor_leads_to_one_error() -> None:
    codes = [error.code for error in library_errors()]

    assert len(codes) == len(set(codes))


# -- drawings and lists ----------------------------------------------------------------------------------------------------------------


def drawing_of_the_lifecycle() -> str:
    """What the page must show; where the test fails, paste it."""
    lines = [f"    {here} --> {there}" for here in TenantState for there in TenantState if there in TRANSITIONS[here]]
    return "\n".join(["stateDiagram-v2", *lines, ""])


def test_the_drawing_of_the_lifecycle_is_the_table_of_transitions() -> None:
    (drawing,) = [block.text for page in pages() for block in blocks(page) if "spare --> " in block.text]

    assert drawing == drawing_of_the_lifecycle()


def test_every_state_says_what_it_means_for_requests_the_server_and_migrations() -> None:
    explained = [row[0].strip("`") for row in rows("explanation/lifecycle.md", columns=4)]

    assert sorted(explained) == sorted(map(str, TenantState))
    fenced = {row[0].strip("`") for row in rows("explanation/lifecycle.md", columns=4) if re.search("NOLOGIN|the same", row[2])}
    assert fenced == {str(state) for state in _LEVELS}


def test_every_legal_change_of_state_that_a_verb_makes_has_its_row() -> None:
    """Those that the library makes by itself are of spares, and of what is being made or erased."""
    by_verb = {
        (here, there)
        for _, before, after in (row for row in rows("explanation/lifecycle.md", columns=3) if row[0] != "`provision`")
        for here in re.findall(r"`(\w+)`", before)
        for there in re.findall(r"`(\w+)`", after)[:1]
        if here in TenantState.__members__.values()
    }
    own = {TenantState.SPARE, TenantState.PROVISIONING, TenantState.PURGING}

    assert by_verb == {
        (here, there) for here, wanted in TRANSITIONS.items() for there in wanted if here not in own and there != TenantState.PROVISIONING
    }


def test_the_drawing_of_a_units_states_has_them_all() -> None:
    drawing = next(block.text for block in blocks("explanation/budget.md") if "stateDiagram" in block.text)
    drawn = {name for pair in re.findall(r"^\s*(\S+) --> (\S+)", drawing, re.MULTILINE) for name in pair} - {"[*]"}

    assert drawn == {str(state) for state in UnitState} - {"gone"}


def test_the_classes_of_work_are_listed() -> None:
    listed = re.findall(r"^\| (\w+) \|", text("explanation/budget.md"), re.MULTILINE)

    assert [name for name in listed if name.upper() in Work.__members__] == [work.name.lower() for work in Work]


def test_what_the_reset_undoes_is_said_in_the_words_that_are_sent() -> None:
    page = prose("explanation/budget.md")
    sent = reset_message(rollback=True, temporary=True, prepared=True).decode().split("; ")

    places = [page.find(f"`{statement}`") for statement in sent]

    assert -1 not in places and places == sorted(places)


def test_the_events_of_connections_are_listed() -> None:
    listed = {name for row in rows("howto/logging.md", columns=2) for name in re.findall(r"`([A-Z]\w+)`", row[0])}

    assert listed == {event.__name__ for event in get_args(events.Event)}


def test_the_registrys_tables_are_listed() -> None:
    listed = [row[0].strip("`") for row in rows("explanation/architecture.md", columns=2) if row[0].startswith("`tenantdb_")]

    assert sorted(listed) == sorted([*metadata.tables, VERSION_TABLE])


def test_the_steps_of_provisioning_are_named_in_order() -> None:
    steps = [step.name for step in PROCEDURES[PROVISION].steps]
    assert ", ".join(f"`{name}`" for name in steps) in prose("howto/workers.md")


def test_every_operation_of_the_journal_is_listed_with_its_steps_in_order() -> None:
    listed = {row[0].strip("`"): row[1] for row in rows("explanation/lifecycle.md", columns=2)}

    assert listed == {kind: ", ".join(f"`{step.name}`" for step in procedure.steps) for kind, procedure in PROCEDURES.items()}


def test_what_is_tried_again_by_itself_and_what_is_not_is_said() -> None:
    page = prose("explanation/lifecycle.md")

    def named(kinds: Iterable[str]) -> str:
        return "(" + ", ".join(f"`{kind}`" for kind in kinds) + ")"

    assert f"What makes a tenant {named(kind for kind, each in PROCEDURES.items() if each.makes)}" in page
    assert f"What must come true {named(kind for kind, each in PROCEDURES.items() if each.insists)}" in page


def test_the_events_of_hooks_are_named() -> None:
    verbs = sorted({event.split("_", 1)[1] for event in EVENTS})

    assert set(EVENTS) == {f"{when}_{verb}" for when in ("before", "after") for verb in verbs}
    assert all(f"`{verb}`" in text("howto/workers.md") for verb in verbs)


def test_the_events_of_migrations_have_their_rows() -> None:
    listed = {row[0].strip("`") for row in rows("howto/migrate-a-fleet.md", columns=3)}

    assert {event for event in EVENTS if event.endswith(("_migrate", "_rollout"))} <= listed


def test_the_ways_to_migrate_a_tenant_have_their_rows() -> None:
    listed = {row[0].strip("`") for row in rows("howto/migrate-a-fleet.md", columns=3)}

    assert set(map(str, Runner)) == {name for name in listed if not name.startswith(("before_", "after_"))}


def test_the_states_of_a_rollout_are_named_in_order() -> None:
    *most, last = (f"`{state}`" for state in RolloutState)

    assert f"A rollout is {', '.join(most)} or {last}." in prose("howto/migrate-a-fleet.md")


def test_what_stays_open_on_managed_servers_is_said_in_the_words_of_check() -> None:
    listed = re.findall(r"^- (hardening='managed': .+)$", text("howto/postgresql.md"), re.MULTILINE)

    assert listed == list(MANAGED_GAPS)


# -- abuse cases -----------------------------------------------------------------------------------------------------------------------

CASES = (
    "J1 J2 J3 J4 J5 J6 J8 J9 J10 J11 J12 J13 J14 J15 J16 J17 J18 J19 J20 J22 J23 "
    "P1 P2 P3 P4 P5 P6 P8 P9 P10 P11 P12 P14 "
    "C1 C2 C3 C5 C6 C7 C8 C9 C10 C11 C13 C14 C15 C16 C17 C18 C19 C20 C21 C22 C23 C24 C25 C26 "
    "N1 N2 N3 N4 N5 N6 N7"
).split()
ASGI_ALONE = {"P10"}  # websockets


def abuse_cases() -> dict[str, list[str]]:
    """The tests that each case's row names."""
    found = re.findall(r"^\| ([A-Z]\d+) \| [^|]+ \| [^|]+ \| ([^|]+) \|$", text("explanation/abuse-cases.md"), re.MULTILINE)
    return {case: re.findall(r"`(test_\w+)`", tests) for case, tests in found}


def names_of_tests(folder: Path) -> set[str]:
    files = folder.rglob("test_*.py") if folder.is_dir() else [folder]
    return {name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE)}


def test_every_abuse_case_has_one_row() -> None:
    rows_begun = re.findall(r"^\| ([A-Z]\d+) \|", text("explanation/abuse-cases.md"), re.MULTILINE)

    assert rows_begun == CASES == list(abuse_cases())


def test_every_test_that_an_abuse_case_names_is_there() -> None:
    there = names_of_tests(ROOT / "tests")

    assert {case: [name for name in tests if name not in there] for case, tests in abuse_cases().items()} == {case: [] for case in CASES}
    assert all(abuse_cases().values())


def test_what_is_tried_against_paths_and_bodies_is_tried_behind_every_face() -> None:
    behind_every_face = names_of_tests(ROOT / "tests" / "adapters" / "test_verdicts.py")

    missing = [case for case, tests in abuse_cases().items() if case.startswith("P") and not behind_every_face.intersection(tests)]

    assert set(missing) == ASGI_ALONE


# -- command line ----------------------------------------------------------------------------------------------------------------------


def verbs(command: click.Command, name: str) -> dict[str, set[str]]:
    """The options of each verb by its full name; a group without options of its own is only its verbs."""
    options = {option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}
    found = {name: options} if options or not isinstance(command, click.Group) else {}
    for child, each in command.commands.items() if isinstance(command, click.Group) else ():
        found |= verbs(each, f"{name} {child}")
    return found


def test_every_verb_of_the_command_line_has_its_section_with_its_options() -> None:
    sections = re.findall(r"^### (tenantdb[\w -]*)\n(.*?)(?=^##|\Z)", text("reference/cli.md"), re.MULTILINE | re.DOTALL)
    documented = {
        name: {option for row in re.findall(r"^\| (`-.*?`) \|", section, re.MULTILINE) for option in re.findall(r"`(-[\w-]+)", row)}
        for name, section in sections
    }

    assert documented == verbs(cli, "tenantdb")


def test_every_option_of_a_rollout_is_said_with_its_default() -> None:
    page = text("reference/cli.md")
    names = {"waves": "wave", "spares": "no-spares"}
    documented = dict(re.findall(r"^\| `--([\w-]+).*?` \| (.+) \|$", page, re.MULTILINE))

    for field in dataclasses.fields(Options):
        said = documented[names.get(field.name, field.name.replace("_", "-"))]
        if type(field.default) in (int, float) and field.default:
            assert f"; {field.default}." in said, field.name


# -- public names ----------------------------------------------------------------------------------------------------------------------


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = text("reference/api.md")
    elsewhere = {"Settings": "settings.md", "errors": "errors.md"}

    missing = [name for name in tenantdb.__all__ if name not in elsewhere and not re.search(rf"\b{name}\b", page)]

    assert missing == []


def test_the_layers_are_those_that_the_tests_hold_the_code_to() -> None:
    drawn = " ← ".join(", ".join(place) for place in LINE)

    assert drawn in prose("explanation/architecture.md")


def test_no_drawing_holds_a_semicolon_which_ends_a_statement_in_mermaid() -> None:
    drawings = [block.text for page in pages() for block in blocks(page) if block.language == "mermaid"]

    assert drawings
    assert not any(";" in drawing for drawing in drawings)


def test_the_fixtures_for_users_tests_are_listed() -> None:
    listed = {row[0].strip("`") for row in rows("howto/tests.md", columns=3)}
    overridden = {"tenant_db_app", "tenant_db_settings", "tenant_tokens", "_discards", "_nothing_stays_bound"}

    assert all(f"`{name}`" in text("howto/tests.md") for name in overridden if not name.startswith("_"))
    assert listed == {name for name, value in vars(plugin).items() if isinstance(value, FixtureFunctionDefinition)} - overridden


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    assert [page for page in pages() if f": {page}\n" not in navigation] == []
