"""What proves stoker, for its own tests and for yours: contract suites, pytest fixtures, a real S3 server, a fault proxy.

Needs the extra ``stoker[testing]``. A new object store is right when a subclass of
:class:`stoker.testing.store.StoreTests` passes; that module imports pytest, so it is not imported here.
"""

from .azure import AzureServer
from .proxy import Fault, FaultProxy, FaultRule, ProxiedRequest
from .s3 import S3Server

__all__ = ["AzureServer", "Fault", "FaultProxy", "FaultRule", "ProxiedRequest", "S3Server"]
