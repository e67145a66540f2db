"""Which host this is: `host` is the module of all that only it does in its way. It is told by what it has, not by its name."""

from importlib.util import find_spec

if find_spec("backend") is not None and find_spec("backend.patcher") is not None:
    from lib_demofusion.hosts.webui import forge as host
else:
    from lib_demofusion.hosts.webui import a1111 as host

__all__ = ["host"]
