"""The races between writers that commit under any term: their judge must see it."""

from stoker.checkpoint import log
from stoker.checkpoint.log import Record

from .racing import main


def _any_term(head: Record | None, term: int) -> Record:
    assert head is not None
    return head


if __name__ == "__main__":
    log._own = _any_term
    main()
