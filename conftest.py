"""For this repository's own tests and suites; users of the plugin need none of it."""

pytest_plugins = ["pytester"]
