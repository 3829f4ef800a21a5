"""The files of a run folder beside the records: requests, locks, event logs, caches; the folder in an object store."""
