"""What has logs that belong into the report of a test that failed."""


class Logged:
    """A base by which the plugin finds it among a test's fixtures."""

    def logs(self) -> list[tuple[str, str]]:
        """Return a title and the end of the text of each log there is."""
        raise NotImplementedError
