"""The errors a user can meet. Each message names the setting or file, the value, and the way out."""


class HydraError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(HydraError):
    """A setting is unknown, has a wrong value, or contradicts another one."""

    exit_code = 2


class DataError(HydraError):
    """A data file cannot be read as asked; the message names the file and the line."""

    exit_code = 2


class ModelError(HydraError):
    """A model, adapter or tokenizer cannot be loaded or used as asked."""

    exit_code = 2


class CheckpointError(HydraError):
    """A checkpoint or run folder is missing, damaged, or belongs to other settings."""

    exit_code = 2


class NonFiniteError(HydraError):
    """Losses or gradients were not finite several steps in a row; the last checkpoint is intact."""


class OutOfMemoryError(HydraError):
    """Memory ran out on work that cannot be cut any further; the last checkpoint is intact."""


class RewardFunctionError(HydraError):
    """A reward function raised, or returned something other than one finite number (or list) per response."""


class JudgeError(HydraError):
    """A judge of responses cannot be asked: its endpoint refuses every request, or nothing could be judged."""


class Interrupted(HydraError):  # noqa: N818 (a request that was obeyed, not a mistake)
    """SIGINT or SIGTERM asked the run to stop; it left a checkpoint that `--resume` continues from."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; continue with --resume")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
