"""Refusals as responses: problem+json (RFC 9457), the shape in which tenantdb's own refusals are answered too."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from examples.clinic.problems import ClinicProblem


def install(app: FastAPI) -> None:
    """Let `app` answer the clinic's refusals, and bad input, with problem+json."""
    app.add_exception_handler(ClinicProblem, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)


def _answer(status: int, code: str, title: str, **facts: Any) -> JSONResponse:
    body = {"type": f"urn:clinic:problem:{code}", "title": title, "status": status, "code": code, **facts}
    return JSONResponse(body, status_code=status, media_type="application/problem+json")


async def _refused(request: Request, problem: Exception) -> JSONResponse:
    assert isinstance(problem, ClinicProblem)
    return _answer(problem.status, problem.code, problem.title, **problem.facts)


async def _malformed(request: Request, problem: Exception) -> JSONResponse:
    """Where the input is wrong and why, without the input: it may hold a password, or a patient's data, and would end in somebody's log."""
    assert isinstance(problem, RequestValidationError)
    errors = [{"where": ".".join(str(part) for part in error["loc"]), "problem": error["msg"]} for error in problem.errors()]
    return _answer(422, "invalid", "the input is not valid", errors=errors)
