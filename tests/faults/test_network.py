"""Every fault with every call, once, at each run of the suite; `make prove` has the rest."""

import pytest

from stoker.testing import S3Server
from tests.faults.network import CALLS, FAULTS, matrix


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_meets_a_fault_ends_in_the_right_bytes_or_a_typed_error(s3_server: S3Server, fault: str) -> None:
    cells = matrix(s3_server, always=False, faults=[fault], threads=2)
    assert [cell for cell in cells if cell.violation] == []
    assert any(cell.faults for cell in cells)


@pytest.mark.parametrize("fault", ["503", "reset in mid-body", "stall before the reply", "truncation"])
def test_a_fault_that_never_ends_is_a_typed_error_in_time(s3_server: S3Server, fault: str) -> None:
    cells = matrix(s3_server, always=True, faults=[fault], calls=["get", "head", "list", "create"], threads=4)
    assert [cell for cell in cells if cell.violation] == []
    assert any(cell.outcome != "right" for cell in cells)


def test_most_faults_are_never_seen_by_the_caller(s3_server: S3Server) -> None:
    cells = matrix(s3_server, always=False, faults=["503", "reset before the reply", "reply lost"], threads=2)
    assert {cell.outcome for cell in cells} == {"right"}
    assert len(cells) == 3 * len(CALLS)
