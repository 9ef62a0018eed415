"""What can go wrong, as one sentence for the person who reads it.

Every message names the thing (file, key, endpoint, flag) and the mend. The plugin turns a
`ConfigError` into exit status 4 (usage) and the others into a failed test; none of them is
ever shown with a traceback.
"""


class ConfigError(Exception):
    """Something the user wrote is wrong: an option, a marker, a server config, a baseline file."""


class PlanError(ConfigError, ValueError):
    """A load that cannot be: an argument of `closed_loop`, `open_loop`, `load` and the like."""


class UnavailableError(ConfigError):
    """A test asks for a server that the profile or the endpoint does not have: it is skipped."""


class ServerError(Exception):
    """A server could not be started, reached or kept alive."""


class LoadError(Exception):
    """The load could not be driven at all (not: requests failed, which is a result)."""
