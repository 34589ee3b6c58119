"""The transformer, and how a configuration becomes one."""
