"""Tuning records: the format of their logs, which of them serve a target, and those that are shipped."""
