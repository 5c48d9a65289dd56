"""Exit statuses of the command."""

FINISHED = 0
FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; resume goes on
