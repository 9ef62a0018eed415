"""From a server config to a server that answers, and back to a machine as it was."""
