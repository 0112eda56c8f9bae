"""The clinic's refusals, and bad input, as responses of FastAPI."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from examples.clinic.problems import ClinicProblem, malformed


def install(app: FastAPI) -> None:
    """Let `app` answer the clinic's refusals, and bad input, with problem+json."""
    app.add_exception_handler(ClinicProblem, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)


async def _refused(request: Request, problem: Exception) -> JSONResponse:
    assert isinstance(problem, ClinicProblem)
    return JSONResponse(problem.body, status_code=problem.status, media_type="application/problem+json")


async def _malformed(request: Request, problem: Exception) -> JSONResponse:
    assert isinstance(problem, RequestValidationError)
    return await _refused(request, malformed(problem.errors()))
