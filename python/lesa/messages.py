"""Which errors are messages for the user, and which are bugs."""


def is_message(error: BaseException) -> bool:
    """Whether the error is meant for the user: a failing file, network or memory, or a failed check. A bug is none."""
    if isinstance(error, (OSError, MemoryError)) or hasattr(error, "lesa_message"):
        return True
    is_memory = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in str(error)  # of torch
    return is_memory or type(error).__name__ == "SafetensorError"
