"""Messages of errors of the machine: memory, threads, open files and disks that are used up, and the limits on them."""

import errno
import resource

from llmtrain.base.format import size

NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory", "failed to map segment", "Cannot allocate memory",
    "cannot allocate memory", "std::bad_alloc", "Unable to allocate",
)  # fmt: skip
NO_THREAD = ("can't start new thread", "pthread_create failed", "Resource temporarily unavailable")
REMEDIES = {
    errno.ENOSPC: "make room, or name another place",
    errno.EDQUOT: "the quota is used up: make room, or name another place",
    errno.EROFS: "name another place",
    errno.EACCES: "name another place, or ask for the permission",
}
LIMITED = {  # the limits of the process that may cause an error, with the option of ulimit
    errno.EMFILE: (resource.RLIMIT_NOFILE, "-n"),
    errno.EFBIG: (resource.RLIMIT_FSIZE, "-f"),
    errno.ENOMEM: (resource.RLIMIT_AS, "-v"),
    errno.EAGAIN: (resource.RLIMIT_NPROC, "-u"),
}
IN_BYTES = (resource.RLIMIT_FSIZE, resource.RLIMIT_AS)


def explain_machine(error: BaseException) -> str | None:
    """Return the message for an error of the machine, as one that no code could avoid; None for another error."""
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError) and any(sign in text for sign in NO_MEMORY)
    ):
        first = text.strip().splitlines()[0] if text.strip() else "none is free"
        remedy = "a smaller accumulation.micro_batch_size, data.sequence_length or model needs less"
        return f"out of memory: {first}{_limit(errno.ENOMEM)}; {remedy}"
    if isinstance(error, RuntimeError | BlockingIOError) and any(sign in text for sign in NO_THREAD):
        return (
            f"no thread or process can be started{_limit(errno.EAGAIN)}{_limit(errno.ENOMEM)}; end others, or raise it"
        )
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0, "")
        limit = _limit(error.errno or 0)
        return f"{place}{error.strerror or error}{limit}{'; ' if remedy else ''}{remedy}"
    return None


def _limit(number: int) -> str:
    """Name the limit of the process that belongs to an error, if it has one: " (the limit is 1 MB: ulimit -f)"."""
    if number not in LIMITED:
        return ""
    kind, option = LIMITED[number]
    limit = resource.getrlimit(kind)[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    return f" (the limit is {size(limit) if kind in IN_BYTES else f'{limit:,}'}: ulimit {option})"
